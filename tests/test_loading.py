"""Partial loads: what does not fit is made by a named initializer, or refused; the report says what came."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from kolors_core import KolorsControlNet, KolorsPipeline
from kolors_core.checkpoint import EMBEDDED, load_component
from kolors_core.config import UNetConfig
from kolors_core.loading import Initializer, LoadReport, assign_weights, load, zero_padded, zeros
from kolors_core.unet import UNet
from tests.support.small import SMALL, randomise
from weights_convert import TABLES
from weights_convert.safetensors_files import Source, Tensors, save_tensors

CONFIG = replace(SMALL.unet, channels=(32, 32), heads=(2, 2), depths=(0, 1), resnets_per_level=1)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A UNet of four input channels in public names."""
    model, table = UNet(CONFIG), TABLES["unet"]
    randomise(model)
    file = tmp_path_factory.mktemp("unet") / "unet.safetensors"
    save_tensors({table.to_public(name): tensor for name, tensor in model.state_dict().items()}, file)
    return file


def empty(config: UNetConfig = CONFIG) -> UNet:
    with torch.device("meta"):
        return UNet(config)


@pytest.mark.parametrize("stored", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_float8_of_a_file_is_widened_exactly(stored: torch.dtype, dtype: torch.dtype, tmp_path: Path) -> None:
    """All values that are numbers, subnormal ones too."""
    codes = torch.arange(256, dtype=torch.uint8).view(stored)
    values = codes[torch.isfinite(codes.float())].repeat(2)[:400].reshape(20, 20)
    save_tensors({"x": values}, tmp_path / "x.safetensors")
    source, model = Source([tmp_path / "x.safetensors"]), nn.ParameterDict({"x": torch.zeros(20, 20)})
    assign_weights(model, source, {"x": "x"}, dtype=dtype, device="cpu")
    assert model["x"].dtype == dtype and torch.equal(model["x"].double(), values.double())


def test_a_model_in_float8_is_refused_with_what_to_use(published: Path) -> None:
    """At loading, and in `to` of models and pipelines: their layers could not run."""
    pipe, dtype = KolorsPipeline.from_pretrained("tiny"), torch.float8_e4m3fn
    unet, weight = pipe.unet, pipe.unet.conv_in.weight
    for make in (
        lambda: KolorsPipeline.from_pretrained("tiny", torch_dtype=dtype),
        lambda: KolorsPipeline.from_pretrained("tiny", torch_dtype={"unet": torch.float8_e5m2}),
        lambda: KolorsControlNet.from_pretrained("tiny", torch_dtype=dtype),
        lambda: load_component(EMBEDDED, "vae", dtype=dtype),
        lambda: load(UNet(SMALL.unet), Source([published]), "unet", dtype=dtype),
        lambda: pipe.to(dtype), lambda: pipe.to("cpu", dtype), lambda: unet.to(dtype),
        lambda: pipe.vae.to(dtype=dtype), lambda: pipe.text_encoder.to(weight.to(dtype)),
    ):  # fmt: skip
        with pytest.raises(TypeError, match="must be float16, bfloat16, .*got torch.float8_.*quantize to 8"):
            make()
    assert pipe.unet.conv_in.weight is weight and weight.dtype == torch.float32


def test_nine_channels_from_four(published: Path) -> None:
    """Inpainting's UNet computes at first what the plain one did, whatever the new channels hold."""
    model, plain = empty(replace(CONFIG, in_channels=9)), empty()
    report = load(model, Source([published]), "unet", partial={"conv_in.weight": zero_padded})
    load(plain, Source([published]), "unet")
    assert report.misshapen == ["conv_in.weight"] and not report.missing and not report.unexpected
    assert len(report.loaded) == len(plain.state_dict()) - 1
    assert str(report) == f"{len(report.loaded)} loaded; 1 misshapen: conv_in.weight"
    weight = model.state_dict()["conv_in.weight"]
    assert torch.equal(weight[:, :4], plain.state_dict()["conv_in.weight"]) and not weight[:, 4:].any()
    x = torch.randn(1, 9, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(model.conv_in(x), plain.conv_in(x[:, :4]), atol=1e-6)
    assert not any(tensor.is_meta for tensor in model.state_dict().values())
    for name in report.loaded:
        assert torch.equal(model.state_dict()[name], plain.state_dict()[name]), name


def test_the_strict_load_stays_and_reports_all(published: Path) -> None:
    model = empty()
    report = load(model, Source([published]), "unet")
    assert report == LoadReport(sorted(model.state_dict()), [], [], [])
    with pytest.raises(ValueError, match=r"1 misshapen: conv_in.weight is \[32, 4, 3, 3\], the model wants"):
        load(empty(replace(CONFIG, in_channels=9)), Source([published]), "unet")
    assert load(empty(), Source([published]), "unet", partial={}) == report


def test_missing_by_pattern_unexpected_reported_and_the_first_pattern_counts(published: Path) -> None:
    source = Source([published])
    stale = {name: source[name] for name in source if not name.startswith("encoder_hid_proj")}
    tensors = Tensors(stale | {"motion.weight": torch.ones(1)}, "a stale UNet")
    ones: Initializer = lambda shape, found: torch.ones(shape)  # noqa: E731
    model = empty()
    report = load(model, tensors, "unet", partial={"text_proj.bias": ones, "text_proj.*": zeros})
    assert report.missing == ["text_proj.bias", "text_proj.weight"]
    assert report.unexpected == ["motion.weight"] and report.misshapen == []
    state = model.state_dict()
    assert (state["text_proj.bias"] == 1).all() and not state["text_proj.weight"].any()


@pytest.mark.parametrize(
    ("partial", "message"),
    [
        ({}, r"conv_in.weight is \[32, 4, 3, 3\], the model wants \[32, 9, 3, 3\]: give an initializer"),
        ({"conv_in.*": zero_padded, "conv_out.*": zeros}, r"partial: 'conv_out.\*' matches no tensor that"),
        ({"*": lambda shape, found: found}, r"conv_in.weight made \[32, 4, 3, 3\], the model wants"),
        ({"*": lambda shape, found: None}, "made NoneType, the model wants"),
        ({"*": lambda shape, found: torch.empty(shape, device="meta")}, "initializer of conv_in.weight made"),
    ],
)  # fmt: skip
def test_what_is_not_named_or_not_right_is_refused_and_nothing_loaded(
    partial: dict, message: str, published: Path
) -> None:
    model = empty(replace(CONFIG, in_channels=9))
    with pytest.raises(ValueError, match=message):
        load(model, Source([published]), "unet", partial=partial)
    assert all(tensor.is_meta for tensor in model.state_dict().values())


def test_strangers_whole_numbers_and_what_cannot_be_padded(published: Path) -> None:
    with pytest.raises(ValueError, match="has no tensor of the model, a unet"):
        load(empty(), Tensors({"a": torch.ones(1)}, "here"), "unet", partial={"*": zeros})
    source = Source([published])
    whole = Tensors({name: source[name] for name in source} | {"conv_in.weight": torch.ones(2).int()}, "here")
    with pytest.raises(ValueError, match=r"conv_in.weight holds torch.int32, expected floating-point"):
        load(empty(), whole, "unet", partial={"conv_in.weight": zeros})
    for found in (None, torch.ones(3), torch.ones(2, 5)):
        with pytest.raises(ValueError, match=r"cannot pad to \[2, 4\]: expected a tensor no larger"):
            zero_padded(torch.Size((2, 4)), found)
    with pytest.raises(ValueError, match="here: conv_in.weight: cannot pad to"):
        less = {name: source[name] for name in source if name != "conv_in.weight"}
        load(empty(), Tensors(less, "here"), "unet", partial={"conv_in.weight": zero_padded})


def test_what_an_initializer_gives_is_not_shared_and_has_the_dtype(published: Path) -> None:
    mine = nn.Parameter(torch.ones(32, 9, 3, 3))
    model = empty(replace(CONFIG, in_channels=9))
    give: Initializer = lambda shape, found: mine  # noqa: E731
    load(model, Source([published]), "unet", partial={"conv_in.weight": give}, dtype=torch.bfloat16)
    weight: Tensor = model.conv_in.weight
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.bfloat16}
    with torch.no_grad():
        weight.zero_()
    assert (mine == 1).all() and isinstance(weight, nn.Parameter) and weight.requires_grad

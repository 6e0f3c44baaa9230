"""The ControlNet against the reference's: residuals, gradients, the UNet that takes them, and loading."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import ControlNetModel
from safetensors.torch import load_file
from torch import Tensor

from kolors_core import KolorsControlNet, KolorsPipeline
from kolors_core.adapters.controlnet import (
    ControlInput,
    ControlNet,
    ControlNetConfig,
    active_controls,
    check_fits,
)
from kolors_core.config import KOLORS
from kolors_core.performance.quantize import quantize
from kolors_core.unet import UNet
from tests.support.controlnets import (
    NET,
    net_pair,
    reference_controlnet,
    reference_residuals,
    write_controlnet,
)
from tests.support.parity import assert_parity, first_divergence, pair
from tests.support.small import EXACT, SMALL, randomise, relative_error
from tests.test_unet import inputs
from weights_convert import TABLES, detect_component
from weights_convert.key_mapping import compare
from weights_convert.safetensors_files import save_tensors

pytestmark = pytest.mark.numerical


def control_image(batch: int, height: int, width: int) -> Tensor:
    """[B, 3, 8 * height, 8 * width] in [0, 1]."""
    generator = torch.Generator().manual_seed(5)
    return torch.rand(batch, 3, 8 * height, 8 * width, generator=generator, dtype=torch.float64)


@pytest.mark.exact
def test_the_table_is_closed_both_ways_at_full_size() -> None:
    config = ControlNetConfig()
    with torch.device("meta"):
        theirs, ours = reference_controlnet(config), ControlNet(config)
    assert theirs.config["encoder_hid_dim_type"] == "text_proj"
    assert theirs.config["addition_embed_type"] == "text_time"
    assert theirs.config["projection_class_embeddings_input_dim"] == 5632
    table = TABLES["controlnet"]
    found, target = (
        {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()} for model in (theirs, ours)
    )
    renamed = {table.to_ours(name): shape for name, shape in found.items()}
    assert len(renamed) == len(found) == len(target)
    assert not compare(table, renamed, target)
    assert [table.to_public(table.to_ours(name)) for name in found] == list(found)
    assert table.unused_rules(found) == []
    assert table.faults(found) == []
    assert detect_component(found, "x") == (table, False)
    assert detect_component(target, "x") == (table, True)
    lost = dict(found)
    del lost["controlnet_down_blocks.3.bias"]
    assert table.faults(lost) == ["controlnet_down_blocks.3.bias is missing"]
    assert compare(table, renamed | {"to_mid.bias": (7,)}, target)


@pytest.mark.exact
def test_the_config_is_read_back_as_it_is_written_by_the_reference(tmp_path: Path) -> None:
    reference_controlnet().save_pretrained(tmp_path)
    public = json.loads((tmp_path / "config.json").read_text())
    assert ControlNetConfig.from_public(public) == replace(NET, sample_size=128)
    released = ControlNetConfig()
    assert ControlNetConfig.from_public(released.to_public()) == released
    assert vars(released) == vars(KOLORS.unet) | {"conditioning_widths": (16, 32, 96, 256)}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"encoder_hid_dim_type": None}, "encoder_hid_dim_type is None"),
        ({"controlnet_conditioning_channel_order": "bgr"}, "channel_order is 'bgr'"),
        ({"global_pool_conditions": True}, "global_pool_conditions is True"),
        ({"conditioning_channels": 4}, "conditioning_channels is 4"),
        ({"projection_class_embeddings_input_dim": 2816}, "projection_class_embeddings_input_dim is 2816"),
        ({"_class_name": "UNet2DConditionModel"}, "_class_name is 'UNet2DConditionModel'"),
        ({"out_channels": 4}, "out_channels is 4"),
        ({"new_switch": True}, "new_switch is True"),
    ],
)
@pytest.mark.exact
def test_a_config_that_would_be_computed_differently_is_refused(change: dict, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        ControlNetConfig.from_public(NET.to_public() | change)


@pytest.mark.parametrize(("batch", "height", "width"), [(1, 16, 16), (2, 9, 13)])
def test_every_residual_equals_the_reference(batch: int, height: int, width: int) -> None:
    ours, theirs = net_pair(0, torch.float64)
    given, image = inputs(batch, height, width), control_image(batch, height, width)
    runs = (lambda: ours(**given, image=image)), (lambda: reference_residuals(theirs, given, image))
    with torch.no_grad():
        mine, other = (run() for run in runs)
    assert len(mine) == len(other) == 10
    for a, b in zip(mine, other, strict=True):
        explain = lambda: first_divergence(ours, theirs, "controlnet", *runs, EXACT)  # noqa: E731
        assert_parity(a, b, EXACT, explain)


def test_parity_fails_and_names_the_first_module_that_differs() -> None:
    ours, theirs = net_pair(0, torch.float64)
    ours.image_embedding.convs[1].stride = (1, 1)
    ours.image_embedding.convs[5].stride = (4, 4)
    given, image = inputs(1, 8, 8), control_image(1, 8, 8)
    runs = (lambda: ours(**given, image=image)), (lambda: reference_residuals(theirs, given, image))
    with torch.no_grad():
        mine, other = (run() for run in runs)
    with pytest.raises(AssertionError, match=r"image_embedding.convs.1 \(controlnet_cond_embedding.blocks.1"):
        assert_parity(
            mine[0], other[0], EXACT, lambda: first_divergence(ours, theirs, "controlnet", *runs, EXACT)
        )


def test_gradients_equal_the_reference() -> None:
    ours, theirs = net_pair(1, torch.float64)
    ours.requires_grad_(True)
    given, images = inputs(2, 8, 9), [control_image(2, 8, 9).requires_grad_(True) for _ in range(2)]
    sum(x.square().mean() for x in ours(**given, image=images[0])).backward()
    sum(x.square().mean() for x in reference_residuals(theirs, given, images[1])).backward()
    assert_parity(images[0].grad, images[1].grad, EXACT)
    their_gradients = {TABLES["controlnet"].to_ours(n): p.grad for n, p in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        assert_parity(parameter.grad, their_gradients[name], EXACT, lambda name=name: f"gradient of {name}")


def test_the_unet_takes_residuals_as_the_reference_does() -> None:
    ours, theirs = pair("unet", torch.float64)
    nets = [net_pair(seed, torch.float64) for seed in (2, 3)]
    given, image = inputs(2, 9, 12), control_image(2, 9, 12)
    target = torch.randn(2, 4, 9, 12, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    one = [a + 0.5 * b for a, b in zip(*(mine(**given, image=image) for mine, _ in nets), strict=True)]
    both = [reference_residuals(nets[k][1], given, image, scale) for k, scale in enumerate((1, 0.5))]
    other = [a + b for a, b in zip(*both, strict=True)]
    predicted = ours(**given, residuals=one)
    expected = theirs(
        given["latents"], given["timestep"], encoder_hidden_states=given["text_tokens"],
        added_cond_kwargs={"text_embeds": given["pooled_text"], "time_ids": given["size_ids"]},
        down_block_additional_residuals=other[:-1], mid_block_additional_residual=other[-1],
    ).sample  # fmt: skip
    assert_parity(predicted, expected, EXACT)
    F.mse_loss(predicted, target).backward()
    F.mse_loss(expected, target).backward()
    weights = nets[0][0].to_skips[4].weight, nets[0][1].controlnet_down_blocks[4].weight
    assert_parity(weights[0].grad, weights[1].grad, EXACT)
    with pytest.raises(ValueError, match="expected 10 residuals, skips and mid, got 9"):
        ours(**given, residuals=one[:-1])


def test_a_new_one_of_a_unet_has_its_weights_and_no_effect_yet() -> None:
    unet, _ = pair("unet", torch.float64)
    net = KolorsControlNet.from_unet(unet, NET.conditioning_widths)
    given, image = inputs(1, 8, 8), control_image(1, 8, 8)
    with torch.no_grad():
        residuals = net(**given, image=image)
        assert torch.equal(unet(**given, residuals=residuals), unet(**given))
    assert all(not residual.any() for residual in residuals)
    state = unet.state_dict()
    shared = [name for name in net.state_dict() if name in state]
    assert (
        "text_proj.weight" in shared and "down.1.attentions.0.blocks.0.self_attention.to_q.weight" in shared
    )
    assert all(torch.equal(net.state_dict()[name], state[name]) for name in shared)
    with pytest.raises(ValueError, match="no plain down.1.attentions.0.proj_in.weight to start from"):
        KolorsControlNet.from_unet(_quantized(), NET.conditioning_widths)
    wide = UNet(replace(SMALL.unet, in_channels=9)).double()
    of_wide = KolorsControlNet.from_unet(wide, NET.conditioning_widths)
    assert torch.equal(of_wide.conv_in.weight, wide.conv_in.weight[:, :4])
    with torch.no_grad():
        of_wide(**given, image=image)


def _quantized() -> UNet:
    unet = UNet(SMALL.unet)
    quantize(unet, 8)
    return unet


def test_loading_what_the_reference_saved_and_saving_for_it(tmp_path: Path) -> None:
    folder = write_controlnet(tmp_path / "net", 4)
    net = KolorsControlNet.from_pretrained(folder, torch_dtype=torch.float64)
    assert isinstance(net, KolorsControlNet) and not net.training
    theirs = ControlNetModel.from_pretrained(folder).double()
    given, image = inputs(1, 8, 8), control_image(1, 8, 8)
    with torch.no_grad():
        pairs = zip(net(**given, image=image), reference_residuals(theirs, given, image), strict=True)
        for mine, other in pairs:
            assert_parity(mine, other, EXACT)
    net.float().save_pretrained(tmp_path / "again", variant="fp16")
    assert json.loads((tmp_path / "again" / "config.json").read_text()) == NET.to_public() | {
        name: value for name, value in json.loads((tmp_path / "again" / "config.json").read_text()).items()
        if isinstance(value, list)
    }  # fmt: skip
    again = ControlNetModel.from_pretrained(tmp_path / "again", variant="fp16")
    state = load_file(folder / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(tensor, state[name]) for name, tensor in again.state_dict().items())
    meta = KolorsControlNet.from_pretrained(folder, device="meta")
    assert meta.to_mid.weight.is_meta
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="net"):
        KolorsControlNet.from_pretrained(folder)


def write_sdxl(folder: Path, **changes: object) -> ControlNetModel:
    """An SDXL ControlNet of our size: no text projection, and another width of pooled text."""
    public = NET.to_public() | {
        "encoder_hid_dim": None, "encoder_hid_dim_type": None,
        "projection_class_embeddings_input_dim": 40 + 6 * NET.size_dim,
    } | changes  # fmt: skip
    theirs = ControlNetModel.from_config(public)
    randomise(theirs, 9)
    theirs.save_pretrained(folder)
    return theirs


def test_a_single_file_is_the_folders_controlnet(tmp_path: Path) -> None:
    """By the config beside it, by one that is named, by the released sizes; and else the sizes are said."""
    folder, alone = write_controlnet(tmp_path / "net", 1), tmp_path / "alone" / "net.safetensors"
    file = folder / "diffusion_pytorch_model.safetensors"
    alone.parent.mkdir()
    alone.write_bytes(file.read_bytes())
    wanted = KolorsControlNet.from_pretrained(folder, torch_dtype=torch.bfloat16).state_dict()
    for net in (
        KolorsControlNet.from_single_file(file, torch_dtype=torch.bfloat16),
        KolorsControlNet.from_single_file(str(alone), config=folder, dtype=torch.bfloat16),
    ):
        assert not net.training and net.state_dict().keys() == wanted.keys()
        assert all(torch.equal(tensor, wanted[name]) for name, tensor in net.state_dict().items())
    empty = KolorsControlNet.from_single_file(alone, config=folder, device="meta")
    assert next(empty.parameters()).is_meta and empty.config.channels == NET.channels
    with pytest.raises(ValueError, match="do not fit.*these are the released sizes, for others give config"):
        KolorsControlNet.from_single_file(alone)
    (alone.parent / "config.json").write_text('{"_class_name": "CLIPModel"}')  # of another model
    with pytest.raises(ValueError, match="these are the released sizes"):
        KolorsControlNet.from_single_file(alone)
    with pytest.raises(ValueError, match="_class_name is 'CLIPModel'"):
        KolorsControlNet.from_single_file(alone, config=alone.parent)
    with pytest.raises(ValueError, match="revision has no effect without config"):
        KolorsControlNet.from_single_file(alone, revision="main")
    with pytest.raises(FileNotFoundError, match=r"nothing.safetensors: no such file"):
        KolorsControlNet.from_single_file(tmp_path / "nothing.safetensors")


@pytest.mark.exact
def test_a_single_file_of_the_released_sizes_needs_no_config(tmp_path: Path) -> None:
    """Of the header alone: the tensors are a hole in the file."""
    with torch.device("meta"):
        whole = KolorsControlNet(ControlNetConfig(**vars(KOLORS.unet)))
    shapes = {TABLES["controlnet"].to_public(name): list(t.shape) for name, t in whole.state_dict().items()}
    entries, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * torch.Size(shape).numel()
        entries[name] = {"dtype": "F16", "shape": shape, "data_offsets": [start, end]}
    header = json.dumps(entries).encode()
    file = tmp_path / "kolors_canny.safetensors"
    with file.open("wb") as stream:
        stream.write(len(header).to_bytes(8, "little") + header)
        stream.truncate(8 + len(header) + end)
    net = KolorsControlNet.from_single_file(file, device="meta", torch_dtype=torch.float16)
    assert net.config == ControlNetConfig() and net.conv_in.weight.dtype == torch.float16


@pytest.mark.parametrize("load", [KolorsPipeline.from_pretrained, KolorsControlNet.from_pretrained])
@pytest.mark.exact
def test_a_file_in_place_of_a_folder_is_told_what_loads_it(load: Callable[..., Any], tmp_path: Path) -> None:
    file = tmp_path / "kolors.safetensors"
    save_tensors({"x": torch.zeros(1)}, file)
    with pytest.raises(FileNotFoundError, match="kolors.safetensors: expected a folder .*from_single_file"):
        load(file)


def test_an_sdxl_controlnet_loads_only_when_borrowed(tmp_path: Path) -> None:
    theirs = write_sdxl(tmp_path / "sdxl")
    with pytest.raises(ValueError, match="encoder_hid_dim_type is None"):
        KolorsControlNet.from_pretrained(tmp_path / "sdxl")
    unet, _ = pair("unet", torch.float64)
    net, report = KolorsControlNet.from_sdxl(tmp_path / "sdxl", unet)
    layers = [f"add_embedding.linear_{i}.{kind}" for i in (1, 2) for kind in ("bias", "weight")]
    assert report.missing == [*layers, "text_proj.bias", "text_proj.weight"]
    assert (report.unexpected, report.misshapen) == ([], [])
    assert len(report.loaded) + len(report.missing) == len(net.state_dict())
    assert "6 missing: add_embedding.linear_1.bias" in str(report)
    state = {TABLES["controlnet"].to_ours(name): tensor for name, tensor in theirs.state_dict().items()}
    for name, tensor in net.state_dict().items():
        wanted = unet.state_dict()[name] if name in report.missing else state[name].double()
        assert torch.equal(tensor, wanted), name
    given, image = inputs(1, 8, 8), control_image(1, 8, 8)
    with torch.no_grad():
        assert relative_error(unet(**given, residuals=net(**given, image=image)), unet(**given)) > 1e-3
    check_fits(net, unet, 8)
    with pytest.raises(ValueError, match="borrow from a plain UNet"):
        KolorsControlNet.from_sdxl(tmp_path / "sdxl", _quantized())


def test_borrowing_keeps_an_added_condition_that_fits_and_refuses_what_needs_none(tmp_path: Path) -> None:
    unet, _ = pair("unet", torch.float64)
    width = NET.text_dim + 6 * NET.size_dim
    write_sdxl(tmp_path / "fits", projection_class_embeddings_input_dim=width)
    _, report = KolorsControlNet.from_sdxl(tmp_path / "fits", unet)
    assert report.missing == ["text_proj.bias", "text_proj.weight"]
    write_controlnet(tmp_path / "own", 0)
    with pytest.raises(ValueError, match="has a text projection: load it by from_pretrained"):
        KolorsControlNet.from_sdxl(tmp_path / "own", unet)


@pytest.mark.parametrize(
    ("arguments", "error", "named"),
    [
        ({"scale": 0}, ValueError, "not 0"),
        ({"scale": float("nan")}, ValueError, "scale must be a number"),
        ({"scale": "1"}, ValueError, "scale must be a number"),
        ({"start": "0"}, ValueError, "start must be a number"),
        ({"start": 0.5, "end": 0.5}, ValueError, "0.5 and 0.5"),
        ({"start": -0.1}, ValueError, "-0.1"),
        ({"end": 1.1}, ValueError, "1.1"),
    ],
)
@pytest.mark.exact
def test_a_control_without_effect_is_refused(arguments: dict, error: type, named: str) -> None:
    with pytest.raises(error, match=named):
        ControlInput(KolorsControlNet(NET), torch.zeros(1, 3, 8, 8), **arguments)


def test_steps_in_which_a_control_acts_are_the_references() -> None:
    net, image = KolorsControlNet(NET), torch.zeros(1, 3, 8, 8)
    steps = {}, {"start": 0.25, "end": 0.8}, {"end": 0.3}
    controls = [ControlInput(net, image, **given) for given in steps]
    assert active_controls(controls, 4) == [(0, 2), (0, 1), (0, 1), (0,)]
    with pytest.raises(ValueError, match=r"ControlNet 2 would act in none of the 2 steps, from 0.25 to 0.8"):
        active_controls(controls, 2)


def test_a_batch_of_batches_shares_an_image_of_one_row() -> None:
    net, image = KolorsControlNet(NET), torch.rand(1, 3, 8, 8)
    one = ControlInput(net, image)
    assert ControlInput.cat(one, one) is one
    two = ControlInput(net, torch.rand(2, 3, 8, 8))
    assert torch.equal(ControlInput.cat(two, two).image, torch.cat([two.image, two.image]))
    with pytest.raises(ValueError, match="different ControlNets"):
        ControlInput.cat(one, ControlInput(net, image, scale=0.5))


@pytest.mark.exact
def test_a_controlnet_for_another_unet_is_refused() -> None:
    unet = UNet(SMALL.unet)
    with pytest.raises(ValueError, match=r"channels is \(16, 32, 48\), and the UNet's \(16, 32, 64\)"):
        check_fits(ControlNet(replace(NET, channels=(16, 32, 48), heads=(2, 4, 6))), unet, 8)
    with pytest.raises(ValueError, match="makes 4 pixels one latent, and the VAE 8"):
        check_fits(ControlNet(replace(NET, conditioning_widths=(8, 8, 8))), unet, 8)
    with pytest.raises(TypeError, match="got diffusers.models.controlnets"):
        check_fits(reference_controlnet(), unet, 8)

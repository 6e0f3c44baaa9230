"""Quantized while read, saved and loaded: the same bits, little memory, and no file taken for another."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from weakref import finalize

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kolors_core import KolorsPipeline, checkpoint
from kolors_core.__main__ import main
from kolors_core.checkpoint import EMBEDDED
from kolors_core.performance.cuda_graphs import tensors_in
from kolors_core.performance.quantize import (
    FORMATS,
    Format,
    QuantizedLayer,
    is_quantized,
    model_bytes,
    quantize,
)
from kolors_core.performance.quantized_files import load_component, save_component
from kolors_core.pipelines.png_metadata import read_metadata
from kolors_core.pipelines.text_to_image import KolorsPipeline as PlainPipeline
from kolors_core.unet import UNet

UNET_FILE = "diffusion_pytorch_model.safetensors"
SIZE: dict[str, Any] = {"height": 64, "width": 64, "num_inference_steps": 2, "output_type": "latent"}


def same(a: Any, b: Any) -> bool:
    """Whether two models hold the same bits under the same names."""
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(
        ours[name].dtype == theirs[name].dtype and torch.equal(ours[name], theirs[name]) for name in ours
    )


@pytest.mark.parametrize("component", ["unet", "text_encoder"])
def test_quantized_while_read_is_quantized_after(component: str) -> None:
    """Bit for bit, in the dtype that was asked for, and each layer is reported."""
    for weight_format, dtype in ((8, torch.bfloat16), (4, torch.float32), ("fp8", torch.float16)):
        seen = list[tuple[int, int]]()
        got = load_component(
            EMBEDDED, component, weight_format, dtype=dtype,
            progress=lambda done, total, seen=seen: seen.append((done, total)),
        )  # fmt: skip
        wanted = checkpoint.load_component(EMBEDDED, component, dtype=dtype)
        quantize(wanted, weight_format)
        assert same(got, wanted) and not got.training
        count = sum(isinstance(layer, QuantizedLayer) for layer in got.modules())
        assert seen == [(i + 1, count) for i in range(count)]


class LivingBytes(TorchDispatchMode):
    """Counts the bytes of storages that operations make, until they are freed; not those of mapped files."""

    def __init__(self) -> None:
        super().__init__()
        self.now, self.peak, self.known = 0, 0, set[int]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.see(tensors_in((args, kwargs)), 0)
        result = func(*args, **(kwargs or {}))
        self.see(tensors_in(result), 1)
        return result

    def see(self, tensors: list[Tensor], share: int) -> None:
        for storage in [tensor.untyped_storage() for tensor in tensors if not tensor.is_meta]:
            if storage._cdata not in self.known:
                self.known.add(storage._cdata)
                size = share * storage.nbytes()
                self.now += size
                self.peak = max(self.peak, self.now)
                finalize(storage, self.forget, storage._cdata, size)

    def forget(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


def peak_of(load: Callable[[], Any]) -> tuple[int, Any]:
    with LivingBytes() as bytes_alive:
        model = load()
    return bytes_alive.peak, model


def test_in_memory_are_the_quantized_layers_and_one_more() -> None:
    """In float32 of a float16 file; loading and then quantizing takes the whole model."""
    peak, unet = peak_of(lambda: load_component(EMBEDDED, "unet", "fp8"))
    layers = [layer for layer in unet.modules() if isinstance(layer, QuantizedLayer)]
    one = max(4 * layer.quantized.numel() for layer in layers)
    assert model_bytes(unet) <= peak < model_bytes(unet) + 4 * one

    def load_then_quantize() -> Any:
        whole = checkpoint.load_component(EMBEDDED, "unet")
        quantize(whole, "fp8")
        return whole

    whole = checkpoint.load_component(EMBEDDED, "unet", device="meta")
    assert peak_of(load_then_quantize)[0] > model_bytes(whole) > 3 * model_bytes(unet)


@pytest.mark.parametrize("weight_format", FORMATS)
def test_a_saved_pipeline_comes_back(weight_format: Format, tmp_path: Path) -> None:
    """With the same bits and latents, in any dtype, planned without weights, and in shards."""
    pipe = PlainPipeline.from_pretrained(quantization={"unet": weight_format, "text_encoder": 8})
    pipe.save_pretrained(tmp_path, max_shard_size="2MB" if weight_format == 8 else None)
    again = PlainPipeline.from_pretrained(tmp_path, quantization={"text_encoder": 8})
    assert same(again.unet, pipe.unet) and same(again.text_encoder, pipe.text_encoder)
    for one in (pipe, again):
        one.set_progress_bar_config(disable=True)
    latents = [one("cat", generator=torch.Generator().manual_seed(0), **SIZE)[0] for one in (pipe, again)]
    assert torch.equal(*latents)
    half = PlainPipeline.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert same(half.unet, pipe.unet.to(torch.bfloat16))
    planned = PlainPipeline.from_pretrained(tmp_path, device="meta").unet
    assert is_quantized(planned) and model_bytes(planned) == model_bytes(again.unet)
    settings = json.loads((tmp_path / "unet" / "config.json").read_text())["quantization_config"]
    assert settings == {
        "quant_method": "kolors_core", "format": weight_format, "group": 64, "exceptions": {}
    }  # fmt: skip


def test_layers_of_several_formats_come_back_by_the_names_of_the_reference(tmp_path: Path) -> None:
    unet = checkpoint.load_component(EMBEDDED, "unet")
    quantize(unet, "w8a8", exceptions={"mid.attentions.0.proj_in": 4, "mid.attentions.0.proj_out": None})
    save_component(unet, tmp_path, "unet")
    again = load_component(tmp_path, "unet")
    assert same(again, unet) and not isinstance(again.mid.attentions[0].proj_out, QuantizedLayer)
    assert again.mid.attentions[0].proj_in.weight_format == 4
    settings = json.loads((tmp_path / "unet" / "config.json").read_text())["quantization_config"]
    assert settings["exceptions"] == {
        "4": ["mid_block.attentions.0.proj_in"], "none": ["mid_block.attentions.0.proj_out"]
    }  # fmt: skip
    tensors, name = load_file(tmp_path / "unet" / UNET_FILE), "mid_block.attentions.0.proj_in.weight"
    assert [tensors[name + end].dtype for end in ("", "_scale", "_lowest")] == [
        torch.uint8, torch.float32, torch.float32,
    ]  # fmt: skip


def test_a_plain_float8_checkpoint_stays_in_its_bytes(tmp_path: Path) -> None:
    """As others write it: values in float8 without scales. It comes back exactly, and is saved in float8."""
    tensors = load_file(EMBEDDED / "unet" / UNET_FILE)
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "config.json").write_text((EMBEDDED / "unet" / "config.json").read_text())
    small = {name: t.to(torch.float8_e4m3fn) if t.ndim > 1 else t for name, t in tensors.items()}
    save_file(small, tmp_path / "unet" / UNET_FILE)
    whole = checkpoint.load_component(tmp_path, "unet")
    unet = load_component(tmp_path, "unet", "fp8")
    for path, layer in unet.named_modules():
        if isinstance(layer, QuantizedLayer):
            assert torch.equal(layer.weight, whole.get_parameter(f"{path}.weight")), path
    save_component(unet, tmp_path / "out", "unet")
    saved = load_file(tmp_path / "out" / "unet" / UNET_FILE)
    assert saved["mid_block.resnets.0.conv1.weight"].dtype == torch.float8_e4m3fn
    assert same(load_component(tmp_path / "out", "unet"), unet)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    save_component(load_component(EMBEDDED, "unet", 8), folder, "unet")
    return folder


def test_what_does_not_fit_is_refused_by_name(saved: Path) -> None:
    config, weights = saved / "unet" / "config.json", saved / "unet" / UNET_FILE
    public, tensors = json.loads(config.read_text()), load_file(weights)
    name = "mid_block.attentions.0.proj_in.weight"
    scale = f"{name}_scale"
    settings = public["quantization_config"]
    cases: list[tuple[dict[str, Any], dict[str, Tensor], str]] = [
        (settings | {"quant_method": "gguf"}, {}, "quant_method is 'gguf', only 'kolors_core' is read here"),
        (settings | {"bits": 8}, {}, "the field 'bits' is unknown"),
        (settings | {"group": "64"}, {}, "quantization_config: group must be a multiple of 2"),
        (settings | {"format": "int3"}, {}, "a weight's format is 4, 8, .* got 'int3'"),
        (settings | {"format": 4}, {}, "do not fit config.json: .*_lowest"),
        (settings | {"format": "fp8"}, {}, "do not fit config.json: .*weight_scale"),
        (settings | {"exceptions": {"none": ["conv_in"]}}, {}, "'conv_in' is no layer"),
        (settings | {"exceptions": {"4": ["nothing"]}}, {}, "'nothing' is no layer"),
        (settings | {"exceptions": {"int3": []}}, {}, "exceptions must be lists of layers by none, 4, 8"),
        (settings, {name: tensors[name].float()}, f"{name} holds torch.float32, expected torch.int8"),
        (settings, {scale: tensors[scale].int()}, f"{scale} holds torch.int32, expected floats of 2 bytes"),
        (settings, {name: tensors[name][:-1].contiguous()}, r"1 misshapen: mid_block.*proj_in.weight is \["),
        (settings, {"other": torch.ones(1)}, "1 unexpected: other"),
    ]  # fmt: skip
    for changed, others, message in cases:
        config.write_text(json.dumps(public | {"quantization_config": changed}))
        save_file(tensors | others, weights)
        with pytest.raises(ValueError, match=message):
            load_component(saved, "unet")
    config.write_text(json.dumps(public))
    save_file({each: t for each, t in tensors.items() if each != scale}, weights)
    with pytest.raises(ValueError, match=f"1 missing: {scale}"):
        load_component(saved, "unet")
    save_file(tensors, weights)
    with pytest.raises(ValueError, match=f"{UNET_FILE}: quantized to 8 already, and cannot be to 4"):
        load_component(saved, "unet", 4)
    with pytest.raises(ValueError, match="its weights are quantized: load it by KolorsPipeline.from_pre"):
        checkpoint.load_component(saved, "unet")
    with pytest.raises(ValueError, match="quantization_config is .* expected no such field"):
        checkpoint.load_modified(saved, "unet", UNet, {})
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    with pytest.raises(ValueError, match=f"{UNET_FILE}: not a whole safetensors file"):
        load_component(saved, "unet")
    weights.write_bytes(whole)


def test_a_saved_pipeline_is_replaced_and_nothing_else(tmp_path: Path) -> None:
    """Also by the one that was loaded from it, whose weights are mapped from its files."""
    PlainPipeline.from_pretrained(quantization={"unet": 8}).save_pretrained(tmp_path)
    pipe = PlainPipeline.from_pretrained(tmp_path)
    before = {name: tensor.clone() for name, tensor in pipe.unet.state_dict().items()}
    pipe.save_pretrained(tmp_path)
    again = PlainPipeline.from_pretrained(tmp_path).unet
    assert same(pipe.unet, again) and all(torch.equal(before[n], t) for n, t in again.state_dict().items())
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=re.escape(str(tmp_path))):
        pipe.save_pretrained(tmp_path)
    assert same(PlainPipeline.from_pretrained(tmp_path).unet, pipe.unet)


def test_the_reference_refuses_it_too(saved: Path) -> None:
    from diffusers import UNet2DConditionModel

    with pytest.raises(ValueError, match="Unknown quantization type, got kolors_core"):
        UNet2DConditionModel.from_pretrained(saved, subfolder="unet")


def test_quantization_names_models_that_are_read() -> None:
    unet = checkpoint.load_component(EMBEDDED, "unet")
    with pytest.raises(ValueError, match="quantization has no effect on the unet: it is not read from files"):
        KolorsPipeline.from_pretrained(unet=unet, quantization={"unet": 8})
    with pytest.raises(ValueError, match="quantization names 'vae'; expected text_encoder or unet"):
        KolorsPipeline.from_pretrained(quantization={"vae": 8})
    with pytest.raises(TypeError, match="quantization must be a mapping such as {'unet': 8}, got 'fp8'"):
        KolorsPipeline.from_pretrained(quantization="fp8")  # type: ignore[arg-type]
    seen = list[tuple[str, int, int]]()
    pipe = KolorsPipeline.from_pretrained(quantization={"unet": 8}, progress=lambda *now: seen.append(now))
    assert is_quantized(pipe.unet) and seen[-1] == ("unet", len(seen), len(seen))


def test_the_command_line_measures_only_on_request(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ["--height", "64", "--width", "64", "--steps", "1", "--seed", "0", "--device", "cpu"]
    outs = [tmp_path / "one.png", tmp_path / "two.png"]
    for out, flags in zip(outs, ([], ["--report"]), strict=True):
        assert main(["cat", "-o", str(out), *small, "--unet-bits", "fp8", *flags]) == 0
        shown = capsys.readouterr().err
        assert "quantizing unet" in shown and ("quantized: unet fp8" in shown) == bool(flags)
    facts = [read_metadata(out) for out in outs]
    assert [facts[0]["bits"], facts[1]["bits"]] == ['{"unet": "fp8"}'] * 2
    assert "quantized" not in facts[0] and facts[1]["quantized"].startswith("unet fp8, 29.6 -> ")
    assert facts[0]["fingerprint"] == facts[1]["fingerprint"]
    with pytest.raises(SystemExit):
        main(["cat", *small, "--unet-bits", "fp9"])
    assert "fp9" in capsys.readouterr().err
    assert main(["cat", "-o", str(tmp_path / "no.png"), "-q", "--report", *small]) == 2
    assert "--report has no effect without --unet-bits" in capsys.readouterr().err

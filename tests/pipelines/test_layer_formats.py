"""Each layer's format, chosen by its own error while a pipeline is quantized."""

import copy
import re
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kolors_core import KolorsPipeline
from kolors_core.performance.quantize import QuantizedLayer, QuantizedLinear, is_quantized, quantizable_layers
from kolors_core.pipelines.quantization_report import MORE_EXACT, quantize

SIXTEEN, MOST = "mid.attentions.0.blocks.0.self_attention.to_v", 0.02


@pytest.fixture
def pipe() -> KolorsPipeline:
    return KolorsPipeline.from_pretrained("tiny")


def formats_of(model: nn.Module) -> dict[str, Any]:
    return {
        path: layer.weight_format
        for path, layer in model.named_modules()
        if isinstance(layer, QuantizedLayer)
    }


def test_a_layer_with_too_large_an_error_gets_the_next_format(pipe: KolorsPipeline) -> None:
    """4 bits are right for weights of 16 values, and for others off by more; each format is the first."""
    with torch.no_grad():
        weight = pipe.unet.get_parameter(f"{SIXTEEN}.weight")
        weight.copy_(torch.randint(0, 16, weight.shape, generator=torch.Generator().manual_seed(0)))
        weight[:, ::16], weight[:, 1::16] = 0, 15
        weight.mul_(2**-6).sub_(2**-3)
    plain, seen = copy.deepcopy(pipe.unet), dict[str, tuple[Tensor, Tensor]]()
    paths = quantizable_layers(pipe.unet, 4)

    def keep(path: str, _: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        seen.setdefault(path, (inputs[0], output))

    handles = [pipe.unet.get_submodule(path).register_forward_hook(partial(keep, path)) for path in paths]
    told = list[tuple[str, int, int]]()
    report = quantize(pipe, unet=4, layer_error=MOST, progress=lambda *now: told.append(now))
    for handle in handles:
        handle.remove()

    def error(path: str, weight_format: int) -> float:
        layer, (x, output) = plain.get_submodule(path), seen[path]
        got = F.linear(x, QuantizedLinear(layer, weight_format).weight, layer.bias)  # type: ignore[arg-type]
        return ((got - output).norm() / output.norm()).item()

    expected = {path: next((one for one in (4, 8) if error(path, one) <= MOST), None) for path in paths}
    assert formats_of(pipe.unet) == {path: one for path, one in expected.items() if one is not None}
    assert expected[SIXTEEN] == 4 and {4, 8} <= {*expected.values()}
    assert report.unet is not None and report.unet.layers == 84
    assert report.unet.others == {path: one for path, one in expected.items() if one != 4}
    assert re.search(r"unet int4 \(.*\d+ int8.* of 84 layers\), 29.6 -> ", str(report))
    assert [one for one in told if one[0] == "measured"] == [("measured", i, 4) for i in range(1, 5)]
    made = len(formats_of(pipe.unet))
    assert ("unet", made, made) in told


def test_no_error_is_allowed_and_any(pipe: KolorsPipeline) -> None:
    report = quantize(pipe, text_encoder="w8a8", layer_error=0)
    assert not is_quantized(pipe.text_encoder) and report.latents.error == 0  # type: ignore[arg-type]
    assert report.text_encoder is not None and set(report.text_encoder.others.values()) == {None}
    assert report.text_encoder.bytes_before == report.text_encoder.bytes_after
    report = quantize(pipe, text_encoder="w8a8-fp8", layer_error=1e9)
    assert report.text_encoder is not None and report.text_encoder.others == {}
    assert str(report).startswith("text_encoder w8a8-fp8, ") and 0.001 < report.tokens.error < 0.2
    with pytest.raises(ValueError, match="layer_error must be"):
        quantize(pipe, unet=8, layer_error=-0.1)
    assert all(one not in (None, MORE_EXACT[one]) for one in MORE_EXACT)

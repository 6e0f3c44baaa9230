"""Float8 weights, and products of rounded weights with rounded inputs: as their arithmetic is written out."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kolors_core.adapters.lora import add_adapter, attach
from kolors_core.adapters.lora_layers import LoRAReadOnlyConv2d, LoRAReadOnlyLinear, LoRAWeights
from kolors_core.performance.quantize import (
    QuantizedConv2d,
    QuantizedLayer,
    QuantizedLinear,
    decode_e4m3,
    quantize,
    quantize_rows,
)
from kolors_core.unet import UNet
from tests.support.small import SHALLOW, randomise, relative_error

E4M3 = torch.float8_e4m3fn
PRODUCTS = {"w8a8": torch.int8, "w8a8-fp8": E4M3, "w8a8-fp8-fast": E4M3}


def linear(width: int, outputs: int = 48, dtype: torch.dtype = torch.float32) -> nn.Linear:
    """Random weights, of very different size from row to row."""
    layer = nn.Linear(width, outputs)
    randomise(layer)
    with torch.no_grad():
        layer.weight *= torch.logspace(-2, 1, outputs)[:, None]
    return layer.to(dtype)


def rows(width: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Inputs [2, 11, width] whose rows differ in size; one is zero."""
    x = torch.randn(2, 11, width, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return (x * torch.logspace(-3, 2, 11)[:, None] * (torch.arange(11) != 4)[:, None]).to(dtype)


def written_out(x: Tensor, plain: nn.Linear, kind: torch.dtype) -> Tensor:
    """The product in float64: each row of x, and of the weight as stored, in its own whole steps."""
    most = 127 if kind == torch.int8 else 448
    x, weight, found = x.double(), plain.weight.detach().double(), []
    sizes = x.abs().amax(-1, keepdim=True) / most
    steps = torch.where(sizes == 0, 1, sizes)
    weight_sizes = weight.abs().amax(1, keepdim=True) / most
    if kind == torch.int8:
        weight_steps = weight_sizes.float().bfloat16().double()
        found = [(x / steps).round() * steps, (weight / weight_steps).round().clamp(-127, 127) * weight_steps]
    else:
        weight_steps = 2 ** weight_sizes.log2().ceil()
        found = [
            (each / step).float().to(E4M3).double() * step
            for each, step in ((x, steps), (weight, weight_steps))
        ]
    bias = None if plain.bias is None else plain.bias.detach().double()
    return F.linear(found[0], found[1], bias)


@pytest.mark.numerical
def test_every_float8_is_decoded() -> None:
    bits = torch.arange(256, dtype=torch.uint8)
    is_number = bits % 128 < 127
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        assert torch.equal(decode_e4m3(bits, dtype)[is_number], bits.view(E4M3).to(dtype)[is_number])
    assert torch.equal(bits, torch.arange(256, dtype=torch.uint8)), "the bits themselves are kept"


@pytest.mark.numerical
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", [nn.Linear, nn.Conv2d])
def test_float8_weights_have_four_bits_and_scales_are_powers_of_two(kind: Any, dtype: torch.dtype) -> None:
    plain = linear(72, dtype=dtype) if kind is nn.Linear else nn.Conv2d(8, 48, 3).to(dtype)
    layer = (QuantizedLinear if kind is nn.Linear else QuantizedConv2d)(plain, "fp8")
    weight = plain.weight.detach().double()
    assert layer.weight.dtype == dtype and layer.weight.shape == plain.weight.shape
    assert layer.quantized.dtype == torch.uint8 and layer.scale.shape == (48, *[1] * (weight.ndim - 1))
    scale = layer.scale.double()
    largest = weight.flatten(1).abs().amax(1) / scale.flatten()
    assert torch.equal(scale.log2(), scale.log2().round())
    assert (largest <= 448).all() and (largest > 224).all()
    lost = (layer.weight.double() - weight).abs()
    assert (lost <= torch.maximum(weight.abs() / 16, scale * 2.0**-10)).all()
    assert (lost > weight.abs() / 20).any(), "as coarse as it says"
    layer.to(torch.bfloat16).to(dtype)
    assert torch.equal(layer.scale.double(), scale) and layer.quantized.dtype == torch.uint8


@pytest.mark.numerical
def test_weights_that_are_float8_already_are_kept_exactly() -> None:
    """Of any row, the smallest numbers too, and 448; so a float8 checkpoint loses nothing."""
    bits = torch.randint(0, 256, (40, 96), generator=torch.Generator().manual_seed(2), dtype=torch.uint8)
    bits = torch.where(bits % 128 == 127, 126, bits)
    bits[0], bits[1] = 126, bits[1] % 8
    plain = nn.Linear(96, 40)
    plain.weight.data = bits.view(E4M3).float()
    for dtype in (torch.float32, torch.float16):
        assert torch.equal(QuantizedLinear(plain.to(dtype), "fp8").weight, bits.view(E4M3).to(dtype))


def test_not_a_number_is_not_hidden() -> None:
    for weight_format in ("fp8", *PRODUCTS):
        for value in (float("nan"), float("inf")):
            plain, x = linear(32), rows(32)
            x[0, 3, 5] = value
            got = QuantizedLinear(plain, weight_format)(x)
            assert not got[0, 3].isfinite().any() and got[1].isfinite().all()
            plain.weight.data[3, 5] = value
            got = QuantizedLinear(plain, weight_format)(rows(32))[..., 3]
            assert not got[rows(32).any(-1)].isfinite().any()


@pytest.mark.numerical
@pytest.mark.parametrize("weight_format", PRODUCTS)
@pytest.mark.parametrize("width", [96, 31])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_products_are_the_written_out_arithmetic(weight_format: str, width: int, dtype: torch.dtype) -> None:
    """By torch's kernels, and for widths and a dtype that these do not take without them."""
    plain, x = linear(width, dtype=dtype), rows(width, dtype)
    got, wanted = QuantizedLinear(plain, weight_format)(x), written_out(x, plain, PRODUCTS[weight_format])
    assert got.dtype == dtype and got.shape == (2, 11, 48)
    bound = {torch.float64: 1e-6, torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 6e-4}[dtype]
    assert relative_error(got, wanted) < bound
    exact = F.linear(x.double(), plain.weight.double(), plain.bias.double())
    assert 2e-3 < relative_error(got, exact) < 0.08, "the rounding itself"


def test_rows_are_rounded_each_by_itself() -> None:
    x = torch.tensor([[127.0, -3.4, 0.6], [0.0, 0.0, 0.0], [-0.5, 0.25, 0.0]])
    q, scale = quantize_rows(x, torch.int8)
    assert q.tolist() == [[127, -3, 1], [0, 0, 0], [-127, 64, 0]]
    assert torch.allclose(scale, torch.tensor([[1.0], [0.0], [0.5 / 127]]))
    q, scale = quantize_rows(x, E4M3)
    assert q.float().tolist()[2] == [-448, 224, 0] and scale[0].item() == pytest.approx(127 / 448)


@pytest.mark.numerical
@pytest.mark.parametrize("weight_format", PRODUCTS)
def test_gradients_are_those_of_the_dequantized_weight(weight_format: str) -> None:
    layer, x = QuantizedLinear(linear(32), weight_format), rows(32).requires_grad_()
    layer(x).sum().backward()
    assert x.grad is not None
    assert torch.allclose(x.grad, layer.weight.sum(0).expand_as(x))
    with torch.no_grad():
        assert not torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))


def test_products_compile_without_a_break() -> None:
    for weight_format in ("fp8", *PRODUCTS):
        layer, x = QuantizedLinear(linear(32), weight_format), rows(32)
        compiled = torch.compile(layer, backend="eager", fullgraph=True)
        assert torch.equal(compiled(x), layer(x))


@pytest.mark.numerical
def test_loras_leave_the_product_as_it_is() -> None:
    """Low rank beside it, at strength 0 bit for bit; on convolutions too; a DoRA needs the weight."""
    model = nn.Sequential(nn.Conv2d(4, 16, 3, padding=1), nn.Flatten(2), linear(64))
    model[0], model[2] = QuantizedConv2d(model[0], "fp8"), QuantizedLinear(model[2], "w8a8")
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        before, plain = model(x), model[2]
        adapter = attach(model, rank=2, targets=("2",))
        factors = {"down": torch.zeros(2, 4, 3, 3), "up": torch.zeros(16, 2, 1, 1)}
        beside = add_adapter(model, "beside", {"0": LoRAWeights(factors, 1.0)})
        assert type(model[0]) is LoRAReadOnlyConv2d and type(model[2]) is LoRAReadOnlyLinear
        assert torch.equal(model(x), before)
        for i, parameter in enumerate([*adapter.parameters(), *beside.parameters()]):
            nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(i))
        down, up = beside.parameters()
        image = F.conv2d(F.conv2d(x, down, padding=1), up)
        conv = F.conv2d(x, model[0].weight, model[0].bias, padding=1)
        assert torch.allclose(model[0](x), conv + image, atol=1e-5) and image.abs().max() > 0.1
        part, h = model[2].parts()["default"], model[0](x).flatten(2)
        delta = part.effective_scale * part.scale * F.linear(F.linear(h, part.down), part.up)
        assert torch.allclose(model(x), plain(h) + delta, atol=1e-5)
        part.magnitude = nn.Parameter(torch.linspace(0.5, 1.5, 48)[:, None])
        weight = plain.weight + part.delta_weight(plain.weight)
        assert torch.allclose(model(x), F.linear(h, weight, plain.bias), atol=1e-5)
    adapter.detach()
    beside.detach()
    assert model[2] is plain and type(model[0]) is QuantizedConv2d


@pytest.mark.numerical
def test_a_unet_in_float8_is_that_of_its_dequantized_weights() -> None:
    """All layers of its blocks are stored so, convolutions too; exceptions have the format that is said."""
    unet = UNet(SHALLOW.unet)
    randomise(unet)
    unet.double().eval()
    other = copy.deepcopy(unet)
    seen = list[tuple[int, int]]()
    exceptions = {"down.0.resnets.0.conv1": None, "mid.attentions.0.proj_in": "w8a8-fp8"}
    quantize(unet, "fp8", exceptions=exceptions, progress=lambda done, total: seen.append((done, total)))
    layers = {path: layer for path, layer in unet.named_modules() if isinstance(layer, QuantizedLayer)}
    assert seen == [(i + 1, len(layers)) for i in range(len(layers))]
    left = {path for path, layer in unet.named_modules() if type(layer) in (nn.Linear, nn.Conv2d)}
    assert {path.partition(".")[0] for path in left - {"down.0.resnets.0.conv1"}} == {
        "add_embedding", "conv_in", "conv_out", "text_proj", "time_embedding",
    }  # fmt: skip
    assert layers["mid.attentions.0.proj_in"].weight_format == "w8a8-fp8"
    for path, layer in layers.items():
        other.get_parameter(f"{path}.weight").data = layer.weight
    draw = torch.Generator().manual_seed(1)
    shapes = (1, 4, 8, 8), (1, 5, SHALLOW.unet.text_dim), (1, SHALLOW.unet.text_dim)
    latents, tokens, pooled = (torch.randn(s, generator=draw, dtype=torch.float64) for s in shapes)
    inputs = latents, torch.tensor(500), tokens, pooled, torch.full((1, 6), 64.0)
    layers["mid.attentions.0.proj_in"].weight_format = "fp8"
    with torch.no_grad():
        assert relative_error(unet(*inputs), other(*inputs)) < 1e-12
    with pytest.raises(ValueError, match="exceptions: 'conv_in' is no layer that 'fp8' quantizes"):
        quantize(other, "fp8", exceptions={"conv_in": None})
    with pytest.raises(ValueError, match="a weight's format is .*, got 'w8'"):
        quantize(other, "fp8", exceptions={"mid.attentions.0.proj_in": "w8"})
    with pytest.raises(ValueError, match="conv1 is a convolution: expected 'fp8' or None, got 8"):
        quantize(other, "fp8", exceptions={"down.0.resnets.0.conv1": 8})
    assert not any(isinstance(layer, QuantizedLayer) for layer in other.modules())

"""Weights in 8 and 4 bits: packed exactly, errors bounded, and whatever reads a weight still works."""

import copy
import pickle
import weakref
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kolors_core import KolorsPipeline
from kolors_core.adapters.lora import LoRAAdapter, attach, fuse
from kolors_core.adapters.lora_layers import LoRAReadOnlyLinear
from kolors_core.chatglm import ChatGLM
from kolors_core.checkpoint import save_component
from kolors_core.config import ChatGLMConfig, UNetConfig
from kolors_core.loading import load
from kolors_core.performance.quantize import (
    Format,
    QuantizedLayer,
    QuantizedLinear,
    is_quantized,
    model_bytes,
    quantize,
)
from kolors_core.tokenizer import Tokenizer
from kolors_core.unet import UNet
from tests.support.parity import assert_parity
from tests.support.small import SMALL, randomise
from weights_convert.safetensors_files import Tensors

GIB = 2**30
WIDE = replace(SMALL.unet, channels=(32, 64, 128), size_dim=16, norm_groups=32)  # fewer errors than in SMALL


def linear(width: int = 192, seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Linear:
    """Random weights, of very different size from row to row."""
    layer = nn.Linear(width, 40)
    randomise(layer, seed)
    with torch.no_grad():
        layer.weight *= torch.logspace(-2, 1, 40)[:, None]
    return layer.to(dtype)


@cache
def whole_unet() -> UNet:
    unet = UNet(WIDE)
    randomise(unet)
    return unet.double().eval()


def small_unet() -> UNet:
    """A copy of its own of one random UNet."""
    return copy.deepcopy(whole_unet())


def dequantized(model: nn.Module) -> nn.Module:
    """A copy in which plain linear layers have the quantised ones' weights."""
    made = copy.deepcopy(model)
    for path, layer in list(made.named_modules()):
        if isinstance(layer, QuantizedLinear):
            other = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
            other.weight, other.bias = nn.Parameter(layer.weight), layer.bias
            parent, _, name = path.rpartition(".")
            setattr(made.get_submodule(parent), name, other)
    return made


def predict(unet: nn.Module) -> Tensor:
    draw = torch.Generator().manual_seed(1)
    dtype = next(unet.parameters()).dtype
    sizes = ((2, 4, 16, 12), (2, 7, SMALL.unet.text_dim), (2, SMALL.unet.text_dim))
    latents, tokens, pooled = (
        torch.randn(size, generator=draw, dtype=torch.float64).to(dtype) for size in sizes
    )
    return unet(latents, torch.tensor(500), tokens, pooled, torch.full((2, 6), 128.0))


@pytest.mark.numerical
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [192, 96, 48, 24])
@pytest.mark.parametrize("bits", [8, 4])
def test_a_weight_comes_back_to_half_a_step(bits: int, width: int, dtype: torch.dtype) -> None:
    plain = linear(width, dtype=dtype)
    layer = QuantizedLinear(plain, bits)
    assert layer.weight.shape == plain.weight.shape and layer.weight.dtype == dtype
    group = width if bits == 8 else {192: 64, 96: 32, 48: 16, 24: 8}[width]
    assert layer.scale.shape == ((40, 1) if bits == 8 else (40, width // group, 1))
    step = layer.scale.flatten(1).repeat_interleave(group, dim=1).double()
    lost = (layer.weight.double() - plain.weight.double()).abs()
    rounding = 2 * torch.finfo(dtype).eps * plain.weight.double().abs().amax(1, keepdim=True)
    assert (lost <= 0.5 * step + rounding).all()
    assert (lost > 0.4 * step).any(), "as coarse as it says"
    steps = {8: 127, 4: 15}[bits]
    span = plain.weight.double().unflatten(1, (-1, group))
    span = span.abs().amax(-1) if bits == 8 else span.amax(-1) - span.amin(-1)
    wanted = (span / steps).repeat_interleave(group, dim=1)
    assert ((step / wanted - 1).abs() < 0.03).all(), "no coarser than the weights need"


@pytest.mark.numerical
def test_eight_bits_are_rows_of_127_steps() -> None:
    plain = nn.Linear(4, 3, bias=False)
    plain.weight.data = torch.tensor([[-127.0, 126, 0.4, -0.6], [0, 0, 0, 0], [0.25, -1.0, 127 / 128, 0]])
    layer = QuantizedLinear(plain, 8)
    assert layer.quantized.tolist() == [[-127, 126, 0, -1], [0, 0, 0, 0], [32, -127, 126, 0]]
    assert layer.scale.tolist()[:2] == [[1.0], [1.0]] and layer.lowest is None
    assert layer.scale[2].item() == pytest.approx(1 / 127, rel=2**-8)


@pytest.mark.numerical
def test_four_bits_are_packed_exactly() -> None:
    """Every one of 16 values in every place of its byte; negative ones, and groups where all are equal."""
    generator = torch.Generator().manual_seed(0)
    q = torch.stack([torch.randperm(64, generator=generator) % 16 for _ in range(6)]).reshape(2, 192)
    lowest = torch.tensor([[-7.0, 0.5, -16.0], [3.0, -0.25, 1.0]]).repeat_interleave(64, dim=1)
    step = torch.tensor([[1.0, 0.125, 2.0], [0.25, 0.5, 0.0]]).repeat_interleave(64, dim=1)
    plain = nn.Linear(192, 2)
    plain.weight.data = q * step + lowest
    layer = QuantizedLinear(plain, 4)
    assert torch.equal(layer.weight, plain.weight) and (plain.weight < 0).sum() > 60
    assert layer.quantized.dtype == torch.uint8 and layer.quantized.shape == (2, 3, 32)
    low, high = layer.quantized[0, 0] % 16, layer.quantized[0, 0] // 16
    assert torch.equal(torch.cat([low, high]).long(), q[0, :64])


@pytest.mark.numerical
@pytest.mark.parametrize("bits", [8, 4])
def test_dtypes_change_as_the_models(bits: int) -> None:
    """Numbers stay whole, and scales are the same after bfloat16, so that a detour costs nothing."""
    layer = QuantizedLinear(linear(), bits)
    before = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    layer.to(torch.bfloat16)
    assert layer.weight.dtype == layer.scale.dtype == torch.bfloat16
    assert layer.quantized.dtype == before["quantized"].dtype
    assert layer(torch.ones(1, 192, dtype=torch.bfloat16)).dtype == torch.bfloat16
    layer.float()
    assert all(torch.equal(buffer, before[name]) for name, buffer in layer.named_buffers())
    assert f"format={bits}" in repr(layer)


def test_not_a_number_is_not_hidden() -> None:
    for bits in (8, 4):
        plain = linear()
        plain.weight.data[3, 5] = float("nan")
        assert QuantizedLinear(plain, bits).weight[3].isnan().any()


@pytest.mark.numerical
@pytest.mark.parametrize("bits", [8, 4])
def test_a_unet_is_that_of_its_dequantised_weights(bits: int) -> None:
    """What is quantized are the transformers' linear layers, all of them and no other."""
    unet = small_unet()
    whole = predict(unet)
    places = [path for path, layer in unet.named_modules() if isinstance(layer, nn.Linear)]
    quantize(unet, bits)
    assert [path for path in places if ".attentions." in path] == [
        path for path, layer in unet.named_modules() if isinstance(layer, QuantizedLinear)
    ]
    assert_parity(predict(unet), predict(dequantized(unet)), 1e-12)
    error = ((predict(unet) - whole).norm() / whole.norm()).item()
    assert {8: 0.001, 4: 0.02}[bits] < error < {8: 0.01, 4: 0.15}[bits]


@pytest.mark.numerical
@pytest.mark.parametrize("bits", [8, 4])
def test_a_chatglm_is_that_of_its_dequantised_weights(bits: int, small_tokenizer: Path) -> None:
    model = ChatGLM(SMALL.text_encoder)
    randomise(model)
    model.double()
    tokens = Tokenizer(small_tokenizer)(["一张瓢虫的照片", "cat"], 24)
    whole = model(tokens)
    linears = sum(isinstance(layer, nn.Linear) for layer in model.modules())
    quantize(model, bits)
    assert sum(isinstance(layer, QuantizedLinear) for layer in model.modules()) == linears == 12
    got, wanted = model(tokens), dequantized(model)(tokens)
    assert_parity(got.tokens, wanted.tokens, 1e-12)
    assert_parity(got.pooled, wanted.pooled, 1e-12)
    cosine = F.cosine_similarity(got.tokens, whole.tokens, dim=-1).min().item()
    assert {8: 0.9995, 4: 0.9}[bits] < cosine < 1 - 1e-6


@pytest.mark.numerical
def test_layer_by_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """No second whole model in memory: a layer is gone before the next but one is read."""
    unet, alive = small_unet(), []
    made = QuantizedLinear.__init__

    def watch(self: QuantizedLinear, layer: nn.Linear, bits: Format, group: int) -> None:
        alive.append(weakref.ref(layer.weight))
        assert sum(ref() is not None for ref in alive) <= 2
        made(self, layer, bits, group)

    monkeypatch.setattr(QuantizedLinear, "__init__", watch)
    quantize(unet, 8)
    assert len(alive) > 50 and sum(ref() is not None for ref in alive) == 0


def test_bytes_of_the_released_model() -> None:
    """On the meta device, in float16: GiB of ChatGLM and UNet whole, in 8 and in 4 bits."""
    kinds = {"text_encoder": (ChatGLM, ChatGLMConfig()), "unet": (UNet, UNetConfig())}
    formats: tuple[tuple[Format, float], ...] = ((8, 0.5), (4, 0.28125), ("fp8", 0.5))
    found = {}
    for name, (kind, config) in kinds.items():
        for bits, share in formats:
            with torch.device("meta"):
                model = kind(config).half()
            found[name, None] = round(model_bytes(model) / GIB, 2)
            quantize(model, bits)
            found[name, bits] = round(model_bytes(model) / GIB, 2)
            layers = [layer for layer in model.modules() if isinstance(layer, QuantizedLayer)]
            held = sum(buffer.nbytes for layer in layers for buffer in layer.buffers())
            whole = sum(2 * layer.weight.numel() for layer in layers)
            assert held / whole == pytest.approx(share, abs=0.001)
    assert found == {
        ("text_encoder", None): 11.13, ("text_encoder", 8): 5.82, ("text_encoder", 4): 3.49,
        ("text_encoder", "fp8"): 5.82, ("unet", None): 4.80, ("unet", 8): 2.75, ("unet", 4): 1.85,
        ("unet", "fp8"): 2.42,
    }  # fmt: skip


@pytest.mark.numerical
@pytest.mark.parametrize("bits", [8, 4])
def test_a_state_dict_comes_back(bits: int, tmp_path: Path) -> None:
    """Into a model on the meta device that is quantized there; the full weights are never needed."""
    unet = small_unet()
    quantize(unet, bits)
    names = {name.rpartition(".")[2] for name in unet.state_dict() if "attentions.0.proj_in" in name}
    assert names == {"quantized", "scale", "bias"} | ({"lowest"} if bits == 4 else set())
    torch.save(unet.state_dict(), tmp_path / "unet.pt")
    with torch.device("meta"):
        other = UNet(WIDE)
    quantize(other, bits)
    other.load_state_dict(torch.load(tmp_path / "unet.pt", weights_only=True), assign=True)
    assert torch.equal(predict(other), predict(unet))
    with pytest.raises(RuntimeError, match="quantized"):
        small_unet().load_state_dict(unet.state_dict())


def test_it_compiles_without_a_break() -> None:
    for bits in (8, 4):
        layer, x = QuantizedLinear(linear(), bits), torch.randn(3, 192)
        compiled = torch.compile(layer, backend="eager", fullgraph=True)
        assert torch.equal(compiled(x), layer(x))


def test_what_cannot_be_quantised_is_refused_and_untouched() -> None:
    unet = small_unet()
    for bits in (0, 2, 16, True, "8", "int8", None):
        with pytest.raises(ValueError, match="a weight's format is 4, 8, 'fp8', .* or 'w8a8-fp8-fast', got"):
            quantize(unet, bits)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="group must be a multiple of 2 from 0 to"):
        quantize(unet, 4, group=3)
    adapter = attach(unet, rank=2, targets=("to_v",))
    with pytest.raises(
        ValueError, match="to_v is a LoRALinear, expected a plain nn.Linear: LoRAs are attached"
    ):
        quantize(unet, 8)
    adapter.detach()
    unet.mid.attentions[0].proj_out = nn.Linear(129, 128)
    with pytest.raises(ValueError, match="mid.attentions.0.proj_out is 129 wide, expected an even width"):
        quantize(unet, 4)
    with pytest.raises(ValueError, match="expected a ChatGLM or a UNet, got a Linear"):
        quantize(linear(), 8)
    assert not is_quantized(unet)
    quantize(unet, 8)
    with pytest.raises(ValueError, match="this UNet is quantized: cannot quantize it again"):
        quantize(unet, 4)


def test_neither_saved_nor_loaded_as_if_it_were_whole(tmp_path: Path) -> None:
    pipe = KolorsPipeline.from_pretrained()
    whole = {name: tensor.clone() for name, tensor in pipe.unet.state_dict().items()}
    quantize(pipe.unet, 8)
    wanted = "this UNet2DConditionModel is quantized: cannot save the unet for the reference"
    with pytest.raises(ValueError, match=wanted):
        pipe.save_single_file(tmp_path / "saved.safetensors")
    with pytest.raises(ValueError, match=wanted):
        save_component(pipe.unet, tmp_path, "unet")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="is quantized: cannot load whole weights into it"):
        load(pipe.unet, Tensors(whole, "whole weights"), "unet")


def with_lora(unet: UNet) -> LoRAAdapter:
    adapter = attach(unet, rank=2)
    for i, parameter in enumerate(adapter.parameters()):
        nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(i))
    return adapter


@pytest.mark.numerical
@pytest.mark.parametrize("bits", [8, 4])
def test_loras_act_and_train_on_quantised_weights(bits: int) -> None:
    """QLoRA: output and gradients are those of the dequantised weights with the same LoRA, DoRA too."""
    unet = small_unet()
    quantize(unet, bits)
    before, state = predict(unet), {n: t.clone() for n, t in unet.state_dict().items()}
    layers = [module for module in unet.modules() if isinstance(module, QuantizedLinear)]
    other = dequantized(unet)
    assert isinstance(other, UNet)
    adapters = [with_lora(model) for model in (unet, other)]
    for adapter in adapters:
        part = adapter.parts()["mid.attentions.0.blocks.0.self_attention.to_q"]
        part.magnitude = nn.Parameter(torch.linspace(0.5, 1.5, 128)[:, None])
    outputs = [predict(model) for model in (unet, other)]
    assert_parity(outputs[0], outputs[1], 1e-12)
    assert (outputs[0] - before).abs().max() > 0.1
    for output in outputs:
        output.square().mean().backward()
    for mine, reference in zip(adapters[0].parameters(), adapters[1].parameters(), strict=True):
        assert mine.grad is not None and reference.grad is not None
        assert_parity(mine.grad, reference.grad, 1e-10)
    unet.float().double()  # a move with the adapter on reaches the layers below it
    adapters[0].detach()
    after = [module for module in unet.modules() if isinstance(module, QuantizedLinear)]
    assert len(layers) == len(after) and all(a is b for a, b in zip(layers, after, strict=True))
    assert all(torch.equal(tensor, state[name].float().double()) for name, tensor in unet.state_dict().items()
               if tensor.is_floating_point())  # fmt: skip
    assert all(torch.equal(t, state[n]) for n, t in unet.state_dict().items() if n.endswith("quantized"))


def test_a_copy_with_a_lora_reads_its_own_quantised_weight() -> None:
    """By `deepcopy` and by pickle: the weight is made of the copy's buffers, not of the original's."""
    layer = QuantizedLinear(linear(), 8)
    model = nn.Sequential(layer)
    attach(model, rank=2, targets=("0",))
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(copied[0].weight, layer.weight)
        copied[0].quantized.zero_()
        assert not copied[0].weight.any() and layer.weight.any()
        copied.double()
        assert copied[0].weight.dtype == torch.float64


def test_loras_are_not_fused_into_quantised_weights() -> None:
    """Nor into the other model, where both are asked for."""
    pipe = KolorsPipeline.from_pretrained()
    assert pipe.text_encoder is not None
    quantize(pipe.text_encoder, 8)
    with_lora(pipe.unet)
    attach(pipe.text_encoder, rank=2, targets=("to_qkv",))
    layer = pipe.text_encoder.layers[0].get_submodule("attention.to_qkv")
    assert type(layer) is LoRAReadOnlyLinear and is_quantized(layer)
    with pytest.raises(ValueError, match="this ChatGLMModel is quantized: cannot fuse default"):
        pipe.fuse_lora()
    assert pipe.num_fused_loras == 0
    with pytest.raises(ValueError, match="cannot fuse default: the layer's weight is quantized"):
        fuse(pipe.text_encoder, ["default"])
    assert layer.fused == ()
    pipe.fuse_lora(components=["unet"])
    pipe.unload_lora_weights()
    assert type(pipe.text_encoder.layers[0].get_submodule("attention.to_qkv")) is QuantizedLinear
    assert not is_quantized(pipe.unet)

"""Queries, keys and values in one product: the same images up to rounding, and three products when needed."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from kolors_core.adapters import lora
from kolors_core.checkpoint import load_component, save_component
from kolors_core.context import Context
from kolors_core.inspection.attention_maps import record_attention
from kolors_core.performance.compile import compile_blocks
from kolors_core.performance.fuse_projections import (
    FusedAttention,
    fuse_projections,
    joint_weight,
    unfuse_projections,
)
from kolors_core.performance.quantize import quantize
from kolors_core.unet import Attention, UNet
from tests.support.offloads import offloaded
from tests.support.pipelines import Pair, steps_of
from tests.support.small import EXACT, SHALLOW, SMALL, randomise, relative_error
from tests.test_unet import inputs


def unet_pair(config: Any = SHALLOW) -> tuple[UNet, UNet]:
    """A plain UNet in float64, and a copy with fused projections."""
    plain = UNet(config.unet).double().eval()
    randomise(plain)
    fused = copy.deepcopy(plain)
    fuse_projections(fused)
    return plain, fused


def attentions(unet: UNet) -> list[FusedAttention]:
    return [module for module in unet.modules() if isinstance(module, FusedAttention)]


@torch.no_grad()
def fused_count(unet: UNet) -> int:
    return sum(joint_weight(attention) is not None for attention in attentions(unet))


GIVEN = inputs(2, 6, 7, torch.float64)


@torch.no_grad()
def test_one_product_reads_the_three_layers_own_weights() -> None:
    plain, fused = unet_pair(SMALL)
    count = len(attentions(fused))
    found = [name for name, _ in plain.named_modules() if name.endswith("self_attention")]
    assert count == fused_count(fused) == len(found)
    assert relative_error(fused(**GIVEN), plain(**GIVEN)) < EXACT
    attention = attentions(fused)[0]
    weight, width = joint_weight(attention), attention.to_q.out_features
    assert weight is not None and weight.data_ptr() == attention.to_q.weight.data_ptr()
    assert torch.equal(weight[width : 2 * width], attention.to_k.weight)
    memory = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in fused.parameters()}
    assert sum(memory.values()) == sum(p.nbytes for p in fused.parameters())
    for model in (plain, fused):
        model.mid.attentions[0].blocks[0].self_attention.to_k.weight.mul_(1.5)  # pyright: ignore
    assert relative_error(fused(**GIVEN), plain(**GIVEN)) < EXACT
    pattern = "mid*self_attention"
    with record_attention(plain, pattern) as one, record_attention(fused, pattern) as two:
        plain(**GIVEN)
        fused(**GIVEN)
    for name in one:
        assert relative_error(two[name], one[name]) < EXACT
    rows = [0, 1] + [0] * (count - 2)
    assert relative_error(fused(**GIVEN, perturbed=rows), plain(**GIVEN, perturbed=rows)) < EXACT
    unfuse_projections(fused)
    assert torch.equal(fused(**GIVEN), plain(**GIVEN)) and not attentions(fused)
    assert all(p.untyped_storage().nbytes() == p.nbytes for p in fused.parameters())


@torch.no_grad()
def test_adapters_quantized_layers_hooks_and_the_compiler_address_the_three() -> None:
    plain, fused = unet_pair()
    count = len(attentions(fused))

    def same() -> int:
        """The number of attentions with one product; the result is the plain model's."""
        assert relative_error(fused(**GIVEN), plain(**GIVEN)) < EXACT
        return fused_count(fused)

    adapters = [lora.attach(model, rank=2) for model in (plain, fused)]
    for mine, other in zip(*(adapter.parameters() for adapter in adapters), strict=True):
        mine.copy_(torch.randn(mine.shape, generator=torch.Generator().manual_seed(mine.numel())))
        other.copy_(mine)
    assert same() == 0
    for model, adapter in zip((plain, fused), adapters, strict=True):
        lora.fuse(model, [adapter.name])
    assert same() == 0
    for model, adapter in zip((plain, fused), adapters, strict=True):
        lora.unfuse(model)
        adapter.detach()
    assert same() == count
    hook = attentions(fused)[0].to_v.register_forward_hook(lambda _module, _given, result: 2 * result)
    assert fused_count(fused) == count - 1 and relative_error(fused(**GIVEN), plain(**GIVEN)) > 1e-3
    hook.remove()
    block: Any = fused.mid.attentions[0].blocks[0]  # pyright: ignore
    x, context = torch.randn(1, 5, 32).double(), Context(torch.randn(1, 3, 48).double())
    eager = block(x, context)
    compile_blocks(block, backend="eager")
    assert relative_error(block(x, context), eager) < EXACT
    block._compiled_call_impl = None
    torch.compiler.reset()
    for model in (plain, fused):
        quantize(model, 8)
    assert same() == 0
    with pytest.raises(
        ValueError, match="this UNet must .* joined, got layers of QuantizedLinear on cpu: fuse"
    ):
        fuse_projections(fused)


def test_gradients_reach_the_three() -> None:
    plain, fused = unet_pair()
    for model in (plain, fused):
        model(**GIVEN).sum().backward()
    for mine, other in zip(fused.parameters(), plain.parameters(), strict=True):
        assert (mine.grad is None) == (other.grad is None)
        assert mine.grad is None or relative_error(mine.grad, other.grad) < EXACT


@torch.no_grad()
def test_copies_files_and_moves(tmp_path: Path) -> None:
    """A moved model stays fused, a copy has three products until it is; files have all three."""
    plain, fused = unet_pair()
    count = len(attentions(fused))
    again = copy.deepcopy(fused)
    assert fused_count(again) == 0 and relative_error(again(**GIVEN), plain(**GIVEN)) < EXACT
    again.float().double()
    assert fused_count(again) == count
    attention = attentions(again)[0]
    layers = attention.to_q, attention.to_v, attention.to_k  # of one file, in another order
    for layer, part in zip(layers, torch.cat([layer.weight for layer in layers]).chunk(3), strict=True):
        layer.weight.data = part
    assert fused_count(again) == count - 1
    save_component(fused, tmp_path, "unet")
    loaded = load_component(tmp_path, "unet", dtype=torch.float64)
    assert isinstance(loaded, UNet) and torch.equal(loaded(**GIVEN), plain(**GIVEN))
    got = {"none of the library's own class$": torch.nn.Linear(2, 2),
           "layers of Linear on meta: fuse": UNet(SHALLOW.unet).to("meta")}  # fmt: skip
    for what, nothing in got.items():
        with pytest.raises(ValueError, match=f"must have self-attentions .*, got {what}"):
            fuse_projections(nothing)
    mine = UNet(SHALLOW.unet)
    mine.mid.attentions[0].blocks[0].self_attention = type("Mine", (Attention,), {})(64, 64, 4)  # pyright: ignore
    fuse_projections(mine)
    assert len(attentions(mine)) == count - 1


def test_a_pipeline_is_fused_and_its_runs_under_offload_are_not(pipes: Pair) -> None:
    ours = pipes[0]
    arguments = {"prompt": "a cat", "num_inference_steps": 2, "height": 32, "width": 40}
    plain = steps_of(ours, **arguments)

    def same() -> int:
        for mine, other in zip(steps_of(ours, **arguments), plain, strict=True):
            assert relative_error(mine, other) < EXACT
        return fused_count(ours.unet)

    ours.fuse_qkv_projections()
    count = len(attentions(ours.unet))
    assert same() == count > 0
    with offloaded(ours):
        same()
        ours._enter_stage("unet")
        assert fused_count(ours.unet) == 0
    assert same() == count
    ours.unfuse_qkv_projections()
    assert all(torch.equal(a, b) for a, b in zip(steps_of(ours, **arguments), plain, strict=True))

"""Low-rank adapters: the written-out formula, a file that the reference loads, and no trace left."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from kolors_core.lora import TEXT_TARGETS, Adapter, LoRALinear, attach, save_adapters
from tests.parity import FLOAT32, pair, relative_error
from tests.pipelines import Pair, steps_of, use_solver
from tests.test_unet import inputs


def trained(model: torch.nn.Module) -> Adapter:
    """An adapter with random weights, as training would leave it."""
    adapter = attach(model, rank=3, alpha=6.0)
    generator = torch.Generator().manual_seed(5)
    for parameter in adapter.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    return adapter


def test_a_layer_is_the_written_out_formula() -> None:
    base = torch.nn.Linear(7, 5)
    layer = LoRALinear(base, rank=2, alpha=4.0)
    x = torch.randn(3, 7)
    assert torch.equal(layer(x), base(x)), "it starts at zero"
    layer.lora_up.data.normal_()
    merged = base.weight + 2.0 * layer.lora_up @ layer.lora_down
    assert relative_error(layer(x), F.linear(x, merged, base.bias)) < FLOAT32
    assert layer.weight is base.weight and set(layer.state_dict()) == {
        "weight",
        "bias",
        "lora_down",
        "lora_up",
    }


def test_it_attaches_scales_and_leaves_without_a_trace() -> None:
    unet, _ = pair("unet", torch.float32)
    given = inputs(1, 8, 8, torch.float32)
    keys, modules = list(unet.state_dict()), [type(module) for module in unet.modules()]
    with torch.no_grad():
        before = unet(**given)
        adapter = trained(unet)
        assert [key for key in unet.state_dict() if ".lora_" not in key] == keys
        assert len(adapter.layers) == 17 * 2 * 4  # transformer blocks, attentions in each, projections
        attached = unet(**given)
        adapter.set_scale(0.0)
        assert relative_error(unet(**given), before) == 0.0
        adapter.set_scale(1.0)
        assert torch.equal(unet(**given), attached)
        adapter.detach()
        assert torch.equal(unet(**given), before)
    assert relative_error(attached, before) > 1e-3
    assert list(unet.state_dict()) == keys and [type(module) for module in unet.modules()] == modules


def test_the_reference_loads_the_file_and_draws_the_same(float32: Pair, tmp_path: Path) -> None:
    ours, theirs = float32
    use_solver(float32, "EulerDiscreteScheduler", {})
    adapter = trained(ours.unet)
    save_adapters({"unet": adapter}, tmp_path / "lora.safetensors")
    theirs.load_lora_weights(str(tmp_path / "lora.safetensors"))
    try:
        mine, other = (steps_of(pipe, prompt="cat", num_inference_steps=2) for pipe in (ours, theirs))
        assert relative_error(mine[0], other[0]) < FLOAT32
    finally:
        adapter.detach()
        theirs.unload_lora_weights()
    assert relative_error(steps_of(ours, prompt="cat", num_inference_steps=2)[0], mine[0]) > 1e-3


def test_text_encoders_take_adapters_too() -> None:
    text, _ = pair("text_encoder", torch.float32)
    adapter = attach(text, rank=2, targets=TEXT_TARGETS)
    names = list(adapter.public_state("text_encoder"))
    assert names[0] == "text_encoder.encoder.layers.0.self_attention.query_key_value.lora_A.weight"
    adapter.detach()


def test_nothing_to_adapt_is_an_error() -> None:
    with pytest.raises(ValueError, match="no linear layer of this Linear is named to_q or to_k"):
        attach(torch.nn.Linear(2, 2), rank=1)
    with pytest.raises(ValueError, match="rank must be at least 1, got 0"):
        attach(torch.nn.Linear(2, 2), rank=0)

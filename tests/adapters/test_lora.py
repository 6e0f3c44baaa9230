"""Low-rank adapters: the written-out formula, several at once, fused and not, and no trace left."""

import copy
from pathlib import Path

import pytest
import torch
from diffusers.loaders.unet_loader_utils import _maybe_expand_lora_scales
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from kolors_core.adapters.block_scales import BlockScale, block_scales
from kolors_core.adapters.ip_adapter import ImageCrossAttention
from kolors_core.adapters.lora import (
    TEXT_TARGETS,
    LoRAAdapter,
    adapters,
    add_adapter,
    attach,
    enable,
    fuse,
    save_adapters,
    supported_layers,
    unfuse,
    unload,
)
from kolors_core.adapters.lora_layers import LoRAConv2d, LoRALinear, LoRAWeights
from kolors_core.context import Context
from kolors_core.unet import UNet
from tests.support.parity import pair, reference_unet
from tests.support.pipelines import WEAK, Pair, steps_of, use_solver
from tests.support.small import EXACT, FLOAT32, SMALL, randomise, relative_error
from tests.test_unet import inputs
from weights_convert import TABLES

pytestmark = pytest.mark.numerical


def trained(model: nn.Module, name: str = "default", seed: int = 5) -> LoRAAdapter:
    """An adapter with random weights, as training would leave it."""
    adapter = attach(model, rank=3, alpha=6.0, name=name)
    generator = torch.Generator().manual_seed(seed)
    for parameter in adapter.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    return adapter


@pytest.fixture(scope="module")
def random_unet() -> UNet:
    model = UNet(SMALL.unet).double().eval()
    randomise(model)
    return model


@pytest.fixture
def unet(random_unet: UNet) -> UNet:
    """A small UNet of random weights, in float64."""
    return copy.deepcopy(random_unet)


@torch.no_grad()
def run(unet: UNet) -> Tensor:
    return unet(**inputs(1, 8, 8, unet.conv_in.weight.dtype))


def part(layer: nn.Module, magnitude: tuple[int, ...] | None = None, scale: float = 2.0) -> LoRAWeights:
    """Random factors of rank 2 for a linear layer or a convolution, and DoRA's magnitude of this shape."""
    generator = torch.Generator().manual_seed(9)
    out, *rest = layer.weight.shape
    shapes = {"down": (2, *rest), "up": (out, 2, *(1 for _ in rest[1:]))}
    if magnitude is not None:
        shapes["magnitude"] = magnitude
    tensors = {
        name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()
    }
    return LoRAWeights(tensors, scale)


LAYERS = {
    "linear": (nn.Linear(7, 5), (3, 7)),
    "linear without bias": (nn.Linear(7, 5, bias=False), (3, 7)),
    "convolution": (nn.Conv2d(4, 6, 3, stride=2, padding=1), (2, 4, 9, 8)),
    "1x1 convolution": (nn.Conv2d(4, 6, 1), (2, 4, 5, 5)),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_a_layer_is_the_written_out_formula(kind: str) -> None:
    base, shape = LAYERS[kind]
    base = copy.deepcopy(base).double()
    layer = LoRALinear(base) if isinstance(base, nn.Linear) else LoRAConv2d(base)
    assert layer.weight is base.weight and set(layer.state_dict()) == set(base.state_dict())
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert torch.equal(layer(x), base(x))
    layer.lora["one"] = part(base)
    factors = layer.parts()["one"]
    assert factors.up is not None and factors.down is not None
    changed = copy.deepcopy(base)
    changed.weight.data += 2.0 * torch.einsum("or, ri... -> oi...", factors.up.flatten(1), factors.down)
    assert relative_error(layer(x), changed(x)) < EXACT
    assert set(layer.state_dict()) == set(base.state_dict()) | {"lora.one.down", "lora.one.up"}
    factors.strength = 0.0
    assert torch.equal(layer(x), base(x))


def test_a_bias_is_fused_as_the_weight_is_also_within_a_scaled_run() -> None:
    base = copy.deepcopy(LAYERS["linear"][0]).double()
    layer, x = LoRALinear(base), torch.ones(3, 7, dtype=torch.float64)
    layer.lora["one"] = LoRAWeights({"bias": torch.ones(5).double(), "delta": torch.ones(5, 7).double()}, 1.0)
    layer.parts()["one"].call_scale = 0.25
    expected = layer(x)
    layer.fuse(["one"], 1.0)
    assert relative_error(layer(x), expected) < EXACT


@pytest.mark.parametrize(("kind", "magnitude", "norm"), [
    ("linear", (5, 1), (1,)), ("linear", (1, 7), (0,)),
    ("convolution", (6, 1, 1, 1), (1, 2, 3)), ("convolution", (1, 4, 1, 1), (0, 2, 3)),
])  # fmt: skip
def test_dora_is_the_written_out_formula(
    kind: str, magnitude: tuple[int, ...], norm: tuple[int, ...]
) -> None:
    base, shape = LAYERS[kind]
    base = copy.deepcopy(base).double()
    layer = LoRALinear(base) if isinstance(base, nn.Linear) else LoRAConv2d(base)
    layer.lora["one"] = part(base, magnitude)
    one = layer.parts()["one"]
    assert one.up is not None and one.down is not None and one.magnitude is not None
    one.strength = 0.6
    turned = base.weight + 1.2 * torch.einsum("or, ri... -> oi...", one.up.flatten(1), one.down)
    changed = copy.deepcopy(base)
    changed.weight.data = one.magnitude * turned / turned.square().sum(norm, keepdim=True).sqrt()
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert relative_error(layer(x), changed(x)) < EXACT


@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_dora_s_output_and_gradients_are_peft_s(kind: str) -> None:
    """The norm takes no gradient there, and none here."""
    base, shape = LAYERS[kind]
    base = copy.deepcopy(base).double()
    layer = LoRALinear(base) if isinstance(base, nn.Linear) else LoRAConv2d(base)
    layer.lora["one"] = part(base, (len(base.weight), *(1 for _ in base.weight[0].shape)))
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["0"], use_dora=True)
    theirs = get_peft_model(nn.Sequential(copy.deepcopy(base)), config).double()
    names = {"down": "lora_A.default.weight", "up": "lora_B.default.weight",
             "magnitude": "lora_magnitude_vector.default.weight"}  # fmt: skip
    found = {
        role: parameter
        for name, parameter in theirs.named_parameters()
        for role, end in names.items()
        if name.endswith(end)
    }
    for role, parameter in layer.parts()["one"].named_parameters():
        found[role].data = parameter.detach().reshape(found[role].shape).clone()
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    mine, other = layer(x), theirs(x)
    assert relative_error(mine, other) < EXACT
    for output in (mine, other):
        output.square().sum().backward()
    for role, parameter in layer.parts()["one"].named_parameters():
        assert parameter.grad is not None and found[role].grad is not None
        assert relative_error(parameter.grad, found[role].grad.reshape(parameter.shape)) < EXACT


def test_a_new_dora_changes_nothing_until_its_norms_are_trained(unet: UNet) -> None:
    before, weight = run(unet), unet.get_submodule("mid.attentions.0.blocks.0.self_attention.to_q").weight
    adapter = attach(unet.requires_grad_(False), rank=2, dora=True)
    assert relative_error(run(unet), before) < FLOAT32
    one = adapter.parts()["mid.attentions.0.blocks.0.self_attention.to_q"]
    assert one.magnitude is not None and one.magnitude.requires_grad
    assert relative_error(one.magnitude.double(), weight.square().sum(1, keepdim=True).sqrt()) < FLOAT32
    unet(**inputs(1, 8, 8, torch.float64)).square().mean().backward()
    moved = {name for name, p in one.named_parameters() if p.grad is not None and p.grad.any()}
    assert moved == {"up", "magnitude"}
    saved = [name for name in adapter.public_state("unet") if name.endswith("lora_magnitude_vector")]
    assert len(saved) == len(adapter.layers)
    adapter.detach()
    assert relative_error(run(unet), before) == 0.0


def test_it_attaches_scales_and_leaves_without_a_trace(unet: UNet) -> None:
    keys, modules = list(unet.state_dict()), [(type(m), id(m)) for m in unet.modules()]
    before = run(unet)
    adapter = trained(unet)
    assert [key for key in unet.state_dict() if ".lora." not in key] == keys
    assert len(adapter.layers) == 17 * 2 * 4  # transformer blocks, attentions in each, projections
    attached = run(unet)
    adapter.set_scale(0.0)
    assert relative_error(run(unet), before) == 0.0
    adapter.set_scale(1.0)
    assert torch.equal(run(unet), attached)
    adapter.detach()
    assert torch.equal(run(unet), before)
    assert relative_error(attached, before) > 1e-3
    assert list(unet.state_dict()) == keys and [(type(m), id(m)) for m in unet.modules()] == modules


def test_several_adapters_add_up(unet: UNet) -> None:
    one, two = trained(unet, "one", 5), trained(unet, "two", 6)
    assert list(adapters(unet)) == ["one", "two"]
    one.set_scale(0.5)
    both = run(unet)
    deltas = [(adapter.parts(), scale) for adapter, scale in ((one, 1.0), (two, 2.0))]  # alpha / rank is 2
    unload(unet)
    for parts, scale in deltas:
        for path, factors in parts.items():
            assert factors.up is not None and factors.down is not None
            delta = scale * factors.up.detach().double() @ factors.down.detach().double()
            unet.get_submodule(path).weight.data += delta
    assert relative_error(run(unet), both) < EXACT


def test_adapters_switch_and_leave_one_by_one(unet: UNet) -> None:
    before = run(unet)
    one, two = trained(unet, "one", 5), trained(unet, "two", 6)
    two.set_active(False)
    alone = run(unet)
    two.detach()
    assert torch.equal(run(unet), alone) and not torch.equal(alone, before)
    enable(unet, False)
    assert torch.equal(run(unet), before) and one.is_active
    enable(unet, True)
    assert torch.equal(run(unet), alone)
    one.detach()
    assert torch.equal(run(unet), before) and not any(isinstance(m, LoRALinear) for m in unet.modules())


def test_a_stale_handle_takes_nothing_out(unet: UNet) -> None:
    stale = attach(unet, rank=2)
    unload(unet)
    other = attach(unet, rank=2)
    stale.detach()
    assert list(adapters(unet)) == ["default"]
    other.detach()


def test_a_sum_that_is_not_finite_is_not_fused(unet: UNet) -> None:
    adapter, before = attach(unet, rank=2), {name: t.clone() for name, t in unet.state_dict().items()}
    next(iter(adapter.parts().values())).scale = float("inf")
    with pytest.raises(ValueError, match="fused with default, .*to_q is not finite: nothing is fused"):
        fuse(unet, ["default"])
    after = unet.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)
    adapter.detach()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fusing_is_undone_bit_for_bit(unet: UNet, dtype: torch.dtype) -> None:
    unet.to(dtype)
    base = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    one, two = trained(unet, "one", 5), trained(unet, "two", 6)
    one.set_scale(0.7)
    attached = run(unet)
    fuse(unet, ["one", "two"])
    assert relative_error(run(unet), attached) < (FLOAT32 if dtype == torch.float32 else 0.05)
    path, factors = next(iter(one.parts().items()))
    other = two.parts()[path]
    wanted = base[f"{path}.weight"].double()
    for f, scale in ((factors, 1.4), (other, 2.0)):
        assert f.up is not None and f.down is not None
        wanted = wanted + scale * f.up.double() @ f.down.double()
    got = unet.get_submodule(path).weight
    if dtype == torch.float32:
        assert relative_error(got, wanted) < FLOAT32
    else:
        assert (got == wanted.to(dtype)).float().mean() > 0.99, "the sum is rounded once"
    for wish in (
        lambda: fuse(unet, ["one"]), lambda: one.set_scale(1.0), lambda: two.detach(),
        lambda: two.set_active(False), lambda: attach(unet, 1, name="three"), lambda: enable(unet, False),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="while one, two is fused: unfuse first"):
            wish()
    unfuse(unet)
    assert all(torch.equal(tensor, base[name]) for name, tensor in unet.state_dict().items() if name in base)
    assert torch.equal(run(unet), attached)
    fuse(unet, ["two"], factor=0.5)
    half = run(unet)
    unload(unet)
    assert torch.equal(run(unet), half), "what is fused stays when adapters are unloaded"
    assert list(unet.state_dict()) == list(base)


def test_the_reference_loads_the_file_and_draws_the_same(float32: Pair, tmp_path: Path) -> None:
    ours, theirs = float32
    use_solver(float32, "EulerDiscreteScheduler", {})
    adapter = trained(ours.unet)
    save_adapters({"unet": adapter}, tmp_path / "lora.safetensors")
    theirs.load_lora_weights(str(tmp_path / "lora.safetensors"))
    try:
        given = {"prompt": "cat", "num_inference_steps": 2, "guidance_scale": WEAK}
        mine, other = (steps_of(pipe, **given) for pipe in (ours, theirs))
        assert relative_error(mine[0], other[0]) < FLOAT32
    finally:
        adapter.detach()
        theirs.unload_lora_weights()
    assert relative_error(steps_of(ours, **given)[0], mine[0]) > 1e-3


def test_text_encoders_take_adapters_too() -> None:
    text, _ = pair("text_encoder", torch.float32)
    adapter = attach(text, rank=2, targets=TEXT_TARGETS)
    names = list(adapter.public_state("text_encoder"))
    assert names[0] == "text_encoder.encoder.layers.0.self_attention.query_key_value.lora_A.weight"
    with pytest.raises(ValueError, match="a ChatGLM has no blocks: its scale is a number, got {'down': 1}"):
        adapter.set_scale({"down": 1})
    adapter.detach()


def test_adapted_layers_keep_hooks_mode_and_new_weights(unet: UNet) -> None:
    calls = []
    layer = unet.mid.attentions[0].blocks[0].self_attention.to_q
    layer.register_forward_hook(lambda *_: calls.append(1))
    adapter = trained(unet)
    run(unet)
    attention = unet.mid.attentions[0].blocks[0].self_attention
    attention.to_q.weight = weight = nn.Parameter(torch.zeros_like(layer.weight))
    unet.train()
    adapter.detach()
    run(unet)
    assert len(calls) == 2
    assert attention.to_q is layer and layer.weight is weight and layer.training


def test_an_ip_adapter_s_branches_are_not_adapted(unet: UNet) -> None:
    unet.mid.attentions[0].blocks[0].cross_attention.image_branches.append(ImageCrossAttention(64, 48))
    adapter = attach(unet, rank=1)
    assert len(adapter.layers) == 17 * 2 * 4
    assert not any("image_branches" in path for path in supported_layers(unet))


def test_it_compiles_without_a_graph_break(unet: UNet) -> None:
    adapter = trained(unet)
    block = unet.mid.attentions[0].blocks[0].self_attention
    x = torch.randn(1, 4, 64, dtype=torch.float64)
    compiled = torch.compile(block, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x, Context(x)), block(x, Context(x)))
    adapter.detach()


@pytest.mark.exact
def test_nothing_to_adapt_and_bad_names_are_errors(unet: UNet) -> None:
    with pytest.raises(ValueError, match="no linear layer of this Linear is named to_q or to_k"):
        attach(nn.Linear(2, 2), rank=1)
    with pytest.raises(ValueError, match="rank must be a positive whole number, got 0"):
        attach(unet, rank=0)
    for name in ("", " ", "a\nb", "\x1b[31m", "\u202e", "x" * 201):
        with pytest.raises(ValueError, match="an adapter's name must be some printable text"):
            attach(unet, rank=1, name=name)
    adapter = trained(unet)
    with pytest.raises(ValueError, match="an adapter named 'default' is attached already"):
        add_adapter(unet, "default", {})
    with pytest.raises(ValueError, match="must be a number, got 'much'"):
        adapter.set_scale("much")


# Scales by blocks.

SCALES: list[BlockScale] = [
    0.3,
    {"down": 0.5, "mid": 2.0, "up": {"block_0": [0.0, 1.0, 0.25], "block_1": 3.0}},
    {"up": {"block_1": [0.5]}},
    {"mid": [0.5], "down": {"block_2": [1.0, 0.0]}},
    {"up": [0.1, 0.2, 0.3]},
    {},
]


@pytest.mark.parametrize("default", [1.0, 0.0])
@pytest.mark.parametrize("scale", SCALES, ids=str)
def test_block_scales_are_the_reference_s(unet: UNet, scale: BlockScale, default: float) -> None:
    with torch.device("meta"):
        theirs = reference_unet(SMALL.unet)
    expanded = _maybe_expand_lora_scales(theirs, [scale], default)[0]
    mine = block_scales(scale, unet, default)
    assert len(mine) == 2 + 2 + 1 + 3 + 3
    for path, value in mine.items():
        public = TABLES["unet"].to_public(path)
        assert value == (expanded[public] if isinstance(expanded, dict) else scale)


def test_a_scale_may_be_a_list_for_each_picture(unet: UNet) -> None:
    assert set(map(tuple, block_scales([0.2, 0.8], unet, 0.0).values())) == {(0.2, 0.8)}
    mine = block_scales({"down": {"block_1": [[0.2, 0.8], [1.0, 0.0]]}}, unet, 0.0)
    assert (mine["down.1.attentions.1"], mine["mid.attentions.0"]) == ([1.0, 0.0], 0.0)


@pytest.mark.parametrize(("scale", "fault"), [
    ({"left": 1.0}, "no transformers in left, it has them in down, mid, up"),
    ({"down": {"block_9": 1.0}}, "in down.block_9, it has them in down.block_1, down.block_2"),
    ({"up": {"block_0": [1.0, 2.0]}}, r"up.block_0 has 3 transformers and takes one scale or 3, got"),
    ({"mid": [1.0, 2.0]}, "mid has 1 transformers and takes one scale or 1"),
    ({"mid": {"block_0": 1.0}}, "mid: a scale must be a number"),
    ("half", "the scale: a scale must be a number, got 'half'"),
    (True, "the scale: a scale must be a number, got True"),
])  # fmt: skip
@pytest.mark.exact
def test_scales_of_blocks_that_are_not_there(unet: UNet, scale: BlockScale, fault: str) -> None:
    with pytest.raises(ValueError, match=fault):
        block_scales(scale, unet, 1.0)

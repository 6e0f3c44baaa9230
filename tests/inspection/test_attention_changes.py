"""Changed attention maps: the changed map times the values, in self- and cross-attention, precomputed or not,
beside image prompts and perturbed rows; a function that changes nothing changes no bit, and nothing stays."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kolors_core import KolorsPipeline, record_attention
from kolors_core.adapters.ip_adapter import IPAdapter, attach
from kolors_core.attention import split_heads
from kolors_core.conditioning import Conditioning
from kolors_core.context import Context, ImagePrompt, KnownOutput
from kolors_core.guidance import guided
from kolors_core.inspection.attention_changes import inject_attention
from kolors_core.inspection.attention_maps import softmax
from kolors_core.performance.compile import compile_blocks
from kolors_core.schedulers import EulerDiscreteScheduler
from kolors_core.unet import Attention, UNet
from tests.support.ip_adapters import adapter_config
from tests.support.small import EXACT, SHALLOW, randomise, relative_error

pytestmark = pytest.mark.numerical
CROSS = "down.1.attentions.0.blocks.0.cross_attention"
SELF = "down.1.attentions.0.blocks.0.self_attention"
EXAMPLE = Path(__file__).parents[1] / "examples" / "models" / "prompt_to_prompt.py"


@pytest.fixture(scope="module")
def unet() -> UNet:
    net = UNet(SHALLOW.unet)
    randomise(net)
    return net.double().eval().requires_grad_(False)


def conditions(**more: Any) -> tuple[Conditioning, Conditioning]:
    draw = torch.Generator().manual_seed(2)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    counts = torch.tensor([[3.0, 1, 1, 1]])
    halves = [Conditioning(normal(1, 4, 64), normal(1, 64), torch.ones(1, 6), counts, **more) for _ in (0, 1)]
    return halves[0], halves[1]


def run(unet: UNet, precompute: bool = True, **more: Any) -> Tensor:
    """Three guided steps."""
    schedule = EulerDiscreteScheduler().schedule(3)
    denoise = guided(unet, schedule, *conditions(**more), 3.0, precompute=precompute)
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for sigma in schedule.sigmas[:-1].tolist():
        x = denoise(x, sigma) + 0.1 * x
    return x


def flat(maps: Tensor, step: int) -> Tensor:
    return torch.full_like(maps, 1 / maps.shape[-1])


@pytest.mark.parametrize("precompute", [True, False])
def test_what_changes_nothing_changes_no_bit_and_nothing_stays(unet: UNet, precompute: bool) -> None:
    expected, seen = run(unet, precompute), list[tuple[int, tuple[int, ...]]]()

    def look(maps: Tensor, step: int) -> Tensor:
        assert (maps.sum(-1) - 1).abs().max() < EXACT
        seen.append((step, tuple(maps.shape)))
        return maps

    with inject_attention(unet, {CROSS: look}, steps=(0, 2)):
        assert torch.equal(run(unet, precompute), expected)
    assert seen == [(0, (2, 4, 16, 4)), (2, (2, 4, 16, 4))]
    with inject_attention(unet, {"*attention": flat}):
        assert relative_error(run(unet, precompute), expected) > 1e-3
    assert torch.equal(run(unet, precompute), expected)
    for module in unet.modules():
        assert not module._forward_pre_hooks and not getattr(module, "observers", ())


@pytest.mark.parametrize("name", [CROSS, SELF])
def test_the_result_is_the_changed_map_times_the_values(name: str, unet: UNet) -> None:
    """Written out on one layer, with two functions whose changes add up, and with perturbed rows."""
    layer, draw = unet.get_submodule(name), torch.Generator().manual_seed(0)
    assert isinstance(layer, Attention)
    x = torch.randn(2, 9, layer.to_q.in_features, generator=draw, dtype=torch.float64)
    tokens = x if name == SELF else torch.randn(2, 5, 48, generator=draw, dtype=torch.float64)
    bias = None if name == SELF else torch.randn(2, 1, 1, 5, generator=draw, dtype=torch.float64)
    context, perturbed = Context(tokens, bias), 1 if name == SELF else 0
    q, k, v = (
        split_heads(project(part), layer.heads)
        for project, part in ((layer.to_q, x), (layer.to_k, tokens), (layer.to_v, tokens))
    )
    maps = torch.stack([softmax(q[:, i], k[:, i], bias, perturbed) for i in range(layer.heads)], dim=1)
    wanted = layer.to_out(((0.5 * maps + flat(maps, 0) - maps) @ v).transpose(1, 2).flatten(2))
    changes: dict[str, Any] = {name: flat, name.replace("blocks.0", "blocks.[0]"): lambda maps, _: 0.5 * maps}
    with inject_attention(unet, changes):
        for given in (context, layer.project_kv(context)):
            assert relative_error(layer(x, given, perturbed), wanted) < EXACT
    assert relative_error(layer(x, context, perturbed), wanted) > 1e-3


def test_image_branches_keep_their_maps(unet: UNet) -> None:
    config = adapter_config(SHALLOW.unet)
    adapter = IPAdapter(config).double()
    randomise(adapter, 1)
    handle = attach(unet, adapter)
    image = ImagePrompt(torch.randn(1, 1, 3, 48, generator=torch.Generator().manual_seed(3)).double())
    try:
        expected = run(unet, image_prompts=(image,))
        with inject_attention(unet, {"*attention": lambda maps, step: maps}):
            assert torch.equal(run(unet, image_prompts=(image,)), expected)
        with record_attention(unet, f"{CROSS}.image_branches.0", [0]) as plain:
            run(unet, image_prompts=(image,))
        with (
            record_attention(unet, f"{CROSS}.image_branches.0", [0]) as maps,
            inject_attention(unet, {CROSS: flat}),
        ):
            assert relative_error(run(unet, image_prompts=(image,)), expected) > 1e-3
        assert torch.equal(maps[f"{CROSS}.image_branches.0"], plain[f"{CROSS}.image_branches.0"])
    finally:
        handle.detach()


def wrong(change: Any) -> Callable[[UNet], None]:
    def use(unet: UNet) -> None:
        with inject_attention(unet, {CROSS: change}):
            run(unet)

    return use


def unknown(unet: UNet) -> None:
    with inject_attention(unet, {"*.crossattention": flat}):
        pass


def too_late(unet: UNet) -> None:
    with inject_attention(unet, {CROSS: flat}, steps=[5]):
        run(unet)


def cached(unet: UNet) -> None:
    with inject_attention(unet, {CROSS: flat}):
        unet.get_submodule(CROSS)(torch.zeros(1, 4, 64).double(), KnownOutput(torch.zeros(1, 4, 64).double()))


def compiled(unet: UNet) -> None:
    net = UNet(SHALLOW.unet)
    compile_blocks(net, backend="eager")
    with inject_attention(net, {CROSS: flat}):
        pass


def not_a_unet(_: UNet) -> None:
    with inject_attention(torch.nn.Linear(2, 2), {"*": flat}):  # type: ignore[arg-type]
        pass


WRONG: dict[str, tuple[Callable[[UNet], None], str]] = {
    "a shape": (wrong(lambda maps, _: maps[:1]), r"step 0: expected a map \[2, 4, 16, 4\] .*got \[1,"),
    "a dtype": (wrong(lambda maps, step: maps.float()), "got .* of torch.float32"),
    "nothing": (wrong(lambda maps, step: None), "got NoneType"),
    "a tensor": (wrong(torch.zeros(1)), "expected functions by pattern"),
    "a pattern": (unknown, "no module is named '.*crossattention'"),
    "a step": (too_late, "step 5 never came"),
    "a cache": (cached, "has no map in this step: its output is of a cache"),
    "compiled": (compiled, "which is compiled"),
    "no UNet": (not_a_unet, "expected a UNet or a ControlNet, such as pipe.unet, got Linear"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_changed_is_an_error(case: str, unet: UNet) -> None:
    use, found = WRONG[case]
    with pytest.raises((ValueError, TypeError), match=found):
        use(unet)
    assert not any(module._forward_pre_hooks for module in unet.modules())


def test_prompt_to_prompt_takes_fifteen_lines_and_keeps_the_layout() -> None:
    """The edited image is nearer to the first than without, and the first is what it is alone."""
    text = EXAMPLE.read_text()
    code = [
        line
        for line in text.split('"""', 2)[2].splitlines()
        if line and not line.startswith(("from", "import"))
    ]
    assert len(code) <= 15
    names: dict[str, Any] = {}
    exec(compile(text, EXAMPLE.name, "exec"), names)
    pipe: KolorsPipeline = names["pipe"]
    prompts = ["a red apple", "a red ladybug"]
    plain = pipe(prompts, latents=names["noise"], num_inference_steps=6).images
    first, edited, before, without = (np.asarray(i).astype(int) for i in (*names["images"], *plain))
    assert (first == before).all()
    assert abs(edited - without).mean() > 4 and abs(edited - first).mean() < abs(without - first).mean() - 1

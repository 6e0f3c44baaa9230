"""Attention maps: the reference's and a softmax written out, in every way a step can run; the result is the
same to the bit, and nothing stays behind."""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kolors_core import KolorsPAGPipeline, KolorsPipeline, record_attention
from kolors_core.adapters import lora
from kolors_core.adapters.ip_adapter import IPAdapter, attach, attached
from kolors_core.adapters.lora_layers import LoRALayer
from kolors_core.conditioning import Conditioning
from kolors_core.context import ImagePrompt
from kolors_core.guidance import guided
from kolors_core.inspection.attention_maps import AttentionMaps
from kolors_core.performance.compile import compile_blocks
from kolors_core.performance.cuda_graphs import CUDAGraphCache
from kolors_core.schedulers import EulerDiscreteScheduler
from kolors_core.unet import Attention, UNet
from tests.performance.test_compile import Recorder
from tests.support.controlnets import net_pair
from tests.support.ip_adapters import Both, adapter_config, guided_steps
from tests.support.offloads import offloaded
from tests.support.parity import pair
from tests.support.pipelines import NO_SAVINGS, Pair, saving, steps_of
from tests.support.small import EXACT, FLOAT32, randomise, relative_error
from tests.test_unet import inputs, run_reference
from weights_convert import TABLES

pytestmark = pytest.mark.numerical

CROSS = "down.1.attentions.0.blocks.0.cross_attention"
SHORT: dict[str, Any] = {
    "prompt": "一只红猫", "negative_prompt": "x", "num_inference_steps": 3, "output_type": "latent",
}  # fmt: skip


@pytest.fixture(scope="module")
def unets() -> tuple[UNet, Any]:
    ours, theirs = pair("unet", torch.float64)
    assert isinstance(ours, UNet)
    return ours, theirs


@contextmanager
def reference_maps(unet: Any) -> Iterator[dict[str, list[Tensor]]]:
    """Within it the reference's attentions keep probabilities [B, heads, N, S] by our names, those of an
    IP-Adapter's first images under image_branches.0."""
    before, kept = dict(unet.attn_processors), dict[str, list[Tensor]]()

    class Keeping:
        def __init__(self, name: str, own: Any) -> None:
            layer = name.removesuffix(".processor")
            to_ours = TABLES["unet"].to_ours(f"{layer}.to_q.weight")
            self.name, self.own = to_ours.removesuffix(".to_q.weight"), own

        def keep(self, name: str, attn: Any, x: Tensor, k: Tensor) -> None:
            q, k = attn.head_to_batch_dim(attn.to_q(x)), attn.head_to_batch_dim(k)
            probabilities = attn.get_attention_scores(q, k).unflatten(0, (-1, attn.heads))
            kept.setdefault(name, []).append(probabilities)

        def __call__(
            self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Any, attention_mask: None
        ) -> Tensor:
            text = hidden_states if encoder_hidden_states is None else encoder_hidden_states
            if isinstance(text, tuple):
                text, (images, *_) = text
                k = self.own.to_k_ip[0](images.flatten(1, -2))
                self.keep(f"{self.name}.image_branches.0", attn, hidden_states, k)
            self.keep(self.name, attn, hidden_states, attn.to_k(text))
            return self.own(attn, hidden_states, encoder_hidden_states)

    unet.set_attn_processor({name: Keeping(name, own) for name, own in before.items()})
    try:
        yield kept
    finally:
        unet.set_attn_processor(before)


def rows_of(maps: Tensor) -> Tensor:
    """[..., h, w, S] -> [..., h * w, S]."""
    return maps.flatten(-3, -2)


def assert_nothing_stays(unet: nn.Module) -> None:
    for module in unet.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks
        assert not isinstance(module, Attention) or not module.observers


@pytest.mark.parametrize(("batch", "height", "width"), [(2, 9, 13), (1, 5, 16)])
@torch.no_grad()
def test_every_map_equals_the_reference(unets: tuple[UNet, Any], batch: int, height: int, width: int) -> None:
    ours, theirs = unets
    given = inputs(batch, height, width)
    plain = ours(**given)
    with record_attention(ours, "*attention", whole=True) as whole, record_attention(ours, "*") as mean:
        assert torch.equal(ours(**given), plain)
    with reference_maps(theirs) as wanted:
        run_reference(theirs, given)
    assert set(whole) == set(wanted) == set(mean) and len(whole) == 34
    for name, (other,) in wanted.items():
        assert relative_error(rows_of(whole[name][0]), other) < EXACT, name
        assert relative_error(rows_of(mean[name]), other.mean(1)) < EXACT, name
    assert whole[CROSS].shape == (1, batch, 4, (height + 1) // 2, (width + 1) // 2, 12)
    assert_nothing_stays(ours)
    layer = ours.get_submodule(CROSS)
    assert isinstance(layer, Attention)
    layer.to_k.weight.data[0, 0] += 1e-6
    with record_attention(ours, CROSS) as spoiled:
        ours(**given)
    layer.to_k.weight.data[0, 0] -= 1e-6
    assert relative_error(rows_of(spoiled[CROSS]), wanted[CROSS][0].mean(1)) > EXACT, "so little shows"


def weight_of(layer: nn.Module) -> Tensor:
    """With what its adapters add."""
    assert isinstance(layer, nn.Linear)
    parts = layer.parts().values() if isinstance(layer, LoRALayer) else ()
    return layer.weight + sum(part.delta_weight(layer.weight) for part in parts)


def written_out(module: Attention, x: Tensor, tokens: Tensor, to_k: nn.Module, counts: Tensor) -> Tensor:
    """[B, heads, N, S]; counts: [B, S], of equal tokens."""
    q, k = x @ weight_of(module.to_q).T, tokens @ weight_of(to_k).T
    q, k = (t.reshape(*t.shape[:2], module.heads, -1) for t in (q, k))
    scores = torch.einsum("bnhd, bshd -> bhns", q, k) / q.shape[-1] ** 0.5
    weights = torch.exp(scores - scores.amax(-1, keepdim=True)) * counts[:, None, None]
    return weights / weights.sum(-1, keepdim=True)


@torch.no_grad()
def test_every_map_is_the_softmax_written_out(unets: tuple[UNet, Any]) -> None:
    """With counted tokens, a LoRA, two IP-Adapters, one of them masked, and a perturbed row, all at once."""
    ours = deepcopy(unets[0])
    for seed in range(2):
        adapter = IPAdapter(adapter_config()).double()
        randomise(adapter, seed)
        attach(ours, adapter)
    attached(ours)[1].set_scale(0.0)
    generator = torch.Generator().manual_seed(2)
    for part in lora.attach(ours, rank=2).parts().values():
        assert part.up is not None
        part.up.normal_(generator=generator)
    pictures = [torch.randn(3, n, 5, 48, dtype=torch.float64, generator=generator) for n in (2, 1)]
    masks = torch.rand(1, 2, 16, 16, generator=generator)
    prompts = [ImagePrompt(pictures[0], masks), ImagePrompt(pictures[1])]
    counts = torch.ones(3, 12, dtype=torch.float64)
    counts[1:, 0], counts[0, 2] = 7.0, 0.0
    blocks = sum(isinstance(module, Attention) for module in ours.modules()) // 2
    given = {**inputs(3, 9, 7), "text_counts": counts, "image_prompts": prompts, "perturbed": [1] * blocks}
    seen: dict[str, tuple[Any, ...]] = {}
    names = {name: module for name, module in ours.named_modules() if isinstance(module, Attention)}
    hooks = [
        module.register_forward_pre_hook(lambda _module, args, name=name: seen.update({name: args}))
        for name, module in names.items()
    ]
    plain = ours(**given)
    for hook in hooks:
        hook.remove()
    with record_attention(ours, "*", whole=True) as maps:
        assert torch.equal(ours(**given), plain)
    text = given["text_tokens"] @ weight_of(ours.text_proj).T + ours.text_proj.bias
    ones = counts.new_ones(3, 1)
    for name, module in names.items():
        x, got = seen[name][0], rows_of(maps[name][0])
        if name.endswith("self_attention"):
            assert relative_error(got[:2], written_out(module, x, x, module.to_k, ones)[:2]) < EXACT
            assert torch.equal(got[2:], torch.eye(x.shape[1]).double().expand_as(got[2:]))
            continue
        assert relative_error(got, written_out(module, x, text, module.to_k, counts)) < EXACT
        assert relative_error(got, written_out(module, x, text, module.to_k, ones)) > 1e-3
        assert relative_error(got.sum(-1), torch.ones_like(got[..., 0])) < EXACT
        for i, tokens in enumerate(pictures):
            branch: Any = module.image_branches[i]
            parts = tokens.unbind(1) if i == 0 else [tokens.flatten(1, 2)]
            wanted = torch.cat([written_out(module, x, part, branch.to_k, ones) for part in parts], dim=-1)
            assert relative_error(rows_of(maps[f"{name}.image_branches.{i}"][0]), wanted) < EXACT
    assert len(maps) == 17 * 4
    assert_nothing_stays(ours)


def assert_maps_of_a_run(maps: AttentionMaps, wanted: dict[str, list[Tensor]], texts: list[int]) -> None:
    """Means over the reference's heads and steps 1 and 2. texts: tokens of each row; before them are pads."""
    for name, mine in maps.items():
        other = torch.stack(wanted[name][1:3]).mean((0, 2))  # [B, N, S]
        if name.endswith("cross_attention"):
            for row, count in enumerate(texts):
                got, full = rows_of(mine)[row], other[row]
                assert relative_error(got[:, -count:], full[:, -count:]) < FLOAT32, name
                pads = got.shape[-1] - count
                assert relative_error(got[:, :pads].sum(-1), full[:, :-count].sum(-1)) < FLOAT32, name
        else:
            assert relative_error(rows_of(mine), other) < FLOAT32, name


def test_a_run_has_the_references_maps_with_every_saving_and_without(pipes: Pair) -> None:
    ours, theirs = pipes
    with reference_maps(theirs.unet) as wanted:
        other = steps_of(theirs, **SHORT)
    texts = ours.tokenizer(["x", SHORT["prompt"]]).mask.sum(1).tolist()
    for savings in (ours.savings, NO_SAVINGS):
        with saving(ours, savings):
            plain = steps_of(ours, **SHORT)
            with record_attention(ours.unet, ["mid*", "*.1.*cross_attention"], steps=[1, 2]) as maps:
                assert all(torch.equal(a, b) for a, b in zip(steps_of(ours, **SHORT), plain, strict=True))
        assert relative_error(plain[-1], other[-1]) < FLOAT32
        assert_maps_of_a_run(maps, wanted, texts)
        columns = maps["up.1.attentions.1.blocks.0.cross_attention"].shape[-1]
        assert columns == (256 if savings is NO_SAVINGS else max(texts) + 1)
    assert maps["mid.attentions.0.blocks.0.self_attention"].shape == (2, 2, 3, 6)
    swapped = [texts[1], texts[0]]
    with pytest.raises(AssertionError, match="cross_attention"):
        assert_maps_of_a_run(maps, {n: [t.flip(0) for t in ts] for n, ts in wanted.items()}, swapped)


def test_a_run_that_a_picture_guides_has_the_references_maps(loaded: Both) -> None:
    ours, theirs = loaded
    with reference_maps(theirs.unet) as wanted:
        guided_steps(theirs)
    plain = guided_steps(ours)
    with record_attention(ours.unet, "mid*cross_attention*", whole=True) as maps:
        assert all(torch.equal(a, b) for a, b in zip(guided_steps(ours), plain, strict=True))
    assert len(maps) == 4
    for name, mine in maps.items():
        other = torch.stack(wanted[name])  # [steps, B, heads, N, S]
        columns = slice(None if "image" in name else -1, None)  # all images' tokens; the text's last
        assert relative_error(rows_of(mine)[..., columns], other[..., columns]) < FLOAT32, name


def test_perturbed_rows_come_last_and_look_at_themselves(pipes: Pair) -> None:
    pag = KolorsPAGPipeline.from_pipe(pipes[0], pag_applied_layers="mid")
    plain = steps_of(pag, **SHORT)
    with record_attention(pag.unet, ["mid*self_attention", "up.0*self_attention"]) as maps:
        assert all(torch.equal(a, b) for a, b in zip(steps_of(pag, **SHORT), plain, strict=True))
    for name, mine in maps.items():
        assert mine.shape == (3, 2, 3, 6)
        assert torch.equal(rows_of(mine)[2], torch.eye(6).double()) == name.startswith("mid")


def test_offloaded_models_are_recorded(pipes: Pair) -> None:
    ours = KolorsPipeline.from_pipe(pipes[0], unet=deepcopy(pipes[0].unet))
    with record_attention(ours.unet, CROSS) as wanted:
        plain = steps_of(ours, **SHORT)
    for by_block in (False, True):
        with offloaded(ours, by_block), record_attention(ours.unet, CROSS) as maps:
            assert all(torch.equal(a, b) for a, b in zip(steps_of(ours, **SHORT), plain, strict=True))
        assert torch.equal(maps[CROSS], wanted[CROSS])


@torch.no_grad()
def test_a_controlnet_has_maps_too() -> None:
    net, _ = net_pair(1, torch.float64)
    given = {**inputs(2, 8, 8), "image": torch.rand(1, 3, 64, 64, dtype=torch.float64)}
    plain = net(**given)
    with record_attention(net, "mid*1.cross_attention") as maps:
        assert all(torch.equal(a, b) for a, b in zip(net(**given), plain, strict=True))
    assert [*maps] == ["mid.attentions.0.blocks.1.cross_attention"]


def told() -> tuple[Tensor, Conditioning, Conditioning]:
    given = inputs(2, 8, 8)
    names = ("text_tokens", "pooled_text", "size_ids")
    first, second = (Conditioning(*(given[name][i : i + 1] for name in names)) for i in range(2))
    return given["latents"][:1], first, second


@torch.no_grad()
def test_a_mean_is_kept_in_float32_and_is_that_of_the_steps_asked_for(unets: tuple[UNet, Any]) -> None:
    schedule, (x, first, second) = EulerDiscreteScheduler().schedule(4), told()
    unet = deepcopy(unets[0]).bfloat16()
    halves = [
        Conditioning(half.text_tokens.bfloat16(), half.pooled_text.bfloat16(), half.size_ids)
        for half in (first, second)
    ]
    with (
        record_attention(unet, CROSS, steps=range(1, 4)) as mean,
        record_attention(unet, CROSS, steps={3, 1}, whole=True) as two,
        record_attention(unet, CROSS, whole=True) as every,
    ):
        denoise = guided(unet, schedule, *halves, 5.0)
        for sigma in schedule.sigmas.tolist()[:4]:
            x = denoise(x, sigma)
    assert mean[CROSS].dtype == torch.float32 and mean[CROSS].shape == (2, 4, 4, 12)
    assert every[CROSS].shape == (4, 2, 4, 4, 4, 12)
    assert relative_error(mean[CROSS], every[CROSS][1:].mean((0, 2))) < 1e-6
    assert torch.equal(two[CROSS], every[CROSS][1::2])


@torch.no_grad()
def test_a_recorded_step_is_not_used_while_a_layer_is_watched(unets: tuple[UNet, Any]) -> None:
    schedule, (x, first, second) = EulerDiscreteScheduler().schedule(4), told()
    recorder, sigma = Recorder(), schedule.sigmas[0].item()
    denoise = guided(unets[0], schedule, first, second, 5.0, wrap_step=CUDAGraphCache(recorder))
    for recordings in (0, 1):  # the first is made afterwards, the second time there is one to launch
        with record_attention(unets[0], CROSS, whole=True) as maps:
            watched = denoise(x, sigma)
        assert maps[CROSS].shape == (1, 2, 4, 4, 4, 12) and recorder.count == recordings
        assert torch.equal(denoise(x, sigma), watched)
    assert recorder.count == 1


@pytest.mark.exact
def test_compiled_blocks_are_refused(unets: tuple[UNet, Any]) -> None:
    unet = deepcopy(unets[0])
    compile_blocks(unet, backend="eager")
    place = CROSS.removesuffix(".cross_attention")
    with pytest.raises(ValueError, match=f"'{CROSS}' cannot be seen in {place}, which is compiled"):
        record_attention(unet, CROSS).__enter__()
    with pytest.raises(ValueError, match="cannot be seen in the model, which is compiled"):
        record_attention(torch.compile(unets[0]), CROSS).__enter__()  # type: ignore[arg-type]
    assert_nothing_stays(unet)


@torch.no_grad()
@pytest.mark.exact
def test_what_cannot_be_recorded_is_named(unets: tuple[UNet, Any]) -> None:
    unet, given = unets[0], inputs(1, 4, 4)

    def refused(message: str, *arguments: Any, net: Any = unet, kind: type[Exception] = ValueError) -> None:
        with pytest.raises(kind, match=message), record_attention(net, *arguments):
            unet(**given)
        assert_nothing_stays(unet)

    refused(
        r"no module is named 'mid\*attn2'; there are .*mid.attentions.\*.blocks.\*.cross_att", "mid*attn2"
    )
    refused("expected a pattern of modules' names or several, got 3", 3, kind=TypeError)
    refused(r"expected a pattern of modules' names or several, got \[\]", [], kind=TypeError)
    refused(
        "expected a UNet or a ControlNet, such as pipe.unet, got Linear",
        "*",
        net=nn.Linear(1, 1),
        kind=TypeError,
    )
    refused("steps must be some whole numbers, such as range.5., or None, got 5", CROSS, 5, kind=TypeError)
    refused("a step must be a whole number from 0 to .*, got -1", CROSS, [0, -1])
    refused(f"^{CROSS} ran 1 times: step 1, 4 never came", CROSS, [4, 1, 0])
    with (
        pytest.raises(ValueError, match=f"{CROSS} never ran"),
        record_attention(unet, CROSS) as maps,
        pytest.raises(ValueError, match="has no map yet"),
    ):
        assert maps[CROSS]
    with pytest.raises(KeyError), record_attention(unet, CROSS, steps=[3]) as maps:
        raise KeyError("it is told, not the step that never came")
    assert_nothing_stays(unet)
    wanted = r"in step 1 \[1, 2, 2, 12\], and before \[2, 4, 4, 12\]; name steps"
    with pytest.raises(ValueError, match=wanted), record_attention(unet, CROSS):
        for size in (inputs(2, 8, 8), given):
            unet(**size)
    assert_nothing_stays(unet)

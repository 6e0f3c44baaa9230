"""Features by the names of modules: kept as they are, put in again, in every model and way to run it."""

from collections.abc import Callable
from copy import deepcopy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kolors_core import KolorsPipeline, capture, inject
from kolors_core.adapters import lora
from kolors_core.chatglm import TextEmbedding
from kolors_core.conditioning import Conditioning
from kolors_core.guidance import guided
from kolors_core.performance.compile import compile_blocks
from kolors_core.performance.cuda_graphs import CUDAGraphCache
from kolors_core.precompute import Savings
from kolors_core.schedulers import EulerDiscreteScheduler
from kolors_core.unet import UNet
from tests.performance.test_compile import Recorder
from tests.support.controlnets import net_pair
from tests.support.offloads import offloaded
from tests.support.parity import pair
from tests.support.pipelines import NO_SAVINGS, Pair, saving, steps_of
from tests.support.small import EXACT, relative_error
from tests.test_unet import inputs, run_reference
from weights_convert import TABLES

pytestmark = pytest.mark.numerical

CAT: dict[str, Any] = {"prompt": "cat", "num_inference_steps": 3, "output_type": "latent"}
DOG = CAT | {"prompt": "一只红狗"}


@pytest.fixture(scope="module")
def unets() -> tuple[UNet, Any]:
    ours, theirs = pair("unet", torch.float64)
    assert isinstance(ours, UNet)
    return ours, theirs


def same(mine: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(mine, other, strict=True))


def has_hooks(model: nn.Module) -> bool:
    return any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@torch.no_grad()
def test_features_equal_the_reference(unets: tuple[UNet, Any]) -> None:
    """Every layer's that has weights, by the table of names, and what goes in."""
    ours, theirs = unets
    given, table, wanted = inputs(2, 9, 13), TABLES["unet"], {}
    with capture(ours, "*") as out, capture(ours, "*", "in") as into:
        ours(**given)
    names = {n: table.to_public(f"{n}.weight").removesuffix(".weight") for n, _ in ours.named_modules()}
    names = {n: public for n, public in names.items() if hasattr(ours.get_submodule(n), "weight")}
    for name, public in names.items():
        hook = partial(lambda name, _module, args, output: wanted.update({name: (args[0], output)}), name)
        theirs.get_submodule(public).register_forward_hook(hook)
    run_reference(theirs, given)
    for module in theirs.modules():
        module._forward_hooks.clear()
    assert len(names) > 200
    for name in names:
        for kept, other in zip((into, out), wanted[name], strict=True):
            assert len(kept[name]) == 1
            assert relative_error(kept[name][0].flatten(), other.flatten()) < EXACT, name
    with (
        inject(ours, {"mid.resnets.0": lambda x, _step: x + 1e-6 * x**2}),
        capture(ours, "mid*norm2") as spoiled,
    ):
        ours(**given)
    errors = {name: relative_error(kept, wanted[name][1]) for name, (kept,) in spoiled.items()}
    assert errors["mid.resnets.0.norm2"] < EXACT < errors["mid.resnets.1.norm2"], "so little shows"
    assert not has_hooks(ours)


def test_one_runs_features_make_another_run_it(pipes: Pair) -> None:
    """What comes out of the UNet's last layer is the image; of a layer further in, half of it."""
    ours = pipes[0]
    cat, dog = steps_of(ours, **CAT), steps_of(ours, **DOG)
    with capture(ours.unet, ["conv_out", "mid"]) as kept:
        assert same(steps_of(ours, **CAT), cat)
    assert [len(entries) for entries in kept.values()] == [3, 3] and [*kept] == ["mid", "conv_out"]
    with inject(ours.unet, kept):
        assert same(steps_of(ours, **DOG), cat)
    with inject(ours.unet, {"mid": kept["mid"]}):
        mixed = steps_of(ours, **DOG)
    assert all(relative_error(mixed[0], other[0]) > 1e-4 for other in (cat, dog))
    with inject(ours.unet, {"conv_out": kept["conv_out"][:1]}, steps=[0]):
        first = steps_of(ours, **DOG)
    assert torch.equal(first[0], cat[0]) and relative_error(first[1], cat[1]) > 1e-6
    assert not has_hooks(ours.unet) and same(steps_of(ours, **DOG), dog)


def test_a_function_changes_features_in_its_steps(pipes: Pair) -> None:
    """Activation steering, against a hook of the test's own."""
    ours, calls, told = pipes[0], [], []
    push = torch.randn(64, 1, 1, generator=torch.Generator().manual_seed(0)).double()

    def own(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor | None:
        calls.append(output)
        return output + 2 * push if len(calls) == 2 else None

    hook = ours.unet.mid.resnets[1].register_forward_hook(own)
    wanted = steps_of(ours, **CAT)
    hook.remove()

    def steer(features: Tensor, step: int) -> Tensor:
        told.append(step)
        return features + 2 * push

    with inject(ours.unet, {"mid.resnets.1": steer}, steps=[1]), capture(ours.unet, "mid") as seen:
        assert same(steps_of(ours, **CAT), wanted)
    assert told == [1] and torch.equal(seen["mid"][1], calls[1] + 2 * push)
    with inject(ours.unet, {"up.0": lambda x, step: x + 2 * push if step == 1 else x}, "in"):
        assert same(steps_of(ours, **CAT), wanted)
    with inject(ours.unet, {"mid": steer, "mi[d]": lambda x, _step: x - 2 * push}):
        assert relative_error(steps_of(ours, **CAT)[-1], steps_of(ours, **CAT)[-1]) == 0


def test_what_a_run_computes_once_has_one_call(pipes: Pair) -> None:
    ours, once = (
        pipes[0],
        ["text_proj", "time_embedding", "mid.resnets.0.time_proj", "mid*cross_attention.to_k"],
    )
    with capture(ours.unet, [*once, "mid*cross_attention.to_q"]) as kept:
        plain = steps_of(ours, **CAT)
    counts = [len(entries) for entries in kept.values()]
    assert counts == [1, 1, 1, 3, 1, 3, 1]
    assert len(kept["time_embedding"][0]) == 3, "all steps' times together"
    with saving(ours, Savings(precompute=False)), capture(ours.unet, once) as kept:
        steps_of(ours, **CAT)
    assert {len(entries) for entries in kept.values()} == {3}
    with capture(ours.unet, "") as whole, capture(ours.unet, "text_proj") as text:
        assert relative_error(steps_of(ours, **CAT)[-1], plain[-1]) < EXACT
    assert [x.shape for x in whole[""]] == [(2, 4, 8, 9)] * 3 and len(text["text_proj"]) == 3


@torch.no_grad()
def test_a_level_gives_a_list_of_skips(unets: tuple[UNet, Any]) -> None:
    ours, given = unets[0], inputs(1, 8, 8)
    plain = ours(**given)
    with capture(ours, "down.0") as kept:
        ours(**given)
    (skips,) = kept["down.0"]
    assert isinstance(skips, list) and [skip.shape[-1] for skip in skips] == [8, 8, 4]
    with inject(ours, kept):
        assert torch.equal(ours(**given), plain)
    with inject(ours, {"down.0": lambda skips, _step: [skips[0], *(0 * skip for skip in skips[1:])]}):
        assert relative_error(ours(**given), plain) > 1e-3
    wanted = r"^down.0, step 0: expected \['torch.float64 \[1, 16.*got \['torch"
    with pytest.raises(ValueError, match=wanted), inject(ours, {"down.0": lambda skips, _step: skips[:2]}):
        ours(**given)


@torch.no_grad()
def test_every_model_can_be_looked_into(pipes: Pair) -> None:
    ours = pipes[0]
    net, _ = net_pair(1, torch.float64)
    given = {**inputs(2, 8, 8), "image": torch.rand(1, 3, 64, 64, dtype=torch.float64)}
    with capture(net, ["", "to_mid"]) as kept:
        residuals = net(**given)
    assert same(kept[""][0], residuals) and torch.equal(kept["to_mid"][0], residuals[-1])
    batch = ours.tokenizer(["cat"]).merge_padding()
    with (
        capture(ours.text_encoder, ["", "layers.[12]"]) as kept,
        capture(ours.text_encoder, "", "in") as into,
    ):
        text = ours.text_encoder(batch)
    assert isinstance(kept[""][0], TextEmbedding) and kept[""][0] is text and into[""][0] is batch
    assert torch.equal(kept["layers.1"][0], text.tokens) and torch.equal(
        kept["layers.2"][0][:, 0], text.pooled
    )
    latents = torch.randn(1, 4, 4, 5, dtype=torch.float64)
    with capture(ours.vae, "decoder*.conv_out") as kept:
        image = ours.vae.decode_latents(latents)
    assert torch.equal(kept["decoder.conv_out"][0], image)
    clip, _ = pair("image_encoder", torch.float64)
    with inject(clip, {"layers.0": lambda x, _step: 0 * x}), capture(clip, "layers.1", "in") as kept:
        clip(torch.randn(1, 3, 28, 28, dtype=torch.float64))
    assert not kept["layers.1"][0].any()


def test_adapters_and_offloaded_models(pipes: Pair) -> None:
    """A layer that a LoRA takes over meanwhile is still seen; blocks come for it."""
    ours = KolorsPipeline.from_pipe(pipes[0], unet=deepcopy(pipes[0].unet))
    name = "mid.attentions.0.blocks.0.self_attention.to_q"
    with capture(ours.unet, name) as wanted:
        adapter = lora.attach(ours.unet, rank=2)
        plain = steps_of(ours, **CAT)
    with offloaded(ours, by_block=True), capture(ours.unet, name) as kept:
        assert same(steps_of(ours, **CAT), plain)
    assert len(kept[name]) == 3 and same(kept[name], wanted[name])
    adapter.detach()
    assert not has_hooks(ours.unet)


def test_kept_tensors_are_detached_or_what_keep_makes_of_them(unets: tuple[UNet, Any]) -> None:
    ours, given = unets[0], inputs(1, 4, 4)
    ours.requires_grad_(True)
    with (
        capture(ours, ["mid", "down.0"]) as kept,
        capture(ours, "mid", keep=lambda x: x.mean((2, 3)).half()) as small,
        inject(ours, {"mid": lambda x, _step: 2 * x}),
    ):
        ours(**given).sum().backward()
    assert not kept["mid"][0].requires_grad and not kept["down.0"][0][1].requires_grad
    assert small["mid"][0].shape == (1, 64) and small["mid"][0].dtype == torch.float16
    assert ours.conv_in.weight.grad is not None and ours.conv_in.weight.grad.any(), "gradients pass a change"
    ours.requires_grad_(False)
    ours.zero_grad(set_to_none=True)


@torch.no_grad()
def test_of_compiled_blocks_what_lies_between_is_seen(unets: tuple[UNet, Any]) -> None:
    ours, given = deepcopy(unets[0]), inputs(1, 4, 4)
    compile_blocks(ours.mid.resnets[0], backend="eager")
    plain = ours(**given)
    with capture(ours, ["mid", "mid.attentions.0", "up.0"]) as kept:
        assert torch.equal(ours(**given), plain)
    assert len(kept["mid"]) == len(kept["mid.attentions.0"]) == 1
    for call in (capture(ours, "mid.resnets.0"), inject(ours, {"mid.resnets.0.conv1": lambda x, _step: x})):
        with pytest.raises(ValueError, match="cannot be seen in mid.resnets.0, which is compiled"):
            call.__enter__()
    torch.compiler.reset()


@torch.no_grad()
def test_a_recorded_step_is_not_used_with_hooks(unets: tuple[UNet, Any]) -> None:
    given, schedule, recorder = inputs(1, 8, 8), EulerDiscreteScheduler().schedule(4), Recorder()
    told = Conditioning(*(given[name] for name in ("text_tokens", "pooled_text", "size_ids")))
    graphs, sigma = CUDAGraphCache(recorder), schedule.sigmas[0].item()

    def run() -> Tensor:
        return guided(unets[0], schedule, told, wrap_step=graphs)(given["latents"], sigma)

    plain = run()
    with capture(unets[0], "mid") as kept:
        assert torch.equal(run(), plain)
    with inject(unets[0], {"mid": lambda x, _step: 0 * x}):
        assert relative_error(run(), plain) > 1e-3
    assert len(kept["mid"]) == 1 and recorder.count == 1 and torch.equal(run(), plain)


BAD: list[tuple[Callable[[UNet], Any], type[Exception], str]] = [
    (lambda u: capture(u, "mid_block"), ValueError, r"no module is named 'mid_block'; there are .*mid\."),
    (lambda u: capture(u, "down"), ValueError, "no module is named 'down'"),
    (lambda u: capture(u, "mid", "both"), ValueError, '^what must be "in" or "out", got .both.'),  # type: ignore
    (lambda u: capture(object(), "mid"), TypeError, "expected a model, such as pipe.unet, got object"),  # type: ignore
    (lambda u: capture(u, "mid", steps=[0, 2, 5]), ValueError, "^mid ran 1 times: step 2, 5 never came"),
    (lambda u: capture(u, "up.0", steps="12"), TypeError, "steps must be some whole numbers"),  # type: ignore
    (lambda u: inject(u, {}), TypeError, "expected changes by pattern, such as {'mid': tensor}, got {}"),
    (lambda u: inject(u, {"mid": 3}), TypeError, "'mid': expected a tensor, a list of them or a func"),
    (lambda u: inject(u, {"mid": []}), ValueError, "'mid': expected features of at least one steps, got 0"),
    (lambda u: inject(u, {"mid": [1, 2]}, steps=[3]), ValueError, "expected features of 1 steps, got 2"),
    (lambda u: inject(u, {"mid": torch.zeros(1, 64, 1, 1)}), ValueError, r"^mid, step 0: expected torch.flo"
     r"at64 \[1, 64, 1, 1\] on cpu to put in, got torch.float32 \[1, 64, 1, 1\] on cpu"),
    (lambda u: inject(u, {"mid": lambda x, _step: x[:, :3]}), ValueError, r"float64 \[1, 3, 1, 1\]"),
    (lambda u: inject(u, {"mid": lambda x, _step: None}), ValueError, "got <class 'NoneType'>"),
    (lambda u: inject(u, {"mid": [torch.zeros(1, 64, 1, 1).double()] * 2}), ValueError, "step 1 never came"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "kind", "message"), BAD)
@torch.no_grad()
@pytest.mark.exact
def test_what_cannot_be_is_named(
    unets: tuple[UNet, Any], call: Callable[[UNet], Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message), call(unets[0]):
        unets[0](**inputs(1, 4, 4))
    assert not has_hooks(unets[0])


@torch.no_grad()
@pytest.mark.exact
def test_what_never_ran_is_named_unless_another_exception_is(pipes: Pair) -> None:
    ours = pipes[0]
    with pytest.raises(ValueError, match="encoder.conv_in never ran"), capture(ours.vae, "encoder.conv_in"):
        ours.vae.decode_latents(torch.zeros(1, 4, 2, 2, dtype=torch.float64))
    with pytest.raises(KeyError), inject(ours.unet, {"mid": lambda x, _step: x}), capture(ours.unet, "mid"):
        raise KeyError("this")
    kept = [torch.zeros(2, 64, 2, 3, dtype=torch.float64)]
    wanted = "mid, step 1: there are features of 1 steps; name the steps"
    with pytest.raises(ValueError, match=wanted), inject(ours.unet, {"mid": kept}):
        steps_of(ours, **CAT)
    assert not has_hooks(ours.unet)
    with saving(ours, NO_SAVINGS), capture(ours.text_encoder, "layers.0") as text:
        steps_of(ours, **CAT)
    assert len(text["layers.0"]) in (1, 2)

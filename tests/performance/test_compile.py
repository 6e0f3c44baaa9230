"""Compilation by block, and steps recorded as graphs: the same results, whatever changes afterwards.

Traced by torch's own compiler and run by its "eager" backend, which makes no code: breaks and recompilations
are those of every backend, in seconds. One test runs the real one, on a block.
"""

import copy
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils._pytree import tree_leaves

from kolors_core import KolorsPipeline
from kolors_core.adapters import lora
from kolors_core.adapters.clip_vision import CLIPVision
from kolors_core.adapters.ip_adapter import IPAdapter, attached
from kolors_core.attention import attention_kernel
from kolors_core.chatglm import ChatGLM
from kolors_core.conditioning import Conditioning
from kolors_core.config import KOLORS
from kolors_core.guidance import guided
from kolors_core.module import is_block
from kolors_core.performance.compile import compile_blocks
from kolors_core.performance.cuda_graphs import CUDAGraphCache
from kolors_core.schedulers import EulerDiscreteScheduler
from kolors_core.tokenizer import TokenBatch
from kolors_core.unet import UNet
from kolors_core.vae import VAE
from tests.support.ip_adapters import Both, adapter_config, guided_steps, load_both
from tests.support.parity import pair
from tests.support.pipelines import Pair, steps_of
from tests.support.small import EXACT, SHALLOW, SMALL, SMALL_CLIP, randomise, relative_error
from tests.test_unet import inputs


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def compilations() -> int:
    return counters["stats"]["unique_graphs"]


def whole(model: nn.Module) -> Callable[..., Any]:
    return torch.compile(model, backend="eager", fullgraph=True)


@torch.no_grad()
def test_text_encoder_and_vae_have_no_graph_break() -> None:
    """The UNet with adapters is in test_ip_adapter.py, a sampler's step in test_guidance.py."""
    chatglm, vae = (pair(name, torch.float64)[0] for name in ("text_encoder", "vae"))
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 600, (2, 9), generator=generator)
    batch = TokenBatch(
        ids, torch.ones_like(ids, dtype=torch.bool), torch.arange(9).expand(2, -1)
    ).merge_padding()
    assert torch.equal(whole(chatglm)(batch).pooled, chatglm(batch).pooled)
    latents = torch.randn(1, 4, 4, 5, generator=generator, dtype=torch.float64)
    decode = torch.compile(vae.decode_latents, backend="eager", fullgraph=True)
    picture = vae.decode_latents(latents)
    assert torch.equal(decode(latents), picture)
    encode = torch.compile(vae.encode_images, backend="eager", fullgraph=True)
    assert torch.equal(encode(picture).mean, vae.encode_images(picture).mean)


@torch.no_grad()
def test_blocks_are_compiled_once_a_kind_and_serve_other_sizes_and_adapters() -> None:
    unet = UNet(SHALLOW.unet).double().eval()
    randomise(unet)
    plain = copy.deepcopy(unet)
    kinds = compile_blocks(unet, backend="eager")
    assert kinds == 8 < sum(is_block(module) for module in unet.modules())

    def same(model: nn.Module, height: int, width: int) -> int:
        """Compilations that this image size needs; the result is the plain model's."""
        before, given = compilations(), inputs(2, height, width, torch.float64)
        assert torch.equal(model(**given), plain(**given))
        return compilations() - before

    assert same(unet, 8, 8) == kinds
    assert same(unet, 8, 12) <= kinds  # for every size from now on
    assert same(unet, 16, 20) == 0
    assert same(unet, 24, 16) == 0

    adapters = [lora.attach(model, rank=2) for model in (unet, plain)]
    for seed in range(2):
        generator = torch.Generator().manual_seed(seed)
        for mine, other in zip(*(adapter.parameters() for adapter in adapters), strict=True):
            mine.copy_(torch.randn(mine.shape, generator=generator))
            other.copy_(mine)
        needed = same(unet, 8, 8)
        assert needed > 0 if seed == 0 else needed == 0  # other weights: nothing is compiled anew
    for i, strength in enumerate((0.5, 0.3, 0.9, 0.1)):
        for adapter in adapters:
            adapter.set_scale(strength)
        needed = same(unet, 8, 8)
        assert needed == 0 or i == 0  # strengths become inputs of what is compiled
    for adapter in adapters:
        adapter.detach()
    assert same(unet, 8, 8) == 0
    assert not counters["graph_break"]


class Doubled(nn.Module):
    """A block of which each number of axes is a variant."""

    is_block = True

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


@pytest.mark.parametrize("has_argument", [True, False])
def test_many_variants_are_allowed_by_every_torch(
    has_argument: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to torch 2.12 `compile` has no argument for it, and a process allows 8."""
    plain = torch.compile

    def older(function: Any, *, fullgraph: bool, mode: str | None, backend: str) -> Any:
        return plain(function, fullgraph=fullgraph, mode=mode, backend=backend)

    if not has_argument:
        monkeypatch.setattr(torch, "compile", older)
    block, config = Doubled(), torch._dynamo.config
    limit = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"
    with config.patch({limit: 8}):
        assert compile_blocks(block, backend="eager") == 1
        for axes in range(1, 11):
            assert block(torch.ones([2] * axes)).sum() == 2 * 2**axes
    assert compilations() == 10


def test_each_model_says_what_its_blocks_are() -> None:
    """And a module of no class of ours can say so too."""

    class Mine(nn.Module):
        is_block = True

    with torch.device("meta"):
        models = (
            UNet(KOLORS.unet), ChatGLM(KOLORS.text_encoder), VAE(KOLORS.vae), CLIPVision(SMALL_CLIP),
            IPAdapter(adapter_config(KOLORS.unet)),
        )  # fmt: skip
    kinds = [{type(module).__name__ for module in model.modules() if is_block(module)} for model in models]
    assert kinds == [
        {"ResBlock", "TransformerBlock"}, {"ChatGLMLayer"}, {"ResBlock", "Attention"}, {"CLIPLayer"},
        {"ResamplerLayer"},
    ]  # fmt: skip
    assert is_block(Mine()) and not is_block(nn.Linear(1, 1))


def test_the_full_size_unet_has_fourteen_kinds_of_blocks() -> None:
    with torch.device("meta"):
        unet = UNet(KOLORS.unet)
    assert compile_blocks(unet) == 14
    assert sum(is_block(module) for module in unet.modules()) == 87


def test_a_compiled_pipeline_draws_the_same_and_can_be_copied(pipes: Pair) -> None:
    ours = pipes[0]
    given = {"prompt": "一只猫 a cat", "num_inference_steps": 2, "height": 32, "width": 32}
    plain = steps_of(ours, **given)
    pipe = KolorsPipeline(**{
        name: copy.deepcopy(part) if isinstance(part, nn.Module) else part
        for name, part in ours.components.items()
    })  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    pipe.compile(backend="eager")
    assert all(torch.equal(a, b) for a, b in zip(steps_of(pipe, **given), plain, strict=True))
    assert compilations() > 0 and not counters["graph_break"]
    assert copy.deepcopy(pipe.unet).mid.resnets[0]._compiled_call_impl is None
    with pytest.raises(ValueError, match="mode must be one of None, default, .* got 'fast'"):
        pipe.compile("fast")


@pytest.mark.numerical
@torch.no_grad()
def test_the_real_compiler_on_a_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a cache of its own: torch's finds code by the graph alone, also what a process with vectors of
    another width made, and that computes only a part of the values.
    """
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    unet = UNet(SMALL.unet).eval()
    randomise(unet)
    block = unet.down[0].resnets[0]
    x, time = torch.randn(2, 16, 8, 8), torch.randn(2, SMALL.unet.time_dim)
    plain = block(x, time)
    compile_blocks(block)
    assert relative_error(block(x, time), plain) < 5e-6
    assert compilations() == 1


class Recorder:
    """Stands for a GPU's: what it recorded it runs again, on the memory that it was recorded on."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, run: Callable[[], Any]) -> tuple[Callable[[], object], Any]:
        self.count += 1
        result = run()

        def replay() -> None:
            for place, value in zip(tree_leaves(result), tree_leaves(run()), strict=True):
                place.copy_(value)

        return replay, result


@pytest.mark.numerical
@torch.no_grad()
def test_a_recorded_step_serves_every_run_of_its_shape() -> None:
    """Two runs in turn, with texts of their own; then another size, LoRA strength, and attention kernel."""
    unet, _ = pair("unet", torch.float64, SHALLOW)
    assert isinstance(unet, UNet)
    recorder = Recorder()
    graphs, schedule = CUDAGraphCache(recorder), EulerDiscreteScheduler().schedule(4)
    graphs.MAX_GRAPHS = 8
    adapter = lora.attach(unet, rank=2)

    def runs(height: int) -> None:
        given = inputs(4, height, 8, torch.float64)
        told = [
            Conditioning(*(given[name][i : i + 1] for name in ("text_tokens", "pooled_text", "size_ids")))
            for i in range(4)
        ]
        pairs = list(pairwise(told))[::2]
        recorded = [guided(unet, schedule, *halves, 5.0, wrap_step=graphs) for halves in pairs]
        plain = [guided(unet, schedule, *halves, 5.0) for halves in pairs]
        x, sigmas = given["latents"][:1], schedule.sigmas.tolist()
        for sigma in (sigmas[0], sigmas[1], 3.3):
            for mine, other in zip(recorded, plain, strict=True):
                assert torch.equal(mine(x, sigma), other(x, sigma))

    runs(8)
    assert recorder.count == 1
    runs(12)
    runs(8)
    assert recorder.count == 2
    for part in adapter.parts().values():
        assert part.up is not None
        part.up.fill_(0.01)
    adapter.set_scale(0.5)
    runs(8)
    assert recorder.count == 3
    with attention_kernel("matmul"):
        runs(8)
    assert recorder.count == 4
    for height in (4, 16, 20, 24):
        runs(height)
    assert len(graphs.captured) == graphs.MAX_GRAPHS


def test_a_recording_knows_scales_of_image_adapters(both: Both, adapters: list[Any]) -> None:
    ours, _ = both
    load_both((ours,), adapters[0])
    recorder = Recorder()
    for scale in (0.3, 0.8):
        ours.set_ip_adapter_scale(scale)
        plain = guided_steps(ours)
        ours._wrap_step = CUDAGraphCache(recorder) if ours._wrap_step is None else ours._wrap_step
        assert all(torch.equal(a, b) for a, b in zip(guided_steps(ours), plain, strict=True))
    assert recorder.count == 2 and attached(ours.unet)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: graphs are recorded only there")
@torch.no_grad()
def test_cuda_records_a_step() -> None:
    unet = UNet(SMALL.unet).cuda().eval()
    randomise(unet)
    given = {name: tensor.cuda() for name, tensor in inputs(1, 8, 8, torch.float32).items()}
    told = Conditioning(given["text_tokens"], given["pooled_text"], given["size_ids"])
    schedule = EulerDiscreteScheduler().schedule(4)
    recorded = guided(unet, schedule, told, wrap_step=CUDAGraphCache())
    plain = guided(unet, schedule, told)
    for sigma in schedule.sigmas.tolist()[:3]:
        assert relative_error(recorded(given["latents"], sigma), plain(given["latents"], sigma)) < 1e-6
    assert EXACT  # the graph replays the very kernels; the bound is float32's

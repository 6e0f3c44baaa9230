"""What one guided step consists of, counted without values: attentions, arithmetic, bytes and operators."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from benchmarks.speed.rows import UniqueRows
from kolors_core.adapters.clip_vision import CLIPVision, CLIPVisionConfig
from kolors_core.adapters.ip_adapter import IPAdapterConfig, Resampler
from kolors_core.attention import KERNELS, attention_kernel
from kolors_core.chatglm import ChatGLM
from kolors_core.conditioning import Conditioning, size_ids
from kolors_core.config import KolorsConfig
from kolors_core.guidance import guided
from kolors_core.schedulers import EulerDiscreteScheduler
from kolors_core.tokenizer import TokenBatch
from kolors_core.unet import UNet
from kolors_core.vae import VAE

MAX_TOKENS = 256
TEXT_LENGTHS = (32, 96, MAX_TOKENS)  # of those that prompts are filled up to
ENCODED_LENGTHS = (2, 21, MAX_TOKENS)  # of merged prompts
KINDS = {"convolution": "conv", "mm": "gemm", "addmm": "gemm", "bmm": "gemm", "baddbmm": "gemm"}


class Shape(NamedTuple):
    """One kind of attention. bias: its shape, or None."""

    q: tuple[int, ...]
    keys: int
    bias: tuple[int, ...] | None


@contextmanager
def recorded() -> Iterator[Counter[Shape]]:
    """Within it attention computes nothing, and is counted by kind."""
    seen = Counter[Shape]()

    def record(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        seen[Shape(tuple(q.shape), k.shape[2], None if bias is None else tuple(bias.shape))] += 1
        batch, heads, queries, _ = q.shape
        return q.new_empty(batch, queries, heads, v.shape[3]).transpose(1, 2)  # as torch's kernels lay it out

    KERNELS["recorded"] = record
    try:
        with attention_kernel("recorded"):
            yield seen
    finally:
        del KERNELS["recorded"]


def guided_step(unet: UNet, pixels: int, tokens: int = TEXT_LENGTHS[0]) -> Callable[[], Tensor]:
    """A step with guidance of random latents and a random prompt, on the UNet's device."""
    config, weight = unet.config, unet.conv_in.weight
    draw = torch.Generator().manual_seed(0)
    counts = torch.ones(1, tokens)
    counts[:, 0] = MAX_TOKENS - tokens + 1
    sizes = size_ids((pixels, pixels), (0, 0), (pixels, pixels)).to(weight.device)

    def prompt() -> Conditioning:
        text = torch.randn(1, tokens, config.text_dim, generator=draw).to(weight)
        pooled = torch.randn(1, config.text_dim, generator=draw).to(weight)
        return Conditioning(text, pooled, sizes, counts.to(weight.device))

    schedule = EulerDiscreteScheduler().schedule(25)
    sigma = schedule.sigmas[12].item()
    shape = 1, config.in_channels, pixels // 8, pixels // 8
    x = torch.randn(shape, generator=draw).to(weight.device) * (1 + sigma**2) ** 0.5
    with UniqueRows() if weight.is_meta else torch.no_grad():
        denoise = guided(unet, schedule, prompt(), prompt(), 5.0)
    return lambda: denoise(x, sigma)


@torch.no_grad()
def attention_shapes(config: KolorsConfig, sides: tuple[int, ...]) -> list[Shape]:
    """Every kind of attention that drawing at these sides has, text and image encoders included.

    One block of each kind runs without values, so that a changed architecture is listed as it is.
    """
    shallow = replace(config.unet, depths=tuple(min(depth, 1) for depth in config.unet.depths))
    images = CLIPVisionConfig(layers=2)
    with torch.device("meta"):
        unet, vae = UNet(shallow), VAE(config.vae)
        chatglm = ChatGLM(replace(config.text_encoder, layers=2))
        clip, resampler = CLIPVision(images), Resampler(IPAdapterConfig(layers=1))
        pixels = torch.empty(1, 3, images.image_size, images.image_size)
        states = torch.empty(1, images.tokens, images.hidden_size)
    with recorded() as seen, UniqueRows(), torch.device("meta"):
        for side in sides:
            guided_step(unet, side)()
            vae.decode_latents(torch.empty(1, config.vae.latent_channels, side // 8, side // 8))
        for length in ENCODED_LENGTHS:
            ids = torch.empty(1, length, dtype=torch.long)
            chatglm(TokenBatch(ids, ids.bool(), ids, torch.empty(1, length)))
        clip(pixels)
        resampler(states)
    of_text = [one for one in seen if one.bias is not None and one.bias[-2] == 1 < one.q[2]]
    texts = [
        one._replace(keys=n, bias=(*one.bias[:-1], n)) for one in of_text if one.bias for n in TEXT_LENGTHS
    ]
    branches = [one._replace(keys=IPAdapterConfig.queries, bias=None) for one in of_text]
    return sorted({*seen, *texts, *branches}, key=str)


class StepCount(TorchDispatchMode):
    """Counts FLOPs, bytes and operators by kind: gemm, conv, and other, of which views are no part."""

    def __init__(self) -> None:
        super().__init__()
        self.flops, self.bytes, self.launches = Counter[str](), Counter[str](), Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        old = {x.untyped_storage()._cdata for x in inputs}
        is_view = all(x.untyped_storage()._cdata in old for x in outputs)
        name = func._schema.name.partition("::")[2]
        if is_view and not name.endswith("_") or "empty" in name:
            return result
        kind = KINDS.get(name, "other")
        self.launches[kind] += 1
        self.bytes[kind] += sum(x.numel() * x.element_size() for x in chain(inputs, outputs))
        if (count := flop_registry.get(func.overloadpacket)) is not None:
            self.flops[kind] += count(*args, **(kwargs or {}), out_val=result)
        return result


@torch.no_grad()
def count_step(unet: UNet, pixels: int) -> tuple[StepCount, Counter[Shape]]:
    """Count a guided step of a UNet on the meta device, in its dtype; its attentions by themselves."""
    with recorded() as seen:
        step = guided_step(unet, pixels)
        seen.clear()
        with UniqueRows(), StepCount() as count:
            step()
    count.flops["attention"] = sum(n * 4 * one.keys * _elements(one.q) for one, n in seen.items())
    count.bytes["attention"] = sum(
        n * 2 * unet.conv_in.weight.element_size() * one.q[0] * one.q[1] * one.q[3] * (one.q[2] + one.keys)
        for one, n in seen.items()
    )
    count.launches["attention"] = seen.total()
    return count, seen


def _elements(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()

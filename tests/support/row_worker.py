"""What each of four processes does with split rows; tests/support/two_processes.py starts them.

The first two and three of them are groups too. Each writes its errors, relative to the whole result, as JSON.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor

from kolors_core.__main__ import main
from kolors_core.adapters.controlnet import ControlInput, ControlNet, ControlNetConfig, ControlResiduals
from kolors_core.adapters.ip_adapter import IPAdapter, IPAdapterConfig, attach, cross_attentions
from kolors_core.adapters.lora import add_adapter, supported_layers
from kolors_core.adapters.lora_layers import LoRAWeights
from kolors_core.conditioning import Conditioning
from kolors_core.context import ImagePrompt
from kolors_core.guidance import guided
from kolors_core.performance.processes import join_processes
from kolors_core.performance.row_split import Ranks, RowSplit
from kolors_core.performance.split_guidance import GuidancePair
from kolors_core.pipelines.pag import perturbed
from kolors_core.pipelines.text_to_image import KolorsPipeline
from kolors_core.schedulers import EulerDiscreteScheduler
from kolors_core.unet import UNet
from kolors_core.vae import VAE
from tests.support.small import SMALL, randomise, relative_error

HEIGHTS = (13, 18, 19)  # of latents: 4, 5 and 5 rows at the innermost level, odd ones above it
WIDTH = 6
PROCESSES = 4
SCHEDULE = EulerDiscreteScheduler().schedule(2)


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def condition(unet: UNet, seed: int, dtype: torch.dtype = torch.float64) -> Conditioning:
    c, tokens = unet.config, 4 + seed
    sizes = torch.tensor([[104.0, 48.0, 0.0, 0.0, 104.0, 48.0]])
    text, pooled = noise(1, 7, c.text_dim, seed=tokens, dtype=dtype), noise(1, c.text_dim, seed=seed, dtype=dtype)
    return Conditioning(text, pooled, sizes, torch.arange(1.0, 8.0)[None])


def small_unet(dtype: torch.dtype = torch.float64) -> UNet:
    unet = UNet(SMALL.unet).to(dtype).eval()
    randomise(unet)
    return unet


def small_vae(dtype: torch.dtype = torch.float64) -> VAE:
    vae = VAE(SMALL.vae).to(dtype).eval()
    randomise(vae)
    return vae


def with_all_adapters(unet: UNet) -> Callable[[Conditioning], Conditioning]:
    """Attach a LoRA of every layer and an IP-Adapter; return what adds its image, and ControlNets."""
    parts, generator = {}, torch.Generator().manual_seed(1)
    for path, layer in supported_layers(unet).items():
        weight: Any = layer.weight
        down, up = torch.empty(2, *weight.shape[1:]), torch.empty(len(weight), 2, *[1] * (weight.ndim - 2))
        for factor in (down, up):
            torch.nn.init.normal_(factor, std=0.1, generator=generator)
        parts[path] = LoRAWeights({"down": down.double(), "up": up.double()}, 1.0)
    add_adapter(unet, "all", parts)
    widths = tuple(one.to_q.in_features for one in cross_attentions(unet).values())
    adapter = IPAdapter(IPAdapterConfig(
        image_dim=16, width=16, queries=2, heads=1, head_dim=8, feed_forward_size=16, layers=1,
        context_dim=unet.config.context_dim, cross_attention_widths=widths,
    )).double()  # fmt: skip
    randomise(adapter, 2)
    attach(unet, adapter)
    net = ControlNet(ControlNetConfig(**vars(SMALL.unet), conditioning_widths=(8, 8, 8, 8))).double().eval()
    randomise(net, 3)
    images = ImagePrompt(noise(1, 1, 2, unet.config.context_dim, seed=4))
    control = ControlInput(net, noise(1, 3, 8 * HEIGHTS[0], 8 * WIDTH, seed=5).sigmoid())
    return lambda c: replace(c, image_prompts=(images,), residuals=ControlResiduals((control,)))


def denoised(
    unet: UNet, rule: Any, height: int, change: Callable[[Conditioning], Conditioning] = lambda c: c
) -> Tensor:
    dtype = unet.conv_in.weight.dtype
    positive, negative = (change(condition(unet, seed, dtype)) for seed in range(2))
    x, sigma = noise(1, 4, height, WIDTH, seed=7, dtype=dtype), SCHEDULE.sigmas[0].item()
    return rule(unet, SCHEDULE, positive, negative, 3.0)(x, sigma)


def both_ways(vae: VAE, height: int) -> list[Tensor]:
    dtype = vae.decoder.conv_in.weight.dtype
    latents, image = noise(1, 4, height, 5, dtype=dtype), noise(1, 3, 8 * height, 40, dtype=dtype)
    found = vae.encode_images(image)
    return [vae.decode_latents(latents), found.mean, found.std]


class Errors(dict[str, float]):
    """Errors by case, of one process."""

    def add(self, case: str, split: RowSplit, results: list[Tensor], whole: list[Tensor]) -> None:
        """Add a case's largest error, or infinity where the processes' results differ by a bit."""
        errors = [relative_error(a, b) for a, b in zip(results, whole, strict=True)]
        for result in results:
            if any(not torch.equal(result, other) for other in split.ranks.stack("test", result)):
                errors.append(float("inf"))
        self[case] = max(errors)


@contextmanager
def fault(name: str) -> Iterator[None]:
    """Let convolutions see zeros, norms their own statistics, or attentions their own keys and values."""
    extend, stack, gather = Ranks.extend, Ranks.stack, Ranks.gather

    def dark(self: Ranks, band: Tensor, has_above: bool) -> Tensor:
        rows = extend(self, band, has_above)
        return rows * torch.tensor([0.0] * has_above + [1.0] * band.shape[2] + [0.0]).to(rows)[:, None]

    def own_statistics(self: Ranks, kind: str, own: Tensor) -> Tensor:
        return stack(self, kind, own) if kind == "test" else torch.stack([own] * self.size)

    def own_keys(self: Ranks, kind: str, band: Tensor, rows: Any) -> Any:
        return gather(self, kind, band, rows) if kind == "results" else lambda: band

    change = {"extend": dark, "stack": own_statistics, "gather": own_keys}[name]
    with patch.object(Ranks, name, change):
        yield


def measure_parts(errors: Errors, split: RowSplit) -> None:
    """Measure the UNet and the VAE alone, with every adapter, and with a fault in each exchange."""
    unet, vae, size = small_unet(), small_vae(), split.ranks.size
    rule = split.wrap_rule(guided)
    for height in HEIGHTS:
        results, whole = denoised(unet, rule, height), denoised(unet, guided, height)
        errors.add(f"unet, {height} rows, {size}", split, [results], [whole])
    for height in (size, 7):
        whole, vae.run_coder = both_ways(vae, height), split.run_coder
        errors.add(f"vae, {height} rows, {size}", split, both_ways(vae, height), whole)
        del vae.run_coder
        vae.run_coder = VAE(SMALL.vae).run_coder


def measure(out: Path, commands: list[list[str]]) -> int:
    """Write this process's errors; then run the commands, and return the worst status."""
    join_processes("cpu")
    rank, errors = dist.get_rank(), Errors()
    groups = [dist.new_group(list(range(size))) for size in (2, 3, 4)]
    with torch.no_grad():
        for size, group in zip((2, 3, 4), groups, strict=True):
            if rank < size:
                measure_parts(errors, RowSplit(group))
    out.with_suffix(f".{rank}").write_text(json.dumps(errors))
    return 0

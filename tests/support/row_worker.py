"""What each of four processes does with split rows; tests/support/two_processes.py starts them.

The first two and three of them are groups too. Each writes its errors, relative to the whole result, as JSON.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from functools import cache, partial
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
from kolors_core.cli.split import split_pipeline
from kolors_core.conditioning import Conditioning
from kolors_core.context import ImagePrompt
from kolors_core.guidance import guided
from kolors_core.performance.processes import join_processes
from kolors_core.performance.quantize import quantize
from kolors_core.performance.row_split import Ranks, RowSplit, set_coder
from kolors_core.pipelines.pag import perturbed
from kolors_core.pipelines.text_to_image import KolorsPipeline
from kolors_core.schedulers import EulerDiscreteScheduler
from kolors_core.unet import UNet
from kolors_core.vae import VAE
from tests.support.small import SMALL, randomise, relative_error

PROCESSES = 4
# Rows of latents, by processes: at the innermost level 4 or 5, as (2, 3), (1, 1, 2) and (1, 1, 1, 2); on the
# levels above it odd numbers.
HEIGHTS = {2: 19, 3: 13, 4: 19}
WIDTH = 6
VAE_HEIGHT = 5
SCHEDULE = EulerDiscreteScheduler().schedule(2)


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def condition(unet: UNet, seed: int, dtype: torch.dtype = torch.float64) -> Conditioning:
    c = unet.config
    sizes = torch.tensor([[104.0, 48.0, 0.0, 0.0, 104.0, 48.0]])
    text, pooled = (
        noise(1, 7, c.text_dim, seed=8 + seed, dtype=dtype),
        noise(1, c.text_dim, seed=seed, dtype=dtype),
    )
    return Conditioning(text, pooled, sizes, torch.arange(1.0, 8.0)[None])


@cache
def small_unet(dtype: torch.dtype = torch.float64) -> UNet:
    unet = UNet(SMALL.unet).to(dtype).eval()
    randomise(unet)
    return unet


@cache
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
    control = ControlInput(net, noise(1, 3, 8 * HEIGHTS[3], 8 * WIDTH, seed=5).sigmoid())
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


def measure_parts(errors: Errors, split: RowSplit) -> dict[str, int]:
    """Measure the UNet and the VAE alone; return what this process received for a step of the UNet."""
    unet, vae, size = small_unet(), small_vae(), split.ranks.size
    height = HEIGHTS[size]
    whole = denoised(unet, guided, height)
    split.ranks.received.clear()
    found = denoised(unet, split.wrap_rule(guided), height)
    received = dict(split.ranks.received)
    errors.add(f"unet, {size}", split, [found], [whole])
    whole = both_ways(vae, VAE_HEIGHT)
    with splitting(vae, split):
        errors.add(f"vae, {size}", split, both_ways(vae, VAE_HEIGHT), whole)
    return received


@contextmanager
def splitting(vae: VAE, split: RowSplit) -> Iterator[None]:
    set_coder(vae, split)
    try:
        yield
    finally:
        set_coder(vae, None)


def measure_adapters(errors: Errors, split: RowSplit) -> None:
    """Measure a UNet with a LoRA of every layer, an IP-Adapter and a ControlNet, quantized, under PAG; then
    float32.
    """
    unet, rule = deepcopy(small_unet()), partial(perturbed, pag_scale=2.0)
    quantize(unet, 8)
    change = with_all_adapters(unet)
    found, whole = (denoised(unet, r, HEIGHTS[3], change) for r in (split.wrap_rule(rule), rule))
    errors.add("adapters", split, [found], [whole])
    plain = small_unet(torch.float32)
    found, whole = (denoised(plain, r, HEIGHTS[3]) for r in (split.wrap_rule(guided), guided))
    errors.add("float32", split, [found], [whole])


def measure_faults(errors: Errors, split: RowSplit) -> None:
    """Measure the UNet and the VAE where one of the exchanges is spoiled."""
    unet, vae = small_unet(), small_vae()
    whole = [denoised(unet, guided, HEIGHTS[3])], both_ways(vae, VAE_HEIGHT)
    for name in ("extend", "stack", "gather"):
        with fault(name), splitting(vae, split):
            errors.add(
                f"fault: unet, {name}", split, [denoised(unet, split.wrap_rule(guided), HEIGHTS[3])], whole[0]
            )
            errors.add(f"fault: vae, {name}", split, both_ways(vae, VAE_HEIGHT), whole[1])


def with_own_noise(split: RowSplit) -> str:
    """Return the error of processes with different latents."""
    unet = small_unet()
    denoise = split.wrap_rule(guided)(unet, SCHEDULE, condition(unet, 0))
    try:
        denoise(noise(1, 4, HEIGHTS[3], WIDTH, seed=split.ranks.rank), SCHEDULE.sigmas[0].item())
    except ValueError as error:
        return str(error)
    return ""


def measure_pipeline(errors: Errors) -> None:
    """Measure an image of the embedded model, guidance split over two groups of two that split the rows."""
    pipe = KolorsPipeline.from_pretrained()
    pipe.set_progress_bar_config(disable=True)
    pipe.to(torch.float64)

    def draw() -> torch.Tensor:
        generator = torch.Generator().manual_seed(1)
        return pipe("a red apple", 64, 72, 2, negative_prompt="cat", generator=generator, output_type="pt")[0]

    whole = draw()
    split_pipeline(pipe, "guidance")
    errors.add("pipeline, 2 x 2", pipe.vae.run_coder.split, [draw()], [whole])


def measure(out: Path, command: list[str]) -> int:
    """Write this process's errors, and what one of two receives; then return the command's status."""
    join_processes("cpu")
    rank, errors = dist.get_rank(), Errors()
    groups = [dist.new_group(list(range(size))) for size in HEIGHTS]
    splits = [RowSplit(Ranks(group)) for size, group in zip(HEIGHTS, groups, strict=True) if rank < size]
    with torch.no_grad():
        for split in splits:
            received = measure_parts(errors, split)
            if split.ranks.size == 2:
                measure_faults(errors, split)
                out.with_suffix(f".received.{rank}").write_text(json.dumps(received))
                out.with_suffix(f".refused.{rank}").write_text(with_own_noise(split))
            if split.ranks.size == 3:
                measure_adapters(errors, split)
    measure_pipeline(errors)
    out.with_suffix(f".{rank}").write_text(json.dumps(errors))
    return main(command)

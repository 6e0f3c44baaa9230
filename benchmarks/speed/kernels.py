"""Fused kernels and projections, and a half-precision decoder: `python -m benchmarks.speed.kernels OUT`.

For a GPU with Triton; ours alone, random weights, bfloat16, rounds of A B B A. Rows: each kernel at the
UNet's shapes, a guided step with each of the changes, and a decode. About two minutes on an H200,
by arithmetic. --small rehearses it with small models on a CPU, without Triton.
"""

import copy
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import nn

from benchmarks.side_by_side import write_json
from benchmarks.speed import arguments
from benchmarks.speed.unet_step import EMPTY, PROMPT, SCALE, STEPS, embedding
from kolors_core.conditioning import Conditioning, size_ids
from kolors_core.config import KOLORS, TINY, KolorsConfig, UNetConfig
from kolors_core.devices import best_device
from kolors_core.guidance import guided
from kolors_core.performance import fused_kernels
from kolors_core.performance.cuda_graphs import CUDAGraphCache
from kolors_core.performance.fuse_projections import fuse_projections
from kolors_core.performance.fused_kernels import fuse_kernels, has_triton, kernel
from kolors_core.performance.half_precision_vae import HALVES, decode_in, gray_levels
from kolors_core.schedulers import EulerDiscreteScheduler
from kolors_core.unet import UNet
from kolors_core.vae import VAE

Run = Callable[[], Any]
CALLS = 20  # of a kernel in one measurement: one alone is no longer than a launch


def compare(plain: Run, changed: Run, rounds: int, device: torch.device) -> dict[str, float]:
    """Milliseconds of both, medians of rounds A B B A, and their ratio."""

    def timed(run: Run) -> float:
        began = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return 1000 * (time.perf_counter() - began)

    for run in (plain, changed, plain, changed):  # compile and choose kernels
        timed(run)
    times = [[timed(run) for run in (plain, changed, changed, plain)] for _ in range(rounds)]
    ratio = median((b + c) / (a + d) for a, b, c, d in times)
    both = median(a + d for a, _, _, d in times) / 2, median(b + c for _, b, c, _ in times) / 2
    return {"plain_ms": both[0], "changed_ms": both[1], "ratio": ratio}


def kernel_rows(config: UNetConfig, pixels: int, rounds: int, device: torch.device) -> dict[str, Any]:
    """`CALLS` of each kernel beside torch's operators, at each width, of two rows."""
    rows = dict[str, Any]()

    def add(name: str, run: Run) -> None:
        def by(kernels: str) -> Run:
            def call() -> None:
                with kernel(kernels):
                    for _ in range(CALLS):
                        run()

            return call

        rows[name] = compare(by("torch"), by("triton" if has_triton() else "torch"), rounds, device)

    for level, width in enumerate(config.channels):
        side = pixels // 8 >> level
        x = torch.randn(2, width, side, side, device=device, dtype=torch.bfloat16)
        last = x.to(memory_format=torch.channels_last)
        norm: Any = nn.GroupNorm(config.norm_groups, width).to(device, torch.bfloat16)
        norm.__class__ = fused_kernels.FusedGroupNorm
        add(f"group_norm_{width}", lambda x=last, norm=norm: fused_kernels.group_norm(x, norm))
        if config.depths[level]:
            tokens, layer = x.flatten(2).transpose(1, 2).contiguous(), nn.LayerNorm(width)
            layer = layer.to(device, torch.bfloat16)
            wide = torch.randn(2, side * side, 8 * width, device=device, dtype=torch.bfloat16)
            add(f"geglu_{width}", lambda h=wide: fused_kernels.geglu(h))
            add(f"add_{width}", lambda x=tokens, n=layer: fused_kernels.add_layer_norm(x, x, n))
    return rows


def step_rows(config: UNetConfig, pixels: int, rounds: int, device: torch.device) -> dict[str, Any]:
    """A guided step with each of the changes beside the plain one."""
    with torch.device(device):
        unet = UNet(config).to(torch.bfloat16).eval()
    both = [embedding(tokens, config, torch.bfloat16) for tokens in (EMPTY, PROMPT)]
    sizes = size_ids((pixels, pixels), (0, 0), (pixels, pixels)).to(device)
    negative, positive = (
        Conditioning(text.tokens.to(device), text.pooled.to(device), sizes, text.counts.to(device))
        for text in both
    )
    schedule = EulerDiscreteScheduler().schedule(STEPS)
    sigma = schedule.sigmas[STEPS // 2].item()
    x = torch.randn(1, config.in_channels, pixels // 8, pixels // 8, device=device)

    def step(net: UNet, has_graphs: bool) -> Run:
        graphs = CUDAGraphCache() if has_graphs and device.type == "cuda" else None
        denoise = guided(net, schedule, negative, positive, SCALE, wrap_step=graphs)
        return lambda: denoise(x, sigma)

    def everything(net: UNet) -> None:
        fuse_kernels(net)
        fuse_projections(net)

    changes: dict[str, tuple[Callable[[UNet], Any], bool]] = {
        "channels_last": (lambda net: net.to(memory_format=torch.channels_last), False),
        "fused_kernels": (fuse_kernels, False), "fused_projections": (fuse_projections, False),
        "both": (everything, False), "both_with_graphs": (everything, True),
    }  # fmt: skip
    rows = dict[str, Any]()
    for name, (change, has_graphs) in changes.items():
        changed = copy.deepcopy(unet)
        change(changed)
        rows[f"step_{name}"] = compare(step(unet, has_graphs), step(changed, has_graphs), rounds, device)
    return rows


def decode_rows(config: KolorsConfig, pixels: int, rounds: int, device: torch.device) -> dict[str, Any]:
    """A decode in each half precision beside float32, with its difference in gray levels."""
    with torch.device(device):
        vae = VAE(config.vae).eval()
    z = torch.randn(1, config.vae.latent_channels, pixels // 8, pixels // 8, device=device)
    exact, rows = vae.decoder(z), dict[str, Any]()
    for dtype in HALVES:
        times = compare(
            lambda: vae.decoder(z), lambda dtype=dtype: decode_in(dtype, vae.decoder, z), rounds, device
        )
        error = gray_levels(decode_in(dtype, vae.decoder, z), exact)
        rows[f"decode_{str(dtype).removeprefix('torch.')}"] = times | {"gray_levels": error}
    return rows


@torch.no_grad()
def main() -> None:
    parser = arguments(__doc__ or "", 5)
    parser.add_argument("--pixels", type=int, default=1024, help="sides of the image")
    parser.add_argument("--small", action="store_true", help="small models at 128x128, for a CPU")
    given = parser.parse_args()
    config, pixels = (TINY, 128) if given.small else (KOLORS, given.pixels)
    device = best_device()
    rows: dict[str, Any] = {"device": str(device), "pixels": pixels, "triton": has_triton()}
    for part in (
        lambda: kernel_rows(config.unet, pixels, given.rounds, device),
        lambda: step_rows(config.unet, pixels, given.rounds, device),
        lambda: decode_rows(config, pixels, given.rounds, device),
    ):
        rows |= part()
        write_json(rows, given.out / "kernels.json")
    for name, row in rows.items():
        print(name, row)


if __name__ == "__main__":
    main()

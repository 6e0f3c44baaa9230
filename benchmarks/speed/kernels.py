"""Fused kernels and projections, and a half-precision decoder: `python -m benchmarks.speed.kernels OUT`.

For a GPU with Triton; ours alone, random weights, bfloat16, each change beside the plain one in rounds of
A B B A. Rows: each kernel at the UNet's shapes, a guided step with each of the changes, and a decode with its
difference in gray levels. About two minutes on an H200, by arithmetic. --small rehearses it with small models
on a CPU, without Triton.
"""

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.side_by_side import environment, nothing, race, timed, write_json
from benchmarks.speed import arguments
from kolors_core.conditioning import Conditioning, size_ids
from kolors_core.config import KOLORS, TINY, KolorsConfig, UNetConfig
from kolors_core.devices import best_device
from kolors_core.guidance import guided
from kolors_core.performance import fused_kernels
from kolors_core.performance.cuda_graphs import CUDAGraphCache
from kolors_core.performance.fuse_projections import fuse_projections
from kolors_core.performance.fused_kernels import FusedGroupNorm, fuse_kernels, has_triton, kernel
from kolors_core.performance.half_precision_vae import HALVES, decode_in, gray_levels
from kolors_core.schedulers import EulerDiscreteScheduler
from kolors_core.unet import UNet
from kolors_core.vae import VAE

Pair = tuple[str, Callable[[], Any], Callable[[], Any]]  # a row's name, plain and changed
CALLS = 20  # of a kernel in one measurement: one alone is no longer than a launch
STEPS, SCALE, TOKENS = 25, 5.0, 32


def kernels(config: UNetConfig, pixels: int, device: torch.device) -> Iterator[Pair]:
    """Yield `CALLS` of torch's operators and of each kernel, at each width, of two rows."""
    for level, width in enumerate(config.channels):
        side = pixels // 8 >> level
        x = torch.randn(2, width, side, side, device=device, dtype=torch.bfloat16)
        maps, norm = x.to(memory_format=torch.channels_last), FusedGroupNorm(config.norm_groups, width)
        yield by_kernels(f"group_norm_{width}", fused_kernels.group_norm, maps, norm.to(x))
        if config.depths[level]:
            tokens, layer = x.flatten(2).transpose(1, 2).contiguous(), nn.LayerNorm(width).to(x)
            yield by_kernels(f"add_layer_norm_{width}", fused_kernels.add_layer_norm, tokens, tokens, layer)
            yield by_kernels(f"geglu_{width}", fused_kernels.geglu, tokens.repeat(1, 1, 8))


def by_kernels(name: str, function: Callable[..., Any], *given: Any) -> Pair:
    """Return calls of a function by torch's operators and by Triton's kernel."""

    def calls(kernels: str) -> Callable[[], None]:
        def run() -> None:
            with kernel(kernels):
                for _ in range(CALLS):
                    function(*given)

        return run

    return name, calls("torch"), calls("triton" if has_triton() else "torch")


def steps(config: UNetConfig, pixels: int, device: torch.device) -> Iterator[Pair]:
    """Yield a guided step of the plain UNet, and with each of the changes."""
    with torch.device(device):
        unet = UNet(config).to(torch.bfloat16).eval()
        texts = torch.randn(2, 1, TOKENS, config.text_dim, dtype=torch.bfloat16)
        x = torch.randn(1, config.in_channels, pixels // 8, pixels // 8)
    sizes = size_ids((pixels, pixels), (0, 0), (pixels, pixels)).to(device)
    negative, positive = (Conditioning(text, text[:, 0], sizes) for text in texts)
    schedule = EulerDiscreteScheduler().schedule(STEPS)

    def step(net: UNet, has_graphs: bool) -> Callable[[], Tensor]:
        graphs = CUDAGraphCache() if has_graphs else None
        denoise = guided(net, schedule, positive, negative, SCALE, wrap_step=graphs)
        return lambda: denoise(x, schedule.sigmas[STEPS // 2].item())

    def channels_last(net: UNet) -> None:
        net.to(memory_format=torch.channels_last)

    for name, changes in (
        ("channels_last", [channels_last]), ("fused_kernels", [fuse_kernels]),
        ("fused_projections", [fuse_projections]), ("both", [fuse_kernels, fuse_projections]),
    ):  # fmt: skip
        changed = copy.deepcopy(unet)
        for change in changes:
            change(changed)
        for has_graphs in (False, True):
            suffix = "_with_graphs" if has_graphs else ""
            yield f"step_{name}{suffix}", step(unet, has_graphs), step(changed, has_graphs)


@torch.no_grad()
def main() -> None:
    """Measure and write."""
    parser = arguments(__doc__, 5)
    parser.add_argument("--pixels", type=int, default=1024, help="sides of the image")
    parser.add_argument("--small", action="store_true", help="small models at 128x128, for a CPU")
    options = parser.parse_args()
    config: KolorsConfig = TINY if options.small else KOLORS
    pixels, device = 128 if options.small else options.pixels, best_device()
    wait = torch.cuda.synchronize if device.type == "cuda" else nothing
    rows: dict[str, Any] = {"environment": environment(), "pixels": pixels, "has_triton": has_triton()}

    def write(name: str, plain: Callable[[], Any], changed: Callable[[], Any]) -> dict[str, Any]:
        result = race({"plain": timed(plain, wait), "changed": timed(changed, wait)}, options.rounds, 2)
        seconds = {side: result.median(side) for side in ("plain", "changed")}
        rows[name] = seconds | {"ratio": result.ratio("changed", "plain")}
        write_json(rows, options.out / "kernels.json")
        print(f"{name}: {rows[name]['ratio']:.3f} of {1000 * seconds['plain']:.2f} ms", flush=True)
        return rows[name]

    for pairs in (kernels, steps):
        for pair in pairs(config.unet, pixels, device):
            write(*pair)
    with torch.device(device):
        vae = VAE(config.vae).eval()
        z = torch.randn(1, config.vae.latent_channels, pixels // 8, pixels // 8)
    for dtype in HALVES:
        half = partial(decode_in, dtype, vae.decoder, z)
        row = write(f"decode_{str(dtype).removeprefix('torch.')}", lambda: vae.decoder(z), half)
        row["gray_levels"] = gray_levels(half(), vae.decoder(z))
    write_json(rows, options.out / "kernels.json")


if __name__ == "__main__":
    main()

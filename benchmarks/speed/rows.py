"""What processes exchange that split an image's rows, counted, and the time of a step on paper.

    python -m benchmarks.speed.rows

It needs no device: the UNet of full size runs without values, as one of several processes that are not there.
What is counted is of the code; the seconds are arithmetic with the rates below, none of which was measured
for it. Those of one process are of ../../benchmarks/NOTES.md: 34.5 ms a step at 1024x1024.
"""

from collections import Counter
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kolors_core.conditioning import Conditioning
from kolors_core.config import KOLORS
from kolors_core.guidance import guided
from kolors_core.performance.cuda_graphs import tensors_in
from kolors_core.performance.row_split import Ranks, RowSplit
from kolors_core.schedulers import EulerDiscreteScheduler
from kolors_core.unet import UNet

SIDES, PROCESSES = (1024, 2048, 3840), (2, 4, 8)
TOKENS = 26
THIN: dict[str, Any] = {
    "channels": (32, 32, 32), "heads": (1, 1, 1), "text_dim": 16, "context_dim": 16, "size_dim": 8,
}  # fmt: skip
# Milliseconds of a guided step at 1024x1024 on one H200; attention grows by the fourth power of the side.
BY_PIXEL = {"linear": 16.5, "convolutions": 7.2, "other": 7.4}
ATTENTION = 3.4
INNERMOST_ROWS = 2 * 32 * 32  # of a matrix product in the UNet's innermost level, where most of `linear` is
LEAST_ROWS = 512  # a product of fewer has fewer tiles than the GPU has multiprocessors, and takes as long
LINK = 380e9  # bytes a second that a GPU receives from all others: of NVLink's 450e9
LATENCY = 15e-3  # milliseconds of an exchange of few bytes
LAUNCH, CALL = 8e-3, 40e-3  # milliseconds of the host for an operator, and for an exchange


class Unconnected(Ranks):
    """One of several processes that are not there: it counts what it would receive."""

    def __init__(self, rank: int, size: int) -> None:
        self.group, self.rank, self.size = None, rank, size
        self.received, self.calls = Counter(), Counter()

    def _all_gather(self, parts: Tensor, own: Tensor) -> "Unconnected":
        return self

    def wait(self) -> None:
        """Nothing is under way."""

    def check_same(self, x: Tensor) -> None:
        """Nobody is there to compare with."""

    def _send_and_receive(self, pairs: Any) -> None:
        pass


class Launches(TorchDispatchMode):
    """Counts operators that are no views and not only memory."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        old = {x.untyped_storage()._cdata for x in tensors_in((args, kwargs))}
        is_launch = func is not torch.ops.aten.new_empty.default
        self.count += is_launch and any(x.untyped_storage()._cdata not in old for x in tensors_in(result))
        return result


class UniqueRows(TorchDispatchMode):
    """Lets prompts without values differ."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.equal.default:
            return False
        return func(*args, **(kwargs or {}))


def condition(unet: UNet) -> Conditioning:
    """One prompt, in the UNet's dtype and on its device."""
    c, weight = unet.config, unet.conv_in.weight
    text, pooled = weight.new_zeros(1, TOKENS, c.text_dim), weight.new_zeros(1, c.text_dim)
    return Conditioning(text, pooled, torch.zeros(1, 6, device=weight.device))


@torch.no_grad()
def run_step(unet: UNet, side: int, ranks: Ranks | None, is_guided: bool) -> int:
    """Run a step; return how many operators it launched. What is exchanged is counted by the ranks."""
    schedule = EulerDiscreteScheduler().schedule(2)
    positive, negative = condition(unet), condition(unet) if is_guided else None
    rule = guided if ranks is None else RowSplit(ranks).wrap_rule(guided)
    with UniqueRows():
        denoise = rule(unet, schedule, positive, negative, 5.0)
    x = torch.zeros(1, 4, side // 8, side // 8, device=unet.conv_in.weight.device)
    with Launches() as launches:
        denoise(x, schedule.sigmas[0].item())
    return launches.count


def step_on_paper(side: int, launches: int, processes: int, ranks: Ranks | None) -> tuple[float, float]:
    """Return the milliseconds of a step on the GPU and on its host."""
    pixels = (side / 1024) ** 2
    fewest = max(1.0, INNERMOST_ROWS * pixels / LEAST_ROWS)
    gpu = pixels * BY_PIXEL["linear"] / min(processes, fewest)
    gpu += (pixels * (BY_PIXEL["convolutions"] + BY_PIXEL["other"]) + pixels**2 * ATTENTION) / processes
    host = launches * LAUNCH
    if ranks is not None:
        exchanges = sum(ranks.calls.values())
        gpu += exchanges * LATENCY + 1e3 * sum(ranks.received.values()) / LINK
        host += exchanges * CALL
    return gpu, host


def main() -> None:
    """Print the table."""
    thin = UNet(replace(KOLORS.unet, **THIN)).half()  # of all blocks: as many operators
    with torch.device("meta"):
        unet = UNet(KOLORS.unet).half()
    launches = {
        (is_split, is_guided): run_step(thin, 256, Unconnected(1, 4) if is_split else None, is_guided)
        for is_split in (False, True) for is_guided in (False, True)
    }  # fmt: skip
    print("| side | processes | exchanges | MB received: neighbors, norms, keys | operators | GPU ms "
          "| host ms | times as fast | GPU alone |\n|---|---|---|---|---|---|---|---|---|")  # fmt: skip
    for side in SIDES:
        alone = step_on_paper(side, launches[False, True], 1, None)
        print(f"| {side} | 1 | | | {launches[False, True]} | {alone[0]:.1f} | {alone[1]:.1f} | 1 | 1 |")
        for processes, halves in ((n, halves) for n in PROCESSES for halves in (1, 2)):
            size, ranks = processes // halves, None
            if size > 1:
                ranks = Unconnected(size // 2, size)
                run_step(unet, side, ranks, halves == 1)
            operators = launches[size > 1, halves == 1]
            gpu, host = step_on_paper(side, operators, processes, ranks)
            received = ranks.received if ranks else Counter[str]()
            kinds = ("neighbors' rows", "statistics", "keys and values")
            megabytes = ", ".join(f"{received[kind] / 1e6:.1f}" for kind in kinds)
            name = f"{processes}" if halves == 1 else f"2 x {size}"
            exchanges = sum(ranks.calls.values()) if ranks else 0
            print(
                f"| {side} | {name} | {exchanges} | {megabytes} | {operators} | {gpu:.1f} | {host:.1f} "
                f"| {max(alone) / max(gpu, host):.2f} | {alone[0] / gpu:.2f} |"
            )


if __name__ == "__main__":
    main()

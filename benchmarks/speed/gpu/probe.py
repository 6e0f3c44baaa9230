"""What the device can do, at the UNet's own sizes; and one step by kinds of kernels, beside that."""

import re
import statistics
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity
from torch.profiler import profile as recording

from benchmarks.pairs import make_ours
from benchmarks.speed.gpu.counting import count_step, guided_step
from benchmarks.speed.gpu.place import SEED, Place
from kolors_core.performance.quantize import FORMATS, QuantizedLinear
from kolors_core.unet import UNet

PRODUCTS = (
    (2048, 1280, 1280), (2048, 1280, 3840), (2048, 1280, 10240), (2048, 5120, 1280), (8192, 640, 640),
    (8192, 640, 5120), (8192, 2560, 640),
)  # fmt: skip
CONVOLUTIONS = ((320, 320, 128), (640, 640, 64), (1280, 1280, 32), (1920, 640, 64))
# By the names of CUDA's kernels; the first that fits.
KINDS = {
    "attention": r"flash|fmha|sdpa|attention|cudnn_generated_fort",
    "conv": r"conv|fprop|implicit_gemm|nchwToNhwc|nhwcToNchw",
    "gemm": r"gemm|cutlass|nvjet|cublas|sm90_xmma",
    "norm": r"norm|welford|rowwisemoments|computefused",
    "copy": r"copy|cat|memcpy|memset|transpose",
    "elementwise": r"elementwise|vectorized|triton|upsample|silu|gelu",
}


def seconds(where: Place, run: Callable[[], object], rounds: int = 5, warm_ups: int = 2) -> float:
    """The median time of a call."""
    found = []
    for _ in range(warm_ups + (1 if where.is_rehearsal else rounds)):
        where.wait()
        began = time.perf_counter()
        run()
        where.wait()
        found.append(time.perf_counter() - began)
    return statistics.median(found[warm_ups:])


def probe(where: Place) -> None:
    """Write the row of launches, with all rates in its details."""
    calls, x = (50 if where.is_rehearsal else 5000), torch.ones(64, device=where.device)
    host = seconds_of_host(where, lambda: [x.add_(1) for _ in range(calls)]) / calls
    found = {"launch_us": 1e6 * host}
    where.write("probe", 1e6 * host, details=found)
    shrink = 64 if where.is_rehearsal else 1
    square = 8192 // shrink
    rates: dict[str, Any] = {"gemm": product_rate(where, square, square, square, where.bfloat16, calls=1)}
    for m, k, n in PRODUCTS:
        for dtype in {where.half, where.bfloat16}:
            name = f"{m}x{k}x{n}, {str(dtype).removeprefix('torch.')}"
            rates[name] = product_rate(where, m // shrink, k // shrink, n // shrink, dtype)
        for weight_format in FORMATS[3:]:
            rates[f"{m}x{k}x{n}, {weight_format}"] = quantized_rate(
                where, max(m // shrink, 32), max(k // shrink, 16), max(n // shrink, 16), weight_format
            )
    for inputs, outputs, side in CONVOLUTIONS:
        a, b, side = inputs // shrink, outputs // shrink, max(side // shrink, 3)
        rates[f"conv {inputs} to {outputs} at {side}"] = convolution_rate(where, a, b, side)
    where.write("probe", 1e6 * host, details=found | {"tflops": rates})
    where.write("probe", 1e6 * host, details=found | {"tflops": rates, "gb_a_second": copies(where)})


def seconds_of_host(where: Place, run: Callable[[], object]) -> float:
    """The time until a call returns, with nothing waiting for the device."""
    run()
    where.wait()
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def product_rate(where: Place, m: int, k: int, n: int, dtype: torch.dtype, calls: int = 20) -> float:
    """TFLOP/s of x [m, k] times a weight [n, k]."""
    x, weight = (torch.randn(rows, k, device=where.device).to(dtype) for rows in (m, n))
    return calls * 2e-12 * m * k * n / seconds(where, lambda: [F.linear(x, weight) for _ in range(calls)])


def quantized_rate(where: Place, m: int, k: int, n: int, weight_format: Any) -> float | str:
    """The same of a quantized layer, its rounding of inputs included; or why it does not run."""
    x = torch.randn(m, k, device=where.device).to(where.bfloat16)
    try:
        plain = torch.nn.Linear(k, n, bias=False).to(where.device, where.bfloat16)
        layer = QuantizedLinear(plain, weight_format)
        with torch.no_grad():
            return 20 * 2e-12 * m * k * n / seconds(where, lambda: [layer(x) for _ in range(20)])
    except (RuntimeError, NotImplementedError) as error:
        return str(error)[:100]


def convolution_rate(where: Place, inputs: int, outputs: int, side: int) -> list[float]:
    """TFLOP/s of a convolution of 3x3 of two maps, contiguous and channels-last."""
    x = torch.randn(2, inputs, side, side, device=where.device).to(where.half)
    weight = torch.randn(outputs, inputs, 3, 3, device=where.device).to(where.half)
    work = 10 * 2e-12 * 2 * side**2 * 9 * inputs * outputs
    rates = []
    for form in (torch.contiguous_format, torch.channels_last):
        a, w = x.contiguous(memory_format=form), weight.contiguous(memory_format=form)
        rates.append(work / seconds(where, lambda a=a, w=w: [F.conv2d(a, w, padding=1) for _ in range(10)]))
    return rates


def copies(where: Place) -> dict[str, float]:
    """GB/s: on the device, from pinned memory to it, and of pinning."""
    size = 2**20 if where.is_rehearsal else 2**30
    memory = torch.ones(size, dtype=torch.uint8)
    if where.device == "cpu":
        return {"device": 2e-9 * size / seconds(where, memory.clone)}
    there = memory.to(where.device)
    began = time.perf_counter()
    pinned = memory.pin_memory()
    pinning = time.perf_counter() - began
    return {
        "device": 2e-9 * size / seconds(where, there.clone), "pinning": 1e-9 * size / pinning,
        "from_host": 1e-9 * size / seconds(where, lambda: there.copy_(pinned, non_blocking=True)),
    }  # fmt: skip


@torch.no_grad()
def profile(where: Place) -> None:
    """Write the row of one guided step: milliseconds by kind of kernel, beside what its arithmetic takes."""
    unet = make_ours(where.config.unet, SEED, where.half, where.device)
    step = guided_step(unet, where.pixels)
    wall = 1e3 * seconds(where, step)
    with torch.device("meta"):
        paper = UNet(where.config.unet).to(where.half)
    count, _ = count_step(paper, where.pixels)
    square = 8192 if not where.is_rehearsal else 256
    rate = product_rate(where, square, square, square, where.half, calls=1)
    floor = {kind: flops / rate / 1e9 for kind, flops in count.flops.items()}
    value = wall / sum(floor.values())
    counted = {name: dict(getattr(count, name)) for name in ("flops", "bytes", "launches")}
    details: dict[str, Any] = {"wall_ms": wall, "tflops": rate, "floor_ms": floor, "counted": counted}
    where.write("step", value, f"{wall:.1f} ms, floor {sum(floor.values()):.1f}", details)
    kinds, names, launches = by_kind(step, where)
    busy = sum(kinds.values())
    details |= {"kinds_ms": dict(kinds), "gaps_ms": wall - busy, "kernels": launches, "longest_ms": names}
    shown = ", ".join(f"{kind} {ms:.1f}" for kind, ms in kinds.most_common())
    where.write("step", value, f"{wall:.1f} ms, floor {sum(floor.values()):.1f}; {shown}", details)


def by_kind(step: Callable[[], object], where: Place) -> tuple[Counter[str], dict[str, float], int]:
    """Milliseconds of a call's kernels by kind, of the longest ones by name, and how many there are."""
    activities = [ProfilerActivity.CPU]
    if where.device == "cuda" and not where.is_rehearsal:
        activities.append(ProfilerActivity.CUDA)
    with recording(activities=activities) as seen:
        step()
        where.wait()
    kinds, names, launches = Counter[str](), Counter[str](), 0
    for event in seen.events():
        if len(activities) == 1 or event.device_type.name == "CUDA":
            took = event.self_cpu_time_total if len(activities) == 1 else event.time_range.elapsed_us()
            kinds[kind_of(event.name)] += took / 1e3
            names[event.name[:90]] += took / 1e3
            launches += 1
    return kinds, dict(names.most_common(30)), launches


def kind_of(name: str) -> str:
    """The kind of a kernel, by its name."""
    return next((kind for kind, form in KINDS.items() if re.search(form, name, re.IGNORECASE)), "other")

"""Every attention kernel, with and without bias, at every shape that occurs: error and time."""

import time
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.speed.gpu.checks import Checks
from benchmarks.speed.gpu.counting import Shape, attention_shapes
from benchmarks.speed.gpu.place import Place, distance
from kolors_core.attention import KERNELS

ALLOWED = {torch.float16: 2e-3, torch.bfloat16: 1e-2, torch.float32: 2e-5}
ALWAYS = ("sdpa", "chunked", "matmul")  # kernels that may refuse nothing
MOST_SCORES = 2**26  # of float64 at a time
CALLS = 10


def kernels(where: Place) -> None:
    """Write the row of all kernels, after each shape."""
    shapes = attention_shapes(where.config, (where.pixels, where.few_pixels))
    checks = Checks(where, "kernels", total=len(shapes))
    for shape in shapes:
        cases = {}
        for dtype in dtypes_of(shape, where):
            for bias in biases_of(shape):
                cases |= measure(where, shape._replace(bias=bias), dtype)
        checks.add(str(tuple(shape)), cases)


def dtypes_of(shape: Shape, where: Place) -> list[torch.dtype]:
    """The VAE, whose head is wide, is never in float16."""
    if where.is_rehearsal:
        return [torch.float32]
    is_vae = shape.q[1] == 1
    return [torch.float32 if is_vae else torch.float16, torch.bfloat16]


def biases_of(shape: Shape) -> list[tuple[int, ...] | None]:
    """None, and its own or one for each key."""
    return [None, shape.bias or (shape.q[0], 1, 1, shape.keys)]


def measure(where: Place, shape: Shape, dtype: torch.dtype) -> dict[str, dict[str, float | str]]:
    """Error, its limit and microseconds of each kernel by name, or why it refuses."""
    draw, (batch, heads, _, width) = torch.Generator(where.device).manual_seed(0), shape.q
    sizes = shape.q, *[(batch, heads, shape.keys, width)] * 2
    q, k, v = (torch.randn(size, generator=draw, device=where.device).to(dtype) for size in sizes)
    bias = None if shape.bias is None else make_bias(shape.bias, draw).to(dtype)
    expected, found = exact(q, k, v, bias), {}
    for name, kernel in KERNELS.items():
        case: dict[str, float | str] = {"allowed": ALLOWED[dtype]}
        try:
            began = time.perf_counter()
            got = kernel(q, k, v, bias)
            where.wait()
            case["first_ms"] = round(1e3 * (time.perf_counter() - began), 3)
            case |= {
                "error": distance(got, expected),
                "us": round(microseconds(where, kernel, q, k, v, bias), 1),
            }
        except RuntimeError as error:
            case["refused"] = str(error)[:150]
            if name in ALWAYS:
                case["error"] = float("inf")
        kind = f"{str(dtype).removeprefix('torch.')}, {'no bias' if bias is None else 'bias'}"
        found[f"{name}, {kind}"] = case
    return found


def make_bias(shape: tuple[int, ...], draw: torch.Generator) -> Tensor:
    """Logarithms of counts as a prompt has them, or a causal mask: -inf where nothing stands."""
    if shape[-2] > 1:
        allowed = torch.ones(shape, dtype=torch.bool, device=draw.device).tril()
        return torch.zeros(shape, device=draw.device).masked_fill(~allowed, float("-inf"))
    bias = torch.rand(shape, generator=draw, device=draw.device).mul(200).round().log()
    bias[..., :1].zero_()  # each query has something to attend to
    return bias


def exact(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """Attention in float64, some queries at a time."""
    keys, values = k.double(), v.double()
    rows = max(1, MOST_SCORES // (q.shape[0] * q.shape[1] * k.shape[2]))
    if bias is not None:
        bias = bias.double().expand(*bias.shape[:2], q.shape[2], k.shape[2])
    parts = []
    for start in range(0, q.shape[2], rows):
        logits = q[:, :, start : start + rows].double() @ keys.mT * q.shape[-1] ** -0.5
        logits = logits if bias is None else logits + bias[:, :, start : start + rows]
        parts.append(logits.softmax(-1) @ values)
    return torch.cat(parts, dim=2)


def microseconds(where: Place, kernel: Callable[..., Tensor], *inputs: Tensor | None) -> float:
    """The time of a call, of several without waiting for each."""
    calls = 1 if where.is_rehearsal else CALLS
    where.wait()
    began = time.perf_counter()
    for _ in range(calls):
        kernel(*inputs)
    where.wait()
    return 1e6 * (time.perf_counter() - began) / calls

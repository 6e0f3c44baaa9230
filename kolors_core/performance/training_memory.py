"""Memory of a training step without values: what kernels keep for the backward pass, and autocast's copies.

On the meta device torch writes norms out in several operations and knows no autocast. Here a norm or a fused
attention keeps and allocates what a device's kernel does, and `Autocast` casts what torch's autocast casts.
Shapes: B batch, H heads, L queries, S keys, D width of a head.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from kolors_core.performance.memory_tracker import DeviceKernels, MemoryTracker, fused_attention_memory

# Operations by what torch's autocast does with them (its page "Autocast Op Reference"), of those in use here.
IN_HALF = {
    F.linear, F.conv1d, F.conv2d, F.conv3d, F.conv_transpose2d, F.scaled_dot_product_attention, torch.addmm,
    torch.baddbmm, torch.bmm, torch.matmul, torch.mm, Tensor.bmm, Tensor.matmul, Tensor.mm,
    Tensor.__matmul__, Tensor.__rmatmul__,
}  # fmt: skip
IN_FLOAT32: Mapping[str, set[Callable[..., Any]]] = {
    "cuda": {
        F.group_norm, F.layer_norm, F.softmax, torch.softmax, Tensor.softmax, torch.rsqrt, Tensor.rsqrt,
        torch.pow, Tensor.pow, Tensor.__pow__, torch.exp, Tensor.exp, torch.log, Tensor.log, F.mse_loss,
    },
}  # fmt: skip


class _Norm(torch.autograd.Function):
    """Norm that keeps its input, its weight and the statistics of `rows` rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: int, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        stats = x.new_empty(2, rows)
        ctx.save_for_backward(x, weight, bias, stats)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        x, *own = ctx.saved_tensors[:3]
        is_needed = [ctx.needs_input_grad[0], *ctx.needs_input_grad[2:]]
        found = [torch.empty_like(one) if one is not None and is_due else None
                 for one, is_due in zip([x, *own], is_needed, strict=True)]  # fmt: skip
        return found[0], None, *found[1:]


class _Attention(torch.autograd.Function):
    """Fused attention that keeps its inputs, its result and the sums of rows."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, device_type: str) -> Tensor:
        out = fused_attention_memory(q, k, v, device_type)
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        ctx.device_type = device_type
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        q, k, v = ctx.saved_tensors[:3]
        # Flash's kernel on CUDA sums the gradient of q in float32.
        _sums = q.new_empty(q.shape, dtype=torch.float32) if ctx.device_type == "cuda" else None
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), None


class TrainingKernels(DeviceKernels):
    """Context in which attention and norms on the meta device allocate as in training."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = kwargs or {}
        if func is F.group_norm and args[0].is_meta:
            x, groups = args[:2]
            return _Norm.apply(x, len(x) * groups, *_weights(args[2:], named))
        if func is F.layer_norm and args[0].is_meta:
            x, shape = args[:2]
            return _Norm.apply(x, x[(..., *[0] * len(shape))].numel(), *_weights(args[2:], named))
        return super().__torch_function__(func, types, args, kwargs)

    def fused_attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Allocate what torch's fused attention does, and keep what its backward pass reads."""
        found = _Attention.apply(q, k, v, self.device_type)
        assert isinstance(found, Tensor)
        return found


def _weights(args: tuple[Any, ...], named: Mapping[str, Any]) -> tuple[Any, Any]:
    given = dict(zip(("weight", "bias"), args, strict=False)) | {**named}
    return given.get("weight"), given.get("bias")


def training_tracker(device_type: str) -> MemoryTracker:
    """Make a tracker of training on a type of device."""
    return MemoryTracker(device_type, TrainingKernels(device_type))


class Autocast(TorchFunctionMode):
    """Torch's autocast for tensors on the meta device; copies of trained weights live until `region` ends."""

    def __init__(self, device_type: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype, self._float32 = dtype, IN_FLOAT32.get(device_type, set())
        self._depth, self._copies = 0, dict[int, Tensor]()

    @property
    def copied(self) -> int:
        """Bytes of the copies of trained weights that live until `region` ends."""
        return sum(copy.nbytes for copy in self._copies.values())

    @contextmanager
    def region(self) -> Iterator[None]:
        """Cast within the outermost of nested blocks; nothing is cast to float32."""
        if self.dtype == torch.float32 or self._depth:
            yield
            return
        self._depth = 1
        try:
            with self:
                yield
        finally:
            self._depth = 0
            self._copies.clear()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        dtype = self.dtype if func in IN_HALF else torch.float32 if func in self._float32 else None
        if dtype is None:
            return func(*args, **(kwargs or {}))
        named = {name: self._cast(value, dtype) for name, value in (kwargs or {}).items()}
        return func(*(self._cast(value, dtype) for value in args), **named)

    def _cast(self, value: Any, dtype: torch.dtype) -> Any:
        is_cast = isinstance(value, Tensor) and value.is_meta and value.dtype in (torch.float32, self.dtype)
        if not is_cast or value.dtype == dtype:
            return value
        if not (value.is_leaf and value.requires_grad and dtype == self.dtype):
            return value.to(dtype)
        if id(value) not in self._copies:
            self._copies[id(value)] = value.to(dtype)
        return self._copies[id(value)]

"""Memory tracking without values: models run on the meta device, and the bytes of a device are counted.

A `MemoryTracker` follows every storage until it is freed. It does not see what a kernel allocates and frees
within one operation; `fused_attention_memory` and `conv_workspace_bytes` add that. All sizes are in bytes.
"""

import copy
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Any, Self
from weakref import finalize

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from kolors_core.attention import KERNELS, attention_kernel, forced_kernel, select_kernel
from kolors_core.devices import onednn_convolves
from kolors_core.performance.cuda_graphs import tensors_in
from kolors_core.performance.offload import Models, Offload, TransferStream

META = torch.device("meta")
aten = torch.ops.aten


class MemoryTracker(TorchDispatchMode):
    """Context that counts the bytes of new storages on the meta device, and keeps the maximum of each stage.

    device_type: of the simulated device. activations, peak: the maximum by stage, without and with offloaded
    weights, which are allocated while `is_onloading`. Storages from before are not counted. kernels: of the
    device; those of inference if None.
    """

    def __init__(self, device_type: str, kernels: "DeviceKernels | None" = None) -> None:
        super().__init__()
        self.device_type, self.is_onloading = device_type, False
        self.stage: str | None = None
        self.activations, self.peak = dict[str | None, int](), dict[str | None, int]()
        self.kernels = DeviceKernels(device_type) if kernels is None else kernels
        self._now = {"activations": 0, "offloaded_weights": 0}
        self._known: set[int] = set()  # storages that are alive

    @property
    def allocated(self) -> int:
        """Bytes that are allocated now, without offloaded weights."""
        return self._now["activations"]

    def __enter__(self) -> Self:
        self.kernels.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.kernels.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs, kwargs = tensors_in((args, kwargs)), kwargs or {}
        if func is aten.equal.default and inputs[0].is_meta:
            return False  # prompts differ, which takes the most memory
        if func is aten._local_scalar_dense.default and inputs[0].is_meta:
            if inputs[0].dtype is torch.bool:
                return True  # a check, such as that all values are finite
            raise NotImplementedError(f"a plan has no values, and the model reads one of a {inputs[0].dtype}")
        self._see(inputs, is_new=False)
        result = func(*args, **kwargs)
        is_conv = self.device_type == "cpu" and func is aten.convolution.default and result.is_meta
        if is_conv and not args[0].is_contiguous():  # a CPU's convolution keeps channels last
            result = torch.empty_like(result, memory_format=torch.channels_last)
        self._see(tensors_in(result), is_new=True)
        if is_conv:
            self._count(conv_workspace_bytes(args[0], args[1], result))
        elif self.device_type == "cpu" and func is aten.convolution_backward.default and args[0].is_meta:
            self._count(conv_backward_workspace_bytes(*args[:3]))
        return result

    def _see(self, tensors: Sequence[Tensor], is_new: bool) -> None:
        kind = "offloaded_weights" if self.is_onloading else "activations"
        for storage in [tensor.untyped_storage() for tensor in tensors if tensor.is_meta]:
            if storage._cdata not in self._known:
                self._known.add(storage._cdata)
                size = storage.nbytes() if is_new else 0
                self._now[kind] += size
                # Torch keeps the Python object of a storage as long as the storage itself.
                finalize(storage, self._forget, storage._cdata, kind, size)
                self._count()

    def _count(self, workspace: int = 0) -> None:
        """Update the maxima; workspace: bytes that an operation allocates and frees."""
        activations = self._now["activations"] + workspace
        total = activations + self._now["offloaded_weights"]
        for maxima, value in ((self.activations, activations), (self.peak, total)):
            maxima[self.stage] = max(maxima.get(self.stage, 0), value)

    def _forget(self, key: int, kind: str, size: int) -> None:
        self._known.discard(key)
        self._now[kind] -= size


class DeviceKernels(TorchFunctionMode):
    """Context in which attention and GroupNorm on the meta device allocate as a device type's kernels do."""

    def __init__(self, device_type: str) -> None:
        super().__init__()
        self.device_type = device_type

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention and args and args[0].is_meta:
            return self._attention(*args, **(kwargs or {}))
        if func is F.group_norm and self.device_type == "cpu" and args[0].is_meta:
            return torch.empty_like(args[0])  # keeps channels last; on meta, torch's copies its input
        return func(*args, **(kwargs or {}))

    def _attention(self, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """Run the kernel that this device type selects; torch's fused one only allocates."""
        if forced_kernel() is not None:
            return self.fused_attention(q, k, v)
        name = select_kernel(q, k, self.device_type)
        with self, attention_kernel(name):
            return KERNELS[name](q, k, v, attn_mask)

    def fused_attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Allocate what torch's fused attention does."""
        return fused_attention_memory(q, k, v, self.device_type)


def fused_attention_memory(q: Tensor, k: Tensor, v: Tensor, device_type: str) -> Tensor:
    """Allocate what torch's fused attention does, and on MPS, which has none, one matrix of scores."""
    # The workspace has a name, so that it is freed only after the result is allocated.
    scores, logsumexp = (*q.shape[:-1], k.shape[2]), q.shape[:-1]  # [B, H, L, S] and [B, H, L]
    _workspace = q.new_empty(scores) if device_type == "mps" else q.new_empty(logsumexp, dtype=torch.float32)
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[-1]).transpose(1, 2)  # [B, H, L, D]


def conv_workspace_bytes(x: Tensor, weight: Tensor, out: Tensor) -> int:
    """Return the bytes that a convolution allocates and frees on this CPU (from torch's memory events).

    oneDNN copies x [B, ...] and the weight into a blocked layout, frees them, and copies the result back. A
    1x1 kernel needs none of that in float32, in half precision also float32 sums of one image. Without
    oneDNN, a convolution is a matrix product of unfolded inputs (im2col).
    """
    kernel, copied = weight.shape[2:].numel(), 0 if x.is_contiguous() else weight.nbytes
    if not onednn_convolves(x.dtype):
        return 0 if kernel == 1 else copied + x.itemsize * len(x) * weight[0].numel() * out[0, 0].numel()
    if copied:  # with channels last only the weight is copied
        return copied
    if kernel > 1:
        return max(x.nbytes + weight.nbytes, out.nbytes)
    return 0 if x.dtype == torch.float32 else x.nbytes + weight.nbytes + 4 * out[0].numel()


def conv_backward_workspace_bytes(grad: Tensor, x: Tensor, weight: Tensor) -> int:
    """Return the bytes that a convolution's backward pass allocates and frees on this CPU beside its results.

    oneDNN copies the gradient of the output and the weight, or the input, into a blocked layout. Without AVX2
    it unfolds the inputs of each thread as well, which is not counted.
    """
    if not onednn_convolves(x.dtype):
        return x.itemsize * weight[0].numel() * grad[0, 0].numel()
    return max(grad.nbytes + weight.nbytes, grad.nbytes + x.nbytes)


def empty_twin(tensor: Tensor) -> Tensor:
    """Return a tensor of the same layout on the meta device; five times as fast there as `empty_like`."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=META)


class TrackedTransferStream(TransferStream):
    """Stream whose copies, from the meta device to itself, the tracker counts as offloaded weights."""

    def __init__(self, tracker: MemoryTracker) -> None:
        super().__init__(META)
        self.tracker = tracker

    def move_to_cpu(self, tensors: Iterable[Tensor]) -> None:
        """Leave the data where they are."""

    def copy_to_device(self, tensors: Sequence[Tensor]) -> tuple[list[Tensor], Any]:
        """Return empty copies."""
        self.tracker.is_onloading = True
        copies = [empty_twin(tensor) for tensor in tensors]
        self.tracker.is_onloading = False
        return copies, None


class TrackedOffload(Offload):
    """Offload to the meta device, which sets the tracker's stage."""

    def __init__(self, tracker: MemoryTracker, by_block: bool) -> None:
        super().__init__()
        self.start(META, by_block)
        self.transfers, self.tracker = TrackedTransferStream(tracker), tracker

    def enter(self, stage: str | None, models: Models) -> None:
        """Set the tracker's stage, then enter it."""
        self.tracker.stage = stage
        super().enter(stage, models)


class MetaCopy(TorchFunctionMode):
    """Context in which copies of tensors are on the meta device: shapes without values."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.clone:  # copies parameters
            return empty_twin(args[0])
        if func is Tensor.__deepcopy__:  # copies other tensors
            return args[1].setdefault(id(args[0]), empty_twin(args[0]))
        return func(*args, **(kwargs or {}))


def copy_to_meta(value: Any, modules: Iterable[nn.Module], kept: Iterable[Tensor] = ()) -> Any:
    """Copy `value`, and in it these modules, to the meta device: without hooks and not compiled.

    kept: tensors that are not copied, for those whose values are read.
    """
    hooks = (own for module in modules for name, own in vars(module).items() if name.endswith("_hooks"))
    memo: dict[int, Any] = {id(own): OrderedDict() for own in hooks} | {id(tensor): tensor for tensor in kept}
    with MetaCopy():
        return copy.deepcopy(value, memo)

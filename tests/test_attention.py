"""Attention: every kernel equals an explicit softmax, and a forced kernel is the one that runs."""

import pytest
import torch
from torch import Tensor

import kolors_core.attention as attention_module
from kolors_core.attention import KERNELS, attention, attention_kernel, select_kernel
from tests.support.small import EXACT, relative_error

pytestmark = pytest.mark.numerical


def inputs(queries: int = 13, keys: int = 9) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(
        torch.randn(2, 3, n, 16, generator=generator, dtype=torch.float64) for n in (queries, keys, keys)
    )


def biases(queries: int = 13, keys: int = 9) -> list[Tensor | None]:
    generator = torch.Generator().manual_seed(1)
    allowed = torch.rand(2, 1, queries, keys, generator=generator) > 0.3
    allowed[..., 0] = True
    return [None, allowed, torch.randn(2, 3, queries, keys, generator=generator, dtype=torch.float64),
            torch.randn(1, 1, 1, keys, generator=generator, dtype=torch.float64)]  # fmt: skip


@pytest.mark.parametrize("name", ["sdpa", "flash", "cudnn_first", "chunked"])
@pytest.mark.parametrize("bias", range(4))
def test_kernels_agree(name: str, bias: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # Chunks of four queries, the last one shorter.
    monkeypatch.setattr(attention_module, "MPS_SCORE_ELEMENTS", 2 * 3 * 9 * 4)
    q, k, v = inputs()
    with attention_kernel("matmul"):
        expected = attention(q, k, v, biases()[bias])
    with attention_kernel(name):
        assert relative_error(attention(q, k, v, biases()[bias]), expected) < EXACT


class TensorOn:
    """Shape and dtype of a tensor on a device that this machine need not have."""

    def __init__(self, tensor: Tensor, device: str) -> None:
        self.shape, self.dtype, self.device = tensor.shape, tensor.dtype, torch.device(device)


def chosen(tensor: Tensor, device: str) -> str:
    placed = TensorOn(tensor, device)
    return select_kernel(placed, placed)  # type: ignore[arg-type]


def test_the_kernel_is_chosen_by_device_and_shape() -> None:
    """Chunks on MPS for many scores; on CUDA torch chooses by GPU."""
    small, large = torch.empty(1, 1, 8, 4, device="meta"), torch.empty(2, 20, 4096, 64, device="meta")
    assert [chosen(small, "mps"), chosen(large, "mps")] == ["sdpa", "chunked"]
    assert {chosen(tensor, "cpu") for tensor in (small, large)} == {"sdpa"}
    assert {chosen(tensor, "cuda") for tensor in (small, large)} == {"sdpa"}


def test_a_bias_of_another_dtype_is_converted() -> None:
    """cuDNN took float32 for the half precision of q, without an error."""
    q, k, v = (
        torch.randn(1, 2, 5, 8, generator=torch.Generator().manual_seed(i)).bfloat16() for i in range(3)
    )
    bias = torch.linspace(-3, 3, 5)[None, None, None]
    seen = list[torch.dtype]()
    plain = KERNELS["sdpa"]

    def kernel(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        seen.append(bias.dtype)
        return plain(q, k, v, bias)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(KERNELS, "sdpa", kernel)
        with attention_kernel("sdpa"):
            attention(q, k, v, bias)
            attention(q, k, v, bias > 0)
    assert seen == [torch.bfloat16, torch.bool]


@pytest.mark.exact
def test_an_unknown_kernel_and_one_that_cannot_run_are_errors() -> None:
    with (
        pytest.raises(ValueError, match="attention kernel 'fast' is not one of sdpa, flash"),
        attention_kernel("fast"),
    ):
        pass
    with (
        attention_kernel("cudnn"),
        pytest.raises(RuntimeError, match="forced attention kernel 'cudnn' cannot run q"),
    ):
        attention(*inputs())
    assert torch.isfinite(attention(*inputs())).all(), "after the block the choice is free again"


@pytest.mark.parametrize(
    ("shape", "keys", "name"),
    [
        ((2, 20, 256, 64), 256, "matmul"),  # an image of 256 pixels
        ((1, 16, 577, 64), 577, "sdpa"),
        ((2, 20, 1024, 64), 77, "matmul"),
        ((2, 20, 1024, 64), 21, "sdpa"),  # the text with merged pads
        ((2, 20, 1024, 64), 1024, "sdpa"),
        ((1, 1, 4096, 512), 4096, "matmul"),  # the VAE at 512 pixels
        ((1, 1, 16384, 512), 16384, "sdpa"),  # at 1024 the scores would take a gigabyte
    ],
)
def test_on_a_cpu_in_bfloat16_short_rows_and_wide_heads_use_matmul(
    shape: tuple[int, ...], keys: int, name: str
) -> None:
    q = torch.empty(shape, dtype=torch.bfloat16, device="meta")
    k = torch.empty((*shape[:2], keys, shape[3]), dtype=torch.bfloat16, device="meta")
    placed = [TensorOn(tensor, "cpu") for tensor in (q, k)]
    with torch.no_grad():
        assert select_kernel(*placed) == name  # type: ignore[arg-type]
    assert select_kernel(*placed) == "sdpa"  # type: ignore[arg-type]
    full = [TensorOn(tensor.float(), "cpu") for tensor in (q, k)]
    with torch.no_grad():
        assert select_kernel(*full) == "sdpa"  # type: ignore[arg-type]


@pytest.mark.exact
def test_every_kernel_has_a_name() -> None:
    assert {"sdpa", "flash", "cudnn", "efficient", "cudnn_first", "chunked", "matmul"} == set(KERNELS)

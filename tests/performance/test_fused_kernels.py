"""Fused kernels: the operators' results up to rounding at every shape of the UNet, and torch's elsewhere.

Without a CUDA device Triton's interpreter runs the kernels on the CPU (conftest.py), one program at a time.
"""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kolors_core.config import KOLORS, TINY
from kolors_core.context import Context
from kolors_core.module import settings
from kolors_core.performance import fused_kernels
from kolors_core.performance.compile import compile_blocks
from kolors_core.performance.cuda_graphs import NetState
from kolors_core.performance.fused_kernels import (
    FUSED,
    FusedGroupNorm,
    fuse_kernels,
    has_triton,
    kernel,
    unfuse_kernels,
)
from kolors_core.performance.model_version import ModelVersion
from kolors_core.unet import ResBlock, Transformer, TransformerBlock, UNet
from tests.support.small import EXACT, SHALLOW, randomise, relative_error
from tests.test_unet import inputs

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_triton = pytest.mark.skipif(
    not has_triton(), reason="Triton, with torch for CUDA on Linux, is not here"
)
# A value's rounding; the interpreter rounds to bfloat16 towards zero.
EPS = {torch.float32: 4e-6, torch.float16: 2**-10, torch.bfloat16: 2**-8 if DEVICE == "cuda" else 2**-7}
DTYPES = [pytest.param(dtype, id=str(dtype).partition(".")[2]) for dtype in EPS]


def draw(*shape: int, dtype: torch.dtype, mean: float = 0.0) -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))
    return (values + mean).to(dtype).to(DEVICE)


def assert_rounded(result: Tensor, exact: Tensor) -> None:
    """Each value is off by its own rounding, small ones by that of sums of values near 1."""
    assert result.shape == exact.shape and torch.isfinite(result).all()
    error = (result.double() - exact).abs() / (exact.abs() + 1)
    assert error.max() <= EPS[result.dtype], f"{error.max().item():.2e}"


def with_random_weights(norm: Any, dtype: torch.dtype) -> Any:
    randomise(norm)
    return norm.to(dtype).to(DEVICE)


def is_channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last)


def sizes_of(kind: type[nn.Module], size: Callable[[Any], int]) -> list[int]:
    """A size of all such modules of Kolors' and TINY's UNet."""
    with torch.device("meta"):
        parts = [part for config in (KOLORS, TINY) for part in UNet(config.unet).modules()]
    return sorted({size(part) for part in parts if isinstance(part, kind)})


@needs_triton
@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES)
def test_geglu_and_add_layer_norm_at_every_width(dtype: torch.dtype) -> None:
    """The UNet's widths, and some that are no multiple of anything."""
    widths = sizes_of(nn.LayerNorm, lambda norm: norm.normalized_shape[0])
    assert widths[-2:] == [640, 1280]
    for rows, width in enumerate((37, 333, *widths), 1):
        h, x, y = (draw(2, rows, n, dtype=dtype) for n in (8 * width, width, width))
        y = y * 3 + 20  # the mean is large beside the deviation
        value, gate = h.double().chunk(2, dim=-1)
        norm = with_random_weights(nn.LayerNorm(width, eps=0.1), dtype)
        with kernel("triton"):
            fused, (total, normed) = fused_kernels.geglu(h), fused_kernels.add_layer_norm(x, y, norm)
        assert_rounded(fused, value * F.gelu(gate))
        assert_rounded(total, x.double() + y.double())
        assert dtype == torch.bfloat16 or torch.equal(total, x + y)
        weights = norm.weight.double(), norm.bias.double()
        assert_rounded(normed, F.layer_norm(total.double(), (width,), *weights, norm.eps))


@needs_triton
@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES)
def test_group_norm_at_every_width_and_size(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The UNet's widths of a group, a map of one pixel, odd sides, more chunks than are pooled at a time."""
    from kolors_core.performance import triton_kernels

    monkeypatch.setattr(triton_kernels, "POOLED", 8)
    widths = sizes_of(nn.GroupNorm, lambda norm: norm.num_channels // norm.num_groups)
    assert widths[-3:] == [40, 60, 80]
    maps = [(2, 2 * width, 1 + width % 3, 1 + width % 4) for width in widths]
    for groups, channels, height, width in ((32, 320, 3, 5), (4, 12, 16, 33), (4, 80, 1, 1), *maps):
        batch, eps = 1 + (channels < 100), 0.1 if channels == 160 else 1e-5
        x = draw(batch, channels, height, width, dtype=dtype, mean=3.0)
        last = x.to(memory_format=torch.channels_last)
        norm = with_random_weights(FusedGroupNorm(groups, channels, eps=eps), dtype)
        exact = F.group_norm(x.double(), groups, norm.weight.double(), norm.bias.double(), eps)
        with kernel("triton"):
            normed, active = (fused_kernels.group_norm(last, norm, has_silu) for has_silu in (False, True))
        assert_rounded(normed, exact)
        assert_rounded(active, F.silu(exact))
        assert is_channels_last(normed)


@needs_triton
@torch.no_grad()
def test_group_norm_loses_no_digits_to_a_large_mean() -> None:
    x = draw(1, 32, 24, 24, dtype=torch.float32, mean=1000.0).to(memory_format=torch.channels_last)
    norm = FusedGroupNorm(4, 32).to(DEVICE)
    with kernel("triton"):
        normed = fused_kernels.group_norm(x, norm, has_silu=False)
    error = relative_error(normed, F.group_norm(x.double(), 4, eps=norm.eps))
    assert error < 3e-4  # of sums of squares: 0.03


def fused_pair() -> tuple[UNet, UNet]:
    """A plain UNet, and a fused copy; few groups, as the interpreter takes its time for each."""
    plain = UNet(replace(SHALLOW.unet, norm_groups=4)).eval().to(DEVICE)
    randomise(plain)
    fused = copy.deepcopy(plain)
    fuse_kernels(fused)
    return plain, fused


def given(dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    wanted = inputs(1, 4, 3, dtype)
    return {name: tensor.to(DEVICE) for name, tensor in wanted.items()}


def count_kernels(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels that are called from now on."""
    from kolors_core.performance import triton_kernels

    called: list[str] = []

    def counted(name: str, own: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *inputs: (called.append(name), own(*inputs))[1]

    for name in ("geglu", "add_layer_norm", "group_norm"):
        monkeypatch.setattr(triton_kernels, name, counted(name, getattr(triton_kernels, name)))
    return called


@needs_triton
@torch.no_grad()
def test_the_unet_runs_all_of_them_on_channels_last_maps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing turns a map back: each of the norms but the last, which no block has, runs by the kernel."""
    plain, fused = fused_pair()
    called, wanted = count_kernels(monkeypatch), plain(**given())
    with kernel("triton"):
        assert relative_error(fused(**given()), wanted) < 5e-6
    blocks = sum(isinstance(module, TransformerBlock) for module in plain.modules())
    norms = sum(isinstance(module, nn.GroupNorm) for module in plain.modules())
    assert {name: called.count(name) for name in set(called)} == {
        "geglu": blocks, "add_layer_norm": 2 * blocks, "group_norm": norms,
    }  # fmt: skip
    called.clear()
    with kernel("torch"):
        assert relative_error(fused(**given()), wanted) < 5e-6
    assert not called
    unfuse_kernels(fused)
    assert torch.equal(fused(**given()), wanted) and type(fused.mid.resnets[0]) is type(plain.mid.resnets[0])


@needs_triton
def test_torch_runs_where_no_kernel_is_written_for_the_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients, autocast, float64, another layout, a hook on a norm, and the compiler."""
    plain, fused = fused_pair()
    called, x = count_kernels(monkeypatch), given()
    with kernel("triton"):
        fused(**x).sum().backward()
        plain(**x).sum().backward()
        assert not called
        mine, other = (
            torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
            for model in (fused, plain)
        )
        assert relative_error(mine, other) < 1e-5
        with torch.no_grad(), torch.autocast(DEVICE, torch.bfloat16):
            fused(**x)
        with torch.no_grad():
            wide = copy.deepcopy(fused).double()
            wide(**given(torch.float64))
            norm = fused.mid.resnets[0].norm1
            fused_kernels.group_norm(draw(1, 32, 4, 4, dtype=torch.float32), norm)
            seen: list[Tensor] = []
            hook = norm.register_forward_hook(lambda _module, _given, result: seen.append(result))
            last = draw(1, 32, 4, 4, dtype=torch.float32).to(memory_format=torch.channels_last)
            fused_kernels.group_norm(last, norm)
            hook.remove()
            assert len(seen) == 1 and not called
            fused_kernels.group_norm(last, norm)
            assert called == ["group_norm"]
            called.clear()
            block: Any = fused.mid.attentions[0].blocks[0]  # pyright: ignore
            tokens = draw(1, 5, 32, dtype=torch.float32), Context(draw(1, 3, 48, dtype=torch.float32))
            eager = block(*tokens)
            assert set(called) == {"geglu", "add_layer_norm"}
            called.clear()
            compile_blocks(block, backend="eager")
            assert relative_error(block(*tokens), eager) < 5e-6 and not called
    torch.compiler.reset()


@needs_triton
@torch.no_grad()
def test_norms_that_a_researcher_put_in_run_by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without weights, of several axes, of another class or forward; wrong sizes are torch's error."""
    called, x = count_kernels(monkeypatch), draw(2, 3, 64, dtype=torch.float32)
    replaced, bare = nn.LayerNorm(64), nn.LayerNorm(64, elementwise_affine=False)
    vars(replaced)["forward"] = torch.zeros_like
    with kernel("triton"):
        for norm in (bare, nn.LayerNorm((3, 64)), nn.RMSNorm(64), replaced):
            total, normed = fused_kernels.add_layer_norm(x, x, norm.to(DEVICE))  # pyright: ignore
            assert torch.equal(total, 2 * x) and torch.equal(normed, norm(2 * x))
        with pytest.raises(RuntimeError, match="normalized_shape"):
            fused_kernels.add_layer_norm(x, x, nn.LayerNorm(65).to(DEVICE))
        maps = draw(1, 8, 2, 2, dtype=torch.float32).to(memory_format=torch.channels_last)
        plain = FusedGroupNorm(4, 8, affine=False)
        assert torch.equal(fused_kernels.group_norm(maps, plain, has_silu=False), F.group_norm(maps, 4))
        with pytest.raises(RuntimeError, match="weight"):
            fused_kernels.group_norm(maps, FusedGroupNorm(4, 16).to(DEVICE))
    assert not called


@torch.no_grad()
def test_without_triton_torchs_operators_run_and_unfusing_is_exact() -> None:
    """On maps in another layout; blocks of a researcher's own class stay what they are."""
    plain = UNet(SHALLOW.unet).double().eval()
    randomise(plain)
    fused, wanted = copy.deepcopy(plain), plain(**given(torch.float64))
    mine = type("Mine", (ResBlock,), {})
    fused.mid.resnets[0].__class__ = mine
    fuse_kernels(fused)
    kinds = {type(module) for module in fused.modules()}
    assert {*FUSED.values(), mine} <= kinds and not {nn.GroupNorm, TransformerBlock} & kinds
    layouts = list[bool]()
    for part in (*(part for part in fused.modules() if isinstance(part, Transformer)), fused.conv_out):
        part.register_forward_pre_hook(lambda _part, given: layouts.append(is_channels_last(given[0])))
    with kernel("torch"):
        assert relative_error(fused(**given(torch.float64)), wanted) < EXACT
        assert len(layouts) > 3 and all(layouts)
    unfuse_kernels(fused)
    fused.mid.resnets[0].__class__ = ResBlock
    assert torch.equal(fused(**given(torch.float64)), wanted)
    assert [*map(type, fused.modules())] == [*map(type, plain.modules())]


def test_recordings_and_step_caches_are_told_of_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_kernels, "has_triton", lambda: True)
    unet = UNet(SHALLOW.unet)
    assert not settings(unet)
    fuse_kernels(unet)
    state, version = NetState([unet]), ModelVersion(unet)
    found = []
    for name in ("torch", "triton", "torch"):
        with kernel(name):
            found.append((state.key(), version.read()))
    keys, versions = zip(*found, strict=True)
    assert keys[0] == keys[2] != keys[1] and versions == (1, 2, 3)


def test_kernels_are_chosen_by_device_or_forced_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setattr(fused_kernels, "has_triton", lambda: True)
    assert [fused_kernels.select_kernel(device) for device in (cpu, cuda)] == ["torch", "triton"]
    with kernel("torch"):
        assert fused_kernels.select_kernel(cuda) == "torch" == fused_kernels.forced_kernel()
    with kernel("triton"):
        assert fused_kernels.select_kernel(cpu) == "triton"
    with pytest.raises(ValueError, match="fused kernel 'cuda' is not one of torch, triton"), kernel("cuda"):
        pass
    monkeypatch.setattr(fused_kernels, "has_triton", lambda: False)
    assert fused_kernels.select_kernel(cuda) == "torch"
    with pytest.raises(ValueError, match="needs the package triton, which is not installed"):
        fused_kernels.force_kernel("triton")
    assert fused_kernels.forced_kernel() is None

"""Page-locked memory: how much is taken, that it is given back, and memory freed while it is written."""

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from kolors_core.chatglm import ChatGLM
from kolors_core.config import KOLORS
from kolors_core.performance import pinned_memory
from kolors_core.performance.offload import Offload, blocks_of, bytes_of, tensors_of
from kolors_core.performance.pinned_memory import ALIGNMENT, pin, place, unpin
from kolors_core.unet import UNet
from kolors_core.vae import VAE
from tests.support.device_places import Models, Place
from tests.support.simulated_device import Simulation, simulated_cuda, simulates
from tests.support.simulated_streams import Copy


def test_tensors_do_not_overlap_and_lie_in_chunks() -> None:
    sizes = [3, 0, 1000, 64, 65, 4096, 4097, 12, 2**20 + 1]
    chunks, places = place(sizes)
    assert all(size.bit_count() == 1 for size in chunks)
    taken = sorted((*where, size) for where, size in zip(places, sizes, strict=True))
    for chunk, offset, size in taken:
        assert offset % ALIGNMENT == 0 and offset + size <= chunks[chunk]
    for (chunk, offset, size), (other, start, _) in zip(taken, taken[1:], strict=False):
        assert chunk != other or offset + size <= start
    assert place([]) == ([], [])


def test_kolors_takes_little_more_than_it_has() -> None:
    """In float16, by model and by block; tensor by tensor it was 21.7 GB of 17.3."""
    with torch.device("meta"):
        models: list[nn.Module] = [ChatGLM(KOLORS.text_encoder), UNet(KOLORS.unet), VAE(KOLORS.vae)]
    units = [[((model, ""),)] for model in models]
    blocks = [((model, path),) for model in models for path in blocks_of(model)]
    whole = sum(bytes_of(unit) for listed in units for unit in listed) // 2

    def taken(listed: list[tuple[tuple[nn.Module, str], ...]]) -> float:
        sizes = ([tensor.nbytes // 2 for tensor in tensors_of(unit).values()] for unit in listed)
        return sum(sum(place(one)[0]) for one in sizes) / whole

    assert whole > 17.2e9
    assert taken([unit for listed in units for unit in listed]) < 1.025
    assert taken(blocks) < 1.07


@pytest.fixture
def simulation() -> Iterator[Simulation]:
    with simulated_cuda() as found:
        yield found


@simulates
@pytest.mark.parametrize("by_block", [False, True])
def test_offload_gives_its_page_locked_memory_back(by_block: bool, simulation: Simulation) -> None:
    model = nn.Sequential(nn.Conv2d(3, 40, 3), nn.Linear(100, 30), nn.BatchNorm1d(7)).eval()
    model[0].weight.data = model[0].weight.data.contiguous(memory_format=torch.channels_last)
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    strides, offload = model[0].weight.stride(), Offload()
    offload.start(torch.device("cuda", 0), by_block)
    offload.enter(None, {"unet": [model]})
    if by_block:
        for name in list(offload._units):
            offload.onload(name)
    else:
        offload.enter("unet", {"unet": [model]})
    offload.enter(None, {"unet": [model]})
    whole = sum(tensor.nbytes for tensor in expected.values())
    assert all(tensor.is_pinned() for tensor in model.state_dict().values())
    assert whole <= simulation.pinned_bytes < 1.6 * whole + 2048
    assert model[0].weight.stride() == strides
    offload.end()
    gc.collect()
    assert simulation.pinned_bytes == 0
    assert not any(tensor.is_pinned() for tensor in model.state_dict().values())
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    assert model[0].weight.stride() == strides


@simulates
def test_pinned_tensors_keep_their_values_and_dtypes(simulation: Simulation) -> None:
    kinds = (torch.float32, torch.bfloat16, torch.int8, torch.bool, torch.float64)
    tensors = [torch.randn(5, 3).mul(4).to(kind).t() for kind in kinds] + [
        torch.tensor(3.0),
        torch.zeros(0, 2),
    ]
    before = [tensor.clone() for tensor in tensors]
    pin(tensors)
    for tensor, old in zip(tensors, before, strict=True):
        assert torch.equal(tensor, old) and tensor.dtype == old.dtype
        assert tensor.is_pinned() or not tensor.numel()


@simulates
def test_no_more_than_a_chunk_is_in_memory_twice(
    simulation: Simulation, monkeypatch: pytest.MonkeyPatch
) -> None:
    freed, empty = list[int](), torch.accelerator.empty_host_cache

    def empty_host_cache() -> None:
        freed.append(simulation.cached_pinned_bytes)
        empty()

    monkeypatch.setattr(torch.accelerator, "empty_host_cache", empty_host_cache)
    monkeypatch.setattr(pinned_memory, "LARGEST_CHUNK", 4096)
    tensors = [torch.ones(512) for _ in range(8)]
    pin(tensors)
    assert simulation.pinned_bytes == 4 * 4096
    unpin(tensors)
    assert freed == [4096] * 4 and simulation.pinned_bytes == 0


@simulates
def test_a_pipeline_is_dropped_with_a_copy_under_way(
    simulation: Simulation, small_tokenizer: Path, tmp_path: Path
) -> None:
    """The computation waits for the copy before its memory is freed, and may be given to others."""
    at = Place("block", "cuda", Models.make(small_tokenizer, tmp_path))
    pipe, lost = at.put(at.pipe()), Copy.lost
    pipe._enter_stage("unet")
    pipe.offload.onload(next(iter(pipe.offload._units)))
    assert pipe.offload._prefetched, "the next block is being copied"
    del pipe
    gc.collect()
    assert Copy.lost == lost

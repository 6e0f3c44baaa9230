"""The same weights draw the same bits, whichever file, shard or alignment they came from."""

import copy
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save
from torch import Tensor, nn

from kolors_core import EulerDiscreteScheduler, KolorsPipeline
from kolors_core.chatglm import ChatGLM
from kolors_core.checkpoint import load_component
from kolors_core.loading import load
from kolors_core.tokenizer import Tokenizer
from kolors_core.unet import UNet
from kolors_core.vae import VAE
from tests.support.loras import ATTENTION, factors, peft_names
from tests.support.offloads import offloaded
from tests.support.small import SMALL, randomise
from weights_convert.__main__ import convert
from weights_convert.safetensors_files import ALIGNMENT, Source, Tensors, aligned

pytestmark = pytest.mark.numerical

MODELS = ("text_encoder", "unet", "vae")
ODD = "decoder.conv_out.bias"  # of three numbers: what follows moves by no multiple of 8 bytes


def draw(pipe: KolorsPipeline) -> Tensor:
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipe("a cat", height=32, width=40, num_inference_steps=2, generator=generator, output_type="pt")[0]


def tensors_of(pipe: KolorsPipeline) -> list[Tensor]:
    return [parameter for name in MODELS for parameter in getattr(pipe, name).parameters()]


@pytest.fixture(scope="module")
def pipe(small_tokenizer: Path) -> KolorsPipeline:
    """Every parameter where torch itself put it."""
    made = {"text_encoder": ChatGLM(SMALL.text_encoder), "unet": UNet(SMALL.unet), "vae": VAE(SMALL.vae)}
    for seed, model in enumerate(made.values()):
        randomise(model.eval(), seed)
    return KolorsPipeline(**made, tokenizer=Tokenizer(small_tokenizer), scheduler=EulerDiscreteScheduler())


@pytest.fixture(scope="module")
def folder(pipe: KolorsPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("alignment") / "folder"
    pipe.save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def drawn(pipe: KolorsPipeline) -> Tensor:
    return draw(pipe)


def write(state: Mapping[str, Tensor], file: Path, filler: int, first: str | None = None) -> None:
    """Write a safetensors file whose tensors begin `filler` bytes later, the named one before all others."""
    content = save(dict(state))
    size = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + size]), content[8 + size :]
    names = sorted(header, key=lambda name: (name != first, header[name]["data_offsets"]))
    blocks, end = [], 0
    for name in names:
        start, stop = header[name]["data_offsets"]
        blocks.append(data[start:stop])
        header[name]["data_offsets"] = [end, end + stop - start]
        end += stop - start
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 64 + filler)
    file.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(blocks))


def test_files_hold_every_alignment(pipe: KolorsPipeline, drawn: Tensor, tmp_path: Path) -> None:
    """A header ends at any multiple of 8, and tensors before may move those of float32 by 4."""
    loaded = KolorsPipeline(**pipe.components)
    seen = set[int]()
    for filler in range(0, 64, 8):
        for first in (None, ODD):
            for name in MODELS:
                model, file = getattr(pipe, name), tmp_path / f"{name}.safetensors"
                write(model.state_dict(), file, filler, first)
                source = Source([file])
                seen |= {source.mapped(tensor).data_ptr() % ALIGNMENT for tensor in source}
                with torch.device("meta"):
                    fresh = type(model)(model.config).eval()
                load(fresh, source, name)
                setattr(loaded, name, fresh)
            assert not any(tensor.data_ptr() % ALIGNMENT for tensor in tensors_of(loaded))
            assert torch.equal(draw(loaded), drawn), (filler, first)
    assert seen == set(range(0, 64, 4)), "the files have every alignment that float32 can have"


@pytest.mark.parametrize("offset", [1, 7, 9, 13])
def test_a_dict_of_views(offset: int, pipe: KolorsPipeline, drawn: Tensor) -> None:
    """Tensors that lie in one buffer, at every alignment, and transposed in memory."""
    loaded = KolorsPipeline(**pipe.components)
    for name in MODELS:
        model = getattr(pipe, name)
        state, start = {}, 0
        buffer = torch.empty(sum(tensor.numel() + offset for tensor in model.parameters()))
        for key, tensor in model.state_dict().items():
            start += offset
            view = (
                buffer[start : start + tensor.numel()]
                .view(tensor.shape[::-1])
                .permute(*range(tensor.ndim)[::-1])
            )
            state[key] = view.copy_(tensor)
            start += tensor.numel()
        fresh = type(model)(model.config).eval()
        load(fresh, Tensors(state, "a dict"), name)
        setattr(loaded, name, fresh)
    assert all(tensor.is_contiguous() for tensor in tensors_of(loaded))
    assert torch.equal(draw(loaded), drawn)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_where_it_lies(dtype: torch.dtype, pipe: KolorsPipeline) -> None:
    """At alignments of every multiple of 2, where nothing is copied; the VAE stays in float32."""
    halves = {name: copy.deepcopy(getattr(pipe, name)).to(dtype) for name in ("text_encoder", "unet")}
    expected = draw(KolorsPipeline(**pipe.components | halves))
    for offset in range(1, 32, 5):
        views = dict[str, nn.Module]()
        for name, model in halves.items():
            state, start = {}, 0
            buffer = torch.empty(sum(tensor.numel() + 63 for tensor in model.parameters()), dtype=dtype)
            for key, tensor in model.state_dict().items():
                start += -(buffer.data_ptr() // 2 + start) % 32 + offset
                state[key] = buffer[start : start + tensor.numel()].view(tensor.shape).copy_(tensor)
                start += tensor.numel()
            views[name] = type(model)(model.config).eval()
            load(views[name], Tensors(state, "a dict"), name, dtype=dtype)
            pointers = [parameter.data_ptr() for parameter in views[name].parameters()]
            assert all(pointer % ALIGNMENT == 2 * offset for pointer in pointers)
        assert torch.equal(draw(KolorsPipeline(**pipe.components | views)), expected), offset


def loaded(folder: Path, place: Path) -> KolorsPipeline:
    return KolorsPipeline.from_pretrained(folder)


def converted(folder: Path, place: Path) -> KolorsPipeline:
    convert(folder, place / "converted")
    return KolorsPipeline.from_pretrained(place / "converted")


def sharded(folder: Path, place: Path) -> KolorsPipeline:
    """Three files for each model, cut where their headers differ in length."""
    shutil.copytree(folder, place / "shards")
    for name in MODELS:
        [file] = (place / "shards" / name).glob("*.safetensors")
        source = Source([file])
        names, weight_map = list(source), {}
        for part in range(3):
            shard = file.with_name(f"{file.stem}-{part + 1:05}-of-00003.safetensors")
            write({key: source[key] for key in names[part::3]}, shard, 8 * part)
            weight_map |= {key: shard.name for key in names[part::3]}
        file.unlink()
        index = {"metadata": {}, "weight_map": weight_map}
        file.with_name(f"{file.name}.index.json").write_text(json.dumps(index))
    return KolorsPipeline.from_pretrained(place / "shards")


def single(folder: Path, place: Path) -> KolorsPipeline:
    KolorsPipeline.from_pretrained(folder).save_single_file(place / "one.safetensors")
    return KolorsPipeline.from_single_file(place / "one.safetensors")


def saved_again(folder: Path, place: Path) -> KolorsPipeline:
    KolorsPipeline.from_pretrained(folder).save_pretrained(place / "again")
    return KolorsPipeline.from_pretrained(place / "again")


def fused_and_unfused(folder: Path, place: Path) -> KolorsPipeline:
    pipe = KolorsPipeline.from_pretrained(folder)
    pipe.load_lora_weights(peft_names("unet", factors(pipe.unet, "unet", ATTENTION)))
    before = draw(pipe)
    pipe.fuse_lora()
    pipe.unfuse_lora()
    assert torch.equal(draw(pipe), before), "with the LoRA, after it was fused and unfused"
    pipe.unload_lora_weights()
    return pipe


def offloaded_and_back(folder: Path, place: Path) -> KolorsPipeline:
    pipe = KolorsPipeline.from_pretrained(folder)
    with offloaded(pipe):
        draw(pipe)
    return pipe


WAYS = (loaded, converted, sharded, single, saved_again, fused_and_unfused, offloaded_and_back)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_ways_to_the_same_weights(
    way: Callable[..., KolorsPipeline], folder: Path, drawn: Tensor, tmp_path: Path
) -> None:
    pipe = way(folder, tmp_path)
    assert torch.equal(draw(pipe), drawn)
    assert not any(tensor.data_ptr() % ALIGNMENT for tensor in tensors_of(pipe))


def test_a_single_component(folder: Path, pipe: KolorsPipeline) -> None:
    unet = load_component(folder, "unet")
    assert isinstance(unet, nn.Module)
    assert not any(tensor.data_ptr() % ALIGNMENT for tensor in unet.parameters())


def test_what_lies_well_is_not_copied() -> None:
    tensor = torch.randn(3, 5)
    assert aligned(tensor) is tensor
    view = torch.randn(20)[1:16].view(3, 5)
    assert torch.equal(aligned(view), view) and aligned(view).data_ptr() % ALIGNMENT == 0

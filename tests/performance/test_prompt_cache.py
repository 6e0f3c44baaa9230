"""Prompts known from before: found again after a move and in another process, never after a change."""

import os
import shutil
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from kolors_core import KolorsPipeline
from kolors_core.adapters.lora import TEXT_TARGETS, attach
from kolors_core.chatglm import ChatGLM
from kolors_core.performance.prompt_cache import Key, PromptCache
from kolors_core.performance.quantize import quantize
from kolors_core.precompute import Savings
from kolors_core.tokenizer import TokenBatch
from tests.support.offloads import offloaded
from tests.support.pipelines import Pair, steps_of
from tests.support.simulated_device import simulated_cuda, simulates
from weights_convert.safetensors_files import save_tensors


def another(pair: Pair, folder: Path) -> KolorsPipeline:
    """The same pipeline as another process has it: with an encoder of its own and nothing in memory."""
    pipe = KolorsPipeline.from_pipe(pair[0], text_encoder=deepcopy(pair[0].text_encoder))
    pipe.savings, pipe.prompt_cache = Savings(prompt_folder=folder), PromptCache()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_a_folder_keeps_prompts_for_other_processes(pipes: Pair, tmp_path: Path) -> None:
    folder = tmp_path / "prompts"
    first, second = another(pipes, folder), another(pipes, folder)
    picture = steps_of(first, prompt="the red cat")[-1]
    assert len(list(folder.iterdir())) == 2, "the prompt and the empty one"
    second.text_encoder.forward = None  # whoever calls it fails
    with pytest.raises(TypeError):
        steps_of(second, prompt="the red cat")
    del second.text_encoder.forward
    second.text_encoder.layers[0].forward = None  # an encoder whose own forward is the plain one
    assert torch.equal(steps_of(second, prompt="the red cat")[-1], picture)
    with pytest.raises(TypeError):
        steps_of(second, prompt="the blue cat")


Change = Callable[[dict[str, Tensor]], dict[str, Tensor]]
UNFIT: dict[str, Change] = {
    "pooled is missing": lambda d: {name: t for name, t in d.items() if name != "pooled"},
    "pooled of no row": lambda d: d | {"pooled": d["pooled"][:0]},
    "tokens of other axes": lambda d: d | {"tokens": d["tokens"][None]},
    "fewer tokens": lambda d: d | {"tokens": d["tokens"][:, :1].contiguous()},
    "tokens not finite": lambda d: d | {"tokens": d["tokens"] * float("nan")},
    "pooled not finite": lambda d: d | {"pooled": d["pooled"] / 0},
    "tokens of integers": lambda d: d | {"tokens": torch.ones_like(d["tokens"], dtype=torch.int64)},
    "tokens of float32": lambda d: d | {"tokens": d["tokens"].float()},
    "tokens of float8": lambda d: d | {"tokens": d["tokens"].to(torch.float8_e4m3fn)},
    "counts are missing": lambda d: {name: t for name, t in d.items() if name != "counts"},
    "counts of no token": lambda d: d | {"counts": torch.zeros(0)},
    "counts not finite": lambda d: d | {"counts": d["counts"] * float("nan")},
    "counts doubled": lambda d: d | {"counts": d["counts"] * 2},
    "something else too": lambda d: d | {"more": torch.zeros(2)},
}


def encoded(pipe: KolorsPipeline) -> Tensor:
    """What the UNet reads of a prompt and of the empty one, as another process finds it in the folder."""
    return torch.cat([part.flatten() for part in pipe.encode_prompt("cat") if part is not None])


@pytest.fixture
def cached(pipes: Pair, tmp_path_factory: Any) -> tuple[Path, Tensor]:
    """A folder with "cat" and the empty prompt, and what is encoded there."""
    folder = tmp_path_factory.mktemp("prompts")
    return folder, encoded(another(pipes, folder))


@pytest.mark.parametrize("change", UNFIT)
def test_what_does_not_fit_is_encoded_again(
    change: str, pipes: Pair, cached: tuple[Path, Tensor], tmp_path: Path, caplog: Any
) -> None:
    for file in cached[0].iterdir():
        save_tensors(UNFIT[change](load_file(file)), tmp_path / file.name)
    assert torch.equal(encoded(another(pipes, tmp_path)), cached[1])
    assert caplog.text.count("the prompt is encoded again") == 2 and str(tmp_path) in caplog.text
    caplog.clear()
    assert torch.equal(encoded(another(pipes, tmp_path)), cached[1])
    assert not caplog.text, "the files were replaced"
    for file in cached[0].iterdir():
        assert (tmp_path / file.name).read_bytes() == file.read_bytes()


def damaged(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-10])


def empty(file: Path) -> None:
    file.write_bytes(b"")


def named_pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def lost_link(file: Path) -> None:
    file.unlink()
    file.symlink_to("nothing")


def folder_in_its_place(file: Path) -> None:
    file.unlink()
    file.mkdir()


@pytest.mark.parametrize("harm", [damaged, empty, named_pipe, lost_link, folder_in_its_place])
def test_no_file_of_the_cache_stops_a_run(
    harm: Callable[[Path], None], pipes: Pair, cached: tuple[Path, Tensor], tmp_path: Path, caplog: Any
) -> None:
    for file in cached[0].iterdir():
        shutil.copy(file, tmp_path)
        harm(tmp_path / file.name)
    assert torch.equal(encoded(another(pipes, tmp_path)), cached[1])
    assert caplog.text.count("the prompt is encoded again") == 2
    is_replaced = harm is not folder_in_its_place
    assert all((tmp_path / file.name).is_file() == is_replaced for file in cached[0].iterdir())


def test_a_folder_that_cannot_be_written_stops_no_run(
    pipes: Pair, cached: tuple[Path, Tensor], tmp_path: Path, caplog: Any
) -> None:
    (tmp_path / "file").write_text("")
    assert torch.equal(encoded(another(pipes, tmp_path / "file" / "prompts")), cached[1])
    assert "the prompt's embedding is not kept" in caplog.text


def trained(encoder: ChatGLM) -> None:
    encoder.layers[2].mlp.proj_out.weight.data *= 1.01  # past autograd's count of writes


def one_embedding(encoder: ChatGLM) -> None:
    encoder.embedding.weight.data[64] += 0.1  # as textual inversion does; token 64 is in the prompt


def adapted(encoder: ChatGLM) -> None:
    attach(encoder, rank=2, targets=TEXT_TARGETS)


def quantised(encoder: ChatGLM) -> None:
    quantize(encoder, 8)


def rounded(encoder: ChatGLM) -> None:
    encoder.float()


CHANGES = [trained, one_embedding, adapted, quantised, rounded]


def key(encoder: ChatGLM, ids: tuple[int, ...] = (64, 65, 66)) -> Key:
    tokens = torch.tensor([ids])
    mask, positions = torch.ones_like(tokens, dtype=torch.bool), torch.arange(len(ids))[None]
    return Key.of(encoder, TokenBatch(tokens, mask, positions))


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_encoder_has_other_keys(change: Callable[[ChatGLM], None], pipes: Pair) -> None:
    encoder = deepcopy(pipes[0].text_encoder)
    assert encoder is not None
    before = key(encoder)
    assert key(deepcopy(encoder)).name == before.name == key(encoder).name
    change(encoder)
    assert key(encoder).name != before.name


def test_keys_tell_tokens_apart_and_moves_not(pipes: Pair) -> None:
    encoder = deepcopy(pipes[0].text_encoder)
    assert encoder is not None
    before = key(encoder)
    assert len({before.name, key(encoder, (64, 65, 67)).name, key(encoder, (64, 65)).name}) == 3
    for parameter in encoder.parameters():
        parameter.data = parameter.data.clone()  # as moving to a device and back does
    assert key(encoder) == before
    with torch.no_grad():
        encoder.layers[0].mlp.proj_in.weight[1, 1] += 1  # a value that no sample need see
    assert key(encoder) != before


@pytest.mark.parametrize("by_block", [False, True])
def test_prompts_are_found_again_under_offload(by_block: bool, pipes: Pair, tmp_path: Path) -> None:
    """Though each run has hooks of its own that copy blocks; nothing is added for them either."""
    pipe = another(pipes, tmp_path)
    pipe.savings = Savings()
    with offloaded(pipe, by_block):
        expected = steps_of(pipe, prompt="the red cat")
        pipe.text_encoder.layers[0].forward = None  # whoever calls it fails
        got = steps_of(pipe, prompt="the red cat")
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert len(pipe.prompt_cache.kept) == 2, "the prompt and the empty one"


@simulates
def test_a_key_waits_for_the_device_once(pipes: Pair) -> None:
    """Not for each of the encoder's tensors, and for none if nothing is kept."""
    pipe, tokens = deepcopy(pipes[0]), pipes[0].tokenizer(["cat"]).merge_padding()
    before = Key.of(pipe.text_encoder, tokens)
    with simulated_cuda() as simulation:
        pipe.to("cuda")
        waits = len(simulation.synchronized)
        assert Key.of(pipe.text_encoder, tokens).name == before.name
        assert len(simulation.synchronized) - waits == 2, "ids to the device, and samples back"
        pipe.savings = Savings(cached_prompts=0)
        waits = len(simulation.synchronized)
        with torch.no_grad():
            pipe._run_text_encoder(tokens)
        assert len(simulation.synchronized) - waits == 4, "the tokens, to the device"


def test_whoever_watches_the_encoder_is_not_passed_by(pipes: Pair, tmp_path: Path) -> None:
    """An encoder with a hook, or of another class, writes no file, and a new hook is called."""
    pipe = another(pipes, tmp_path)
    steps_of(pipe, prompt="cat")
    seen = list[nn.Module]()
    handle = pipe.text_encoder.layers[1].register_forward_hook(lambda module, *_: seen.append(module))
    steps_of(pipe, prompt="cat")
    steps_of(pipe, prompt="a hooked cat")
    handle.remove()
    assert len(seen) == 3, "the prompt, the empty one, and another prompt"
    assert len(list(tmp_path.iterdir())) == 2
    pipe.text_encoder.__class__ = type("Mine", (ChatGLM,), {})
    steps_of(pipe, prompt="another cat")
    assert len(list(tmp_path.iterdir())) == 2

"""Prompts known from before: found again after a move and in another process, never after a change."""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torch import nn

from kolors_core import KolorsPipeline
from kolors_core.adapters.lora import TEXT_TARGETS, attach
from kolors_core.chatglm import ChatGLM
from kolors_core.performance.prompt_cache import Key, PromptCache
from kolors_core.performance.quantize import quantize
from kolors_core.precompute import Savings
from kolors_core.tokenizer import TokenBatch
from tests.support.pipelines import Pair, steps_of


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


def test_a_damaged_file_is_named(pipes: Pair, tmp_path: Path) -> None:
    steps_of(another(pipes, tmp_path), prompt="cat")
    for file in tmp_path.iterdir():
        file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"[0-9a-f]{64}\.safetensors: "):
        steps_of(another(pipes, tmp_path), prompt="cat")


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

"""Ctrl-C between any two lines of what changes a pipeline: it draws the bits of before or of after."""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kolors_core import EulerDiscreteScheduler, KolorsPipeline
from kolors_core.adapters.ip_adapter import attached
from kolors_core.chatglm import ChatGLM
from kolors_core.performance.quantize import quantize
from kolors_core.pipelines.stages import Task
from kolors_core.tokenizer import Tokenizer
from kolors_core.unet import UNet
from kolors_core.vae import VAE
from tests.support.interrupts import interrupted
from tests.support.ip_adapters import adapter_config, write_adapter
from tests.support.loras import factors, peft_names
from tests.support.offloads import ACCELERATOR
from tests.support.pipelines import NO_SAVINGS
from tests.support.small import SHALLOW, SMALL_CLIP, randomise

STOPS = 5  # lines of each change at which it is interrupted, evenly spaced
LAYERS = [f"mid_block.attentions.0.transformer_blocks.0.attn{i}.to_{part}" for i in (1, 2) for part in "qkv"]
TEXT = [f"encoder.layers.{i}.self_attention.query_key_value" for i in (0, 1)]
Change = Callable[[Any], object]


@pytest.fixture(scope="module")
def small(small_tokenizer: Path) -> KolorsPipeline:
    """A pipeline that keeps no prompts, small enough to be copied for each stop."""
    models = {"text_encoder": ChatGLM(SHALLOW.text_encoder), "unet": UNet(SHALLOW.unet)}
    for model in models.values():
        randomise(model)
    pipe = KolorsPipeline(
        **models, vae=VAE(SHALLOW.vae), tokenizer=Tokenizer(small_tokenizer),
        scheduler=EulerDiscreteScheduler(),
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    pipe.savings = NO_SAVINGS
    return pipe


@pytest.fixture(scope="module")
def adapters(small: KolorsPipeline, tmp_path_factory: Any) -> list[Path]:
    folder, config = tmp_path_factory.mktemp("adapters"), adapter_config(small.unet.config)
    return [write_adapter(folder / f"{seed}.safetensors", seed, config) for seed in (0, 1)]


def draw(pipe: Task, **arguments: Any) -> Tensor:
    """Latents of one step, of a prompt with learned words if they are known, with the adapters' images."""
    embeds = [torch.ones(1, 1, 17, SMALL_CLIP.hidden_size)] * len(attached(pipe.unet))
    given = {"ip_adapter_image_embeds": embeds} if embeds else {}
    return pipe(
        "a <q> and a <r>", 32, 32, num_inference_steps=1, guidance_scale=1.0, output_type="latent",
        generator=torch.Generator().manual_seed(0), **given, **arguments,
    ).images  # fmt: skip


def words(pipe: KolorsPipeline, *names: str) -> None:
    generator = torch.Generator().manual_seed(2)
    pipe.load_textual_inversion({name: torch.randn(2, 64, generator=generator) for name in names})


def two_words(pipe: KolorsPipeline) -> None:
    words(pipe, "<q>", "<r>")


def lora(pipe: KolorsPipeline, name: str, seed: int = 3) -> None:
    assert pipe.text_encoder is not None
    state = peft_names("unet", factors(pipe.unet, "unet", LAYERS, seed), "unet.")
    made = factors(pipe.text_encoder, "text_encoder", TEXT, seed)
    pipe.load_lora_weights(state | peft_names("text_encoder", made, "text_encoder."), name)


def two_loras(pipe: KolorsPipeline) -> None:
    lora(pipe, "one")
    lora(pipe, "two", 4)
    pipe.set_adapters(["one", "two"], [0.5, 0.7])


def fused(pipe: KolorsPipeline) -> None:
    two_loras(pipe)
    pipe.fuse_lora()


def offloaded(pipe: KolorsPipeline) -> None:
    pipe.offload.start(ACCELERATOR, by_block=True)
    pipe._enter_stage()


def with_freeu(pipe: KolorsPipeline) -> None:
    pipe.enable_freeu(0.9, 0.2, 1.1, 1.2)


# What is done before, and the change that is interrupted.
CHANGES: dict[str, tuple[Change, Change]] = {
    "add words": (lambda pipe: None, two_words),
    "add a word": (lambda pipe: words(pipe, "<q>"), lambda pipe: words(pipe, "<r>")),
    "remove a word": (two_words, lambda pipe: pipe.unload_textual_inversion("<q>")),
    "remove words": (two_words, lambda pipe: pipe.unload_textual_inversion()),
    "load a LoRA": (lambda pipe: None, lambda pipe: lora(pipe, "one")),
    "load another LoRA": (lambda pipe: lora(pipe, "one"), lambda pipe: lora(pipe, "two", 4)),
    "weigh LoRAs": (two_loras, lambda pipe: pipe.set_adapters("two", {"unet": 0.3, "text_encoder": 2.0})),
    "delete a LoRA": (two_loras, lambda pipe: pipe.delete_adapters("one")),
    "unload LoRAs": (two_loras, lambda pipe: pipe.unload_lora_weights()),
    "disable LoRAs": (two_loras, lambda pipe: pipe.disable_lora()),
    "fuse LoRAs": (two_loras, lambda pipe: pipe.fuse_lora()),
    "unfuse LoRAs": (fused, lambda pipe: pipe.unfuse_lora()),
    "unload fused LoRAs": (fused, lambda pipe: pipe.unload_lora_weights()),
    "enable FreeU": (lambda pipe: None, with_freeu),
    "disable FreeU": (with_freeu, lambda pipe: pipe.disable_freeu()),
    "quantize": (lambda pipe: None, lambda pipe: quantize(pipe.unet, 8)),
    "begin offload": (lambda pipe: None, offloaded),
    "end offload": (offloaded, lambda pipe: pipe.offload.end()),
    "cast to float16": (lambda pipe: None, lambda pipe: pipe.to(torch.float16)),
    "cast to bfloat16": (lambda pipe: quantize(pipe.text_encoder, 8), lambda pipe: pipe.to(torch.bfloat16)),
    "cast to float64": (two_loras, lambda pipe: pipe.to(torch.float64)),
}  # fmt: skip


def check(small: KolorsPipeline, prepare: Change, change: Change) -> None:
    ready = deepcopy(small)
    prepare(ready)
    before, pipe = draw(ready), deepcopy(ready)
    with interrupted(None) as lines:
        change(pipe)
    after, met = draw(pipe), set[str]()
    for at in sorted(set(torch.linspace(1, lines[0], STOPS).int().tolist())):
        pipe = deepcopy(ready)
        with pytest.raises(KeyboardInterrupt), interrupted(at):
            change(pipe)
        got = draw(pipe)
        is_before, is_after = (got.dtype == one.dtype and torch.equal(got, one) for one in (before, after))
        assert is_before or is_after, f"neither before nor after, interrupted at line {at} of {lines[0]}"
        met |= {"before"} if is_before else {"after"}
        if not is_after:
            change(pipe)
            got = draw(pipe)
            assert got.dtype == after.dtype and torch.equal(got, after), f"not done again, line {at}"
    assert "before" in met


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_whole_or_none(small: KolorsPipeline, name: str) -> None:
    check(small, *CHANGES[name])


@pytest.mark.parametrize("name", ["load", "load in place of another", "scale", "unload"])
def test_image_prompts_are_attached_whole_or_not_at_all(
    small: KolorsPipeline, adapters: list[Path], name: str
) -> None:
    def load(pipe: KolorsPipeline, file: Path = adapters[0]) -> None:
        pipe.load_ip_adapter(file, image_encoder_folder=None)

    changes: dict[str, tuple[Change, Change]] = {
        "load": (lambda pipe: None, load),
        "load in place of another": (load, lambda pipe: load(pipe, adapters[1])),
        "scale": (load, lambda pipe: pipe.set_ip_adapter_scale(0.3)),
        "unload": (load, lambda pipe: pipe.unload_ip_adapter()),
    }
    check(small, *changes[name])


def test_the_scale_of_an_interrupted_call_is_not_the_next_ones(small: KolorsPipeline) -> None:
    pipe = deepcopy(small)
    two_loras(pipe)
    wanted = draw(pipe)
    with interrupted(None) as lines:
        draw(pipe, cross_attention_kwargs={"scale": 0.3})
    for at in torch.linspace(1, lines[0], STOPS).int().tolist():
        with pytest.raises(KeyboardInterrupt), interrupted(at):
            draw(pipe, cross_attention_kwargs={"scale": 0.3})
        assert torch.equal(draw(pipe), wanted), f"interrupted at line {at} of {lines[0]}"

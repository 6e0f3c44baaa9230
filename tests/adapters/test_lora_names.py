"""Names of LoRAs, and what files of float8 give: as any other name, as the same values in another dtype."""

import pytest
import torch
from torch import Tensor

from kolors_core import KolorsPipeline
from kolors_core.adapters.lora import adapters, attach, fuse, fused_names, unfuse
from kolors_core.unet import UNet
from tests.support.loras import factors, peft_names
from tests.support.small import SHALLOW

LAYERS = ["mid_block.attentions.0.transformer_blocks.0.attn1.to_q"]
NAMES = (
    "风格",
    "<some_name>",
    "pixel art",
    "a/b",
    "v1.5",
    "..",
    "%2E",
    "😀",
    "half",
    "training",
    "items",
    "é",
)


def test_a_name_is_any_printable_text() -> None:
    """Also with dots, and those of torch's own attributes; it is listed as it was given."""
    unet = UNet(SHALLOW.unet)
    plain = list(unet.state_dict())
    for i, name in enumerate(NAMES):
        attach(unet, rank=1, name=name)
        with pytest.raises(ValueError, match="attached already"):
            attach(unet, rank=1, name=name)
        assert list(adapters(unet)) == list(NAMES[: i + 1])
    state = unet.state_dict()
    assert len(state) == len(plain) + len(NAMES) * 2 * len(adapters(unet)["a/b"].layers)
    for name in state:  # a module of each, by its path
        unet.get_submodule(name.rpartition(".")[0])
    unet.load_state_dict(state)
    fuse(unet, NAMES)
    assert fused_names(unet) == NAMES
    unfuse(unet)
    for name in NAMES:
        adapters(unet)[name].detach()
    assert list(unet.state_dict()) == plain


@pytest.fixture(scope="module")
def tiny() -> KolorsPipeline:
    pipe = KolorsPipeline.from_pretrained("tiny")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("name", NAMES)
def test_a_pipeline_takes_each_name(tiny: KolorsPipeline, name: str) -> None:
    state = peft_names("unet", factors(tiny.unet, "unet", LAYERS), "unet.")
    tiny.load_lora_weights(state, adapter_name=name)
    try:
        tiny.set_adapters(name, 0.5)
        tiny.fuse_lora()
        tiny.unfuse_lora()
        assert tiny.get_active_adapters() == [name] == tiny.get_list_adapters()["unet"]
        tiny.delete_adapters(name)
        assert not tiny.get_list_adapters()
    finally:
        tiny.unload_lora_weights()


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_float8_draws_as_the_same_values_in_float32(tiny: KolorsPipeline, dtype: torch.dtype) -> None:
    """Of LoRAs, of learned words and of given embeddings; each has an effect."""

    def small(tensors: dict[str, Tensor], to: torch.dtype) -> dict[str, Tensor]:
        return {name: tensor.to(dtype).to(to) for name, tensor in tensors.items()}

    def draw(to: torch.dtype) -> Tensor:
        tiny.load_lora_weights(small(peft_names("unet", factors(tiny.unet, "unet", LAYERS), "unet."), to))
        tiny.load_textual_inversion(small({"<q>": torch.linspace(-1, 1, 192)[None]}, to))
        try:
            given = dict(zip(
                ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds",
                 "negative_pooled_prompt_embeds"), tiny.encode_prompt("a <q>"), strict=True,
            ))  # fmt: skip
            tensors = {name: tensor for name, tensor in given.items() if tensor is not None}
            return tiny(
                height=32, width=32, num_inference_steps=1, output_type="latent", **small(tensors, to),
                generator=torch.Generator().manual_seed(0),
            ).images  # fmt: skip
        finally:
            tiny.unload_lora_weights()
            tiny.unload_textual_inversion()

    assert torch.equal(draw(dtype), draw(torch.float32))

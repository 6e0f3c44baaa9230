"""torch.export with every size left open: one program of a model serves any batch, height, width and length.

A size that a forward bakes in is an error of the export, which is given the range of every size.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, export

from kolors_core.adapters.clip_vision import CLIPVision
from kolors_core.adapters.controlnet import ControlNet, ControlNetConfig
from kolors_core.attention import attention, attention_kernel
from kolors_core.chatglm import ChatGLM
from kolors_core.tokenizer import TokenBatch
from kolors_core.unet import UNet
from kolors_core.vae import VAE
from tests.support.small import EXACT, SHALLOW, SMALL, SMALL_CLIP, randomise, relative_error
from tests.support.versions import TORCH, exports_chatglm

# The least and the most of each size: batch, height and width of latents, tokens. torch takes lengths of 0
# and 1 for constants, so the innermost feature map, a quarter of the latents, must be longer than 1.
RANGES = {"B": (1, 64), "H": (5, 256), "W": (5, 300), "S": (1, 1024)}
TRACED = {"B": 2, "H": 8, "W": 11, "S": 7}
OTHERS = ({"B": 1, "H": 9, "W": 6, "S": 1}, {"B": 5, "H": 6, "W": 17, "S": 12})
VAE_CONFIG = replace(SMALL.vae, resnets_per_level=1)
UNET = replace(SHALLOW.unet, channels=(32, 64, 64), heads=(2, 4, 4), depths=(0, 1, 1))
CONTROLNET = ControlNetConfig(**vars(UNET), conditioning_widths=(8, 12, 16, 24))


class Called(nn.Module):
    """A model that takes tensors alone and returns tensors, as an exported program does."""

    def __init__(self, model: nn.Module, call: Callable[..., Any]) -> None:
        super().__init__()
        self.model, self.call = model, call

    def forward(self, *tensors: Tensor) -> Any:
        return self.call(self.model, *tensors)


def encode_text(model: Any, ids: Tensor, real: Tensor, positions: Tensor, counts: Tensor) -> Any:
    found = model(TokenBatch(ids % SMALL.text_encoder.vocab_size, real > 40, positions % 9, counts.float()))
    return found.tokens, found.pooled


def encode_image(model: Any, images: Tensor) -> Any:
    found = model.encode_images(images)
    return found.mean, found.std


def vision(model: Any, pixels: Tensor) -> Any:
    found = model(pixels, output_hidden_states=True)
    return (found.image_embeds, *found.hidden_states)


class Case(NamedTuple):
    """A model, how it is called, and the shapes of its tensors: "H" is a size of `RANGES`, "8H" 8 times it.

    whole: the tensors are integers above 0.
    """

    model: Callable[[], nn.Module]
    call: Callable[..., Any]
    shapes: tuple[tuple[int | str, ...], ...]
    whole: bool = False


TEXT = (("B", "S", UNET.text_dim), ("B", UNET.text_dim), ("B", 6))
# Before 2.10 torch's group_norm cannot leave open a size that was odd and halved.
FEWEST, PIXELS = ("", "8") if TORCH >= (2, 10) else ("4", "32")
LATENTS, IMAGE = ("B", 4, f"{FEWEST}H", f"{FEWEST}W"), ("B", 3, f"{PIXELS}H", f"{PIXELS}W")
CASES = {
    "UNet": Case(lambda: UNet(UNET), lambda model, *given: model(*given), (LATENTS, ("B",), *TEXT)),
    "UNet, one timestep and counted tokens": Case(
        lambda: UNet(UNET),
        lambda model, *given: model(*given[:-1], given[-1].abs()),
        (LATENTS, (), *TEXT, ("B", "S")),
    ),
    "ControlNet": Case(
        lambda: ControlNet(CONTROLNET),
        lambda model, *given: model(*given),
        (LATENTS, ("B",), *TEXT, IMAGE),
    ),
    "ChatGLM": Case(lambda: ChatGLM(SMALL.text_encoder), encode_text, (("B", "S"),) * 4, whole=True),
    "VAE, encode": Case(lambda: VAE(VAE_CONFIG), encode_image, (("B", 3, "8H", "8W"),)),
    "VAE, decode": Case(
        lambda: VAE(VAE_CONFIG), lambda model, latents: model.decode_latents(latents), (("B", 4, "H", "W"),)
    ),
    "CLIP vision": Case(lambda: CLIPVision(SMALL_CLIP), vision, (("B", 3, 28, 28),)),
}


def tensors(case: Case, sizes: dict[str, int]) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    found = []
    for axes in case.shapes:
        shape = [n if isinstance(n, int) else sizes[n[-1]] * int(n[:-1] or 1) for n in axes]
        if case.whole:
            found.append(torch.randint(1, 600, shape, generator=generator))
        else:
            found.append(torch.randn(shape, generator=generator, dtype=torch.float64))
    return tuple(found)


def flat(found: Any) -> list[Tensor]:
    return [found] if isinstance(found, Tensor) else list(found)


@torch.no_grad()
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=exports_chatglm) if name == "ChatGLM" else name for name in CASES]
)
def test_one_program_serves_every_size(name: str) -> None:
    case = CASES[name]
    model = case.model().double().eval()
    randomise(model)
    plain = Called(model, case.call)
    dims = {size: Dim(size, min=least, max=most) for size, (least, most) in RANGES.items()}
    dynamic = tuple(
        {
            i: int(n[:-1] or 1) * dims[n[-1]] if n[:-1] else dims[n]
            for i, n in enumerate(axes)
            if isinstance(n, str)
        }
        for axes in case.shapes
    )
    exported = export(plain, tensors(case, TRACED), dynamic_shapes=(dynamic,), strict=False)
    told = {RANGES[n[-1]] for axes in case.shapes for n in axes if isinstance(n, str)}
    ranges = {(int(each.lower), int(each.upper)) for each in exported.range_constraints.values()}
    assert told <= ranges, "a range became narrower"
    program = exported.module()
    for sizes in (TRACED, *OTHERS):
        given = tensors(case, sizes)
        for mine, other in zip(flat(program(*given)), flat(plain(*given)), strict=True):
            assert relative_error(mine, other) < EXACT


@torch.no_grad()
def test_in_bfloat16_on_a_cpu_a_kernel_is_named_to_leave_sizes_open() -> None:
    """There the usual kernel is chosen by the sizes, and an export must not choose one for all."""
    q = torch.randn(2, 4, 600, 64, dtype=torch.bfloat16)
    dynamic = ({2: Dim("N", min=2, max=5000)},)
    plain = Called(nn.Module(), lambda model, q: attention(q, q, q))
    with pytest.raises(torch._dynamo.exc.UserError, match="Constraints violated"):
        export(plain, (q,), dynamic_shapes=(dynamic,), strict=False)
    with attention_kernel("sdpa"):
        program = export(plain, (q,), dynamic_shapes=(dynamic,), strict=False).module()
        assert torch.equal(program(q[:, :, :70]), plain(q[:, :, :70]))

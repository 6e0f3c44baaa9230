"""Models of a variant: built with the first values of others, checked before all training, and counted.

Shapes: B images, h and w latents of a side.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.ablate.change import Variant, told
from kolors_core.chatglm import TextEmbedding
from kolors_core.conditioning import Conditioning
from kolors_core.config import TINY
from kolors_core.tokenizer import TokenBatch

MANY = 256  # values of a tensor, from which on their scale says how they were drawn
PROBE_SIGMA = 2.0


@dataclass(frozen=True)
class Pupil:
    """Models of a variant that are trained. objective: maps a batch to its loss; it has all others in it.

    shared: number of tensors that start as another's, A's or the embedded model's; own: names of the others.
    """

    variant: Variant
    objective: nn.Module
    denoiser: nn.Module | None
    text_encoder: nn.Module | None
    shared: int
    own: list[str]

    def eval(self) -> "Pupil":
        """Return it in the mode in which it is measured."""
        self.objective.eval()
        return self


def build(variant: Variant, maker: Callable[[Any], Any], config: Any, seed: int) -> nn.Module:
    """Make a new module of a config; ValueError if none is made."""
    torch.manual_seed(seed)
    try:
        net = maker(config)
    except Exception as error:
        raise ValueError(f"{variant.text}: made no module: {told(error)}") from error
    if not isinstance(net, nn.Module):
        raise ValueError(f"{variant.text}: returned {type(net).__name__}, expected a torch.nn.Module")
    return net.train()


@torch.no_grad()
def share_values(known: Mapping[str, Tensor], net: nn.Module, drawn: bool = True) -> list[str]:
    """Copy values to a module where names and shapes agree; return the names of those that keep their own.

    drawn: the values are drawn at random. Those of another scale in the module, or constant in one only, were
    meant to start otherwise then, and keep their own too.
    """
    own = []
    for name, parameter in net.named_parameters():
        value = known.get(name)
        if (
            value is not None
            and value.shape == parameter.shape
            and not (drawn and _differs(value, parameter))
        ):
            parameter.copy_(value)
        else:
            own.append(name)
    return own


def _differs(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors of a shape were drawn in different ways."""
    if any(bool((each == each.flatten()[:1]).all()) for each in (a, b)):
        return not torch.equal(a, b)
    ratio = (a.square().mean() / b.square().mean()).sqrt().item()
    return a.numel() >= MANY and not 0.8 < ratio < 1.25


def example() -> Conditioning:
    """Return the conditioning of two images, of the right shapes and of nothing in particular."""
    width = TINY.unet.text_dim
    text = TextEmbedding(torch.zeros(2, 5, width), torch.zeros(2, width), torch.ones(2, 5))
    return Conditioning(text.tokens, text.pooled, torch.zeros(2, 6), text.counts)


def check_denoiser(variant: Variant, net: nn.Module) -> None:
    """Raise ValueError unless a module denoises as the variant's rule of guidance calls it."""
    side, text = variant.config.sample_size, variant.text
    schedule = variant.change.scheduler.schedule(4)
    x, outputs = torch.zeros(2, 4, side, side), list[Any]()
    hook = net.register_forward_hook(lambda module, given, output: outputs.append(output))
    try:
        found = variant.change.guided(net, schedule, example())(x, float(schedule.sigmas[1]))
    except Exception as error:
        if outputs and not is_like(outputs[-1], x):
            got = f"a tensor {list(outputs[-1].shape)}" if isinstance(outputs[-1], Tensor) else None
            got = got or type(outputs[-1]).__name__
            expected = f"expected one of {list(x.shape)}, the noise"
            raise ValueError(f"{text}: its forward returned {got}, {expected}") from error
        raise ValueError(f"{text}: failed on what UNet.forward is given: {told(error)}") from error
    finally:
        hook.remove()
    if not is_like(found, x):
        raise ValueError(f"{text}: `guided` returned no latents like those that it was given")


def is_like(found: Any, x: Tensor) -> bool:
    """Return whether something is a tensor of another's shape."""
    return isinstance(found, Tensor) and found.shape == x.shape


def check_text_encoder(variant: Variant, encoder: nn.Module) -> None:
    """Raise ValueError unless a module encodes tokens as ChatGLM does."""
    ids = torch.tensor([[1, 2, 3]])
    tokens = TokenBatch(ids, torch.ones_like(ids).bool(), torch.arange(3)[None], torch.ones(1, 3))
    try:
        found = encoder(tokens)
    except Exception as error:
        raise ValueError(f"{variant.text}: failed on what ChatGLM.forward is given: {told(error)}") from error
    width = TINY.unet.text_dim
    if not isinstance(found, TextEmbedding) or found.tokens.shape[-1] != width:
        raise ValueError(f"{variant.text}: its forward returned {type(found).__name__}, "
                         f"expected a TextEmbedding {width} wide")  # fmt: skip


def check_objective(pupil: Pupil, batch: Any) -> list[str]:
    """Return the parameters that a loss does not use; ValueError unless it is one number that uses some."""
    text = pupil.variant.text
    try:
        loss = pupil.objective(batch)
    except Exception as error:
        raise ValueError(f"{text}: its loss failed on a batch: {told(error)}") from error
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise ValueError(f"{text}: its loss returned no single number")
    if not loss.requires_grad:
        raise ValueError(f"{text}: its forward depends on no parameter")
    loss.backward()
    named = pupil.objective.named_parameters()
    return [name for name, each in named if each.requires_grad and each.grad is None]


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Counts. parameters: that are trained. forward: FLOPs of a denoised image, or of an encoded caption.

    step: FLOPs of a training step, backward pass included. FLOPs are of products, convolutions and attention.
    """

    parameters: int
    forward: int
    step: int


def flops(run: Callable[[], object]) -> int:
    """Count the FLOPs of a call. Attention is written out: torch counts nothing of its fused one on a CPU."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        run()
    return counter.get_total_flops()

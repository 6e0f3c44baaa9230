"""Checks of a pipeline's components: their types, and the dimensions that they share."""

import logging
from collections.abc import Callable
from typing import Any

from torch import nn

from kolors_core.chatglm import ChatGLM
from kolors_core.denoiser import faults_of
from kolors_core.devices import unwrap_compiled
from kolors_core.precompute import Savings
from kolors_core.schedule import Scheduler
from kolors_core.targets import target_of
from kolors_core.tokenizer import Tokenizer
from kolors_core.unet import UNet
from kolors_core.vae import VAE

logger = logging.getLogger("kolors_core")
# For each attribute of a pipeline: a predicate of its unwrapped value, and the type in words.
COMPONENT_TYPES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "unet": (
        lambda part: part is None or not faults_of(part), "kolors_core's UNet, a denoiser like it or None"),
    "vae": (lambda part: isinstance(part, VAE | None), "kolors_core's VAE or None"),
    "scheduler": (lambda part: isinstance(part, Scheduler | None), "kolors_core's Scheduler or None"),
    "image_encoder": (
        lambda part: part is None or hasattr(part, "penultimate"), "kolors_core's CLIPVision or None"),
    "text_encoder": (
        lambda part: part is None or (isinstance(part, nn.Module)
                                      and hasattr(getattr(part, "config", None), "hidden_size")),
        "a module like kolors_core's ChatGLM, with the width config.hidden_size, or None"),
    "tokenizer": (
        lambda part: part is None or (callable(part) and hasattr(part, "size")),
        "like kolors_core's Tokenizer or None"),
    "feature_extractor": (lambda part: part is None or callable(part), "a function or None"),
    "force_zeros_for_empty_prompt": (lambda part: isinstance(part, bool), "True or False"),
    "guided": (callable, "a function like guidance.guided"),
    "sampler": (lambda part: part is None or callable(part), "a function like sampling.euler or None"),
    "savings": (lambda part: isinstance(part, Savings), "a precompute.Savings"),
}  # fmt: skip


def check_component_type(name: str, value: Any) -> None:
    """Raise TypeError if a pipeline's attribute is set to a value of another type."""
    is_kind, wanted = COMPONENT_TYPES.get(name, (lambda _: True, ""))
    if not is_kind(unwrap_compiled(value)):
        kind = type(value)
        got = kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"
        why = f": {faults_of(value)[0]}" if name == "unet" and isinstance(value, nn.Module) else ""
        raise TypeError(f"{name} must be {wanted}, got {got}{why}")


def check_dimensions(
    vae: VAE | None, text_encoder: ChatGLM | None, tokenizer: Tokenizer | None, unet: UNet | None,
    accepts_masks: bool,
) -> None:  # fmt: skip
    """Raise ValueError naming two components whose dimensions differ."""
    if vae is not None and unet is not None:
        _check_channels(vae, unet, accepts_masks)
    if text_encoder is None:
        return
    width, words = text_encoder.config.hidden_size, getattr(text_encoder.config, "vocab_size", None)
    if unet is not None and width != unet.config.text_dim:
        raise ValueError(f"the text encoder is {width} wide, and the UNet reads {unet.config.text_dim}")
    if tokenizer is not None and words is not None and tokenizer.size > words:
        raise ValueError(f"the tokenizer has {tokenizer.size} tokens, and the text encoder only {words}")


def _check_channels(vae: VAE, unet: UNet, accepts_masks: bool) -> None:
    latents, ins, outs = vae.config.latent_channels, unet.config.in_channels, unet.config.out_channels
    masked = 2 * latents + 1  # the latents, the mask, and the masked image's latents
    if outs != latents or ins not in ((latents, masked) if accepts_masks else (latents,)):
        wanted = f"the VAE's {latents} for both"
        if accepts_masks:
            wanted += f", or {masked} in"
        elif ins == masked:
            wanted += ": one with a mask is for KolorsInpaintPipeline"
        raise ValueError(f"the UNet has {ins} in and {outs} out channels, expected {wanted}")


def warn_of_dropout(part: Any) -> None:
    """Log that a model draws in training mode, if modules of its own compute otherwise there."""
    model = unwrap_compiled(part)
    if not isinstance(model, nn.Module) or not model.training:
        return
    kinds = (nn.modules.dropout._DropoutNd, nn.modules.batchnorm._BatchNorm)
    found = (name for name, module in model.named_modules() if isinstance(module, kinds) and module.training
             and getattr(module, "p", 1))  # fmt: skip
    if (name := next(found, None)) is not None:
        kind = type(model).__name__
        logger.warning("the %s draws in training mode, with its %s: call its eval() before", kind, name)


def check_target(unet: UNet, scheduler: Scheduler) -> None:
    """Raise ValueError if it is known that the denoiser predicts something else than the scheduler converts.

    It is known of a model with `prediction_type`, itself (see module.py) or in its config.
    """
    model: Any = unwrap_compiled(unet)
    learned = getattr(model, "prediction_type", getattr(model.config, "prediction_type", None))
    if learned is not None and (target := target_of(learned)) != scheduler.target:
        how = f"from_config(pipe.scheduler.config, prediction_type={learned!r})"
        got = f"{type(model).__name__} has learned {learned!r} ({type(target).__name__})"
        wrong = f"the scheduler converts {scheduler.prediction_type!r} ({type(scheduler.target).__name__})"
        raise ValueError(f"the {got}, and {wrong}: pipe.scheduler = {type(scheduler).__name__}.{how}")

"""What every task shares: its models, loaded, saved and moved, and the way from prompts to embeddings.

Shapes: B pictures (prompts times images per prompt), S text tokens.
"""

import operator
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from kolors_core.chatglm import ChatGLM, TextEmbedding
from kolors_core.checkpoint import (
    EMBEDDED_NAME,
    KINDS,
    load_component,
    load_index,
    load_scheduler,
    new_folder,
    resolve,
    save_component,
    save_frame,
)
from kolors_core.placement import Dtypes, dtype_of, named_device
from kolors_core.schedule import Scheduler
from kolors_core.tokenizer import Tokenizer
from kolors_core.unet import UNet
from kolors_core.vae import VAE

Prompt = str | Sequence[str]

MAX_TOKENS = 256
_LOAD: Any = object()  # a component that is to be loaded from the checkpoint; None is a component left out


class Components:
    """The models of a pipeline. Each is a plain attribute and may be replaced."""

    def __init__(
        self,
        vae: VAE,
        text_encoder: ChatGLM | None,
        tokenizer: Tokenizer | None,
        unet: UNet,
        scheduler: Scheduler,
        force_zeros_for_empty_prompt: bool = False,
    ) -> None:
        """Raises TypeError or ValueError, naming the component, for what is of another kind or size."""
        kinds = {"vae": (vae, VAE), "unet": (unet, UNet), "scheduler": (scheduler, Scheduler)}
        for name, (part, kind) in kinds.items():
            if not isinstance(part, kind):
                raise TypeError(f"{name} must be kolors_core's {kind.__name__}, got {type(part).__name__}")
        _must_fit(vae, text_encoder, tokenizer, unet)
        self.vae, self.text_encoder, self.tokenizer, self.unet = vae, text_encoder, tokenizer, unet
        self.scheduler = scheduler
        self.force_zeros_for_empty_prompt = force_zeros_for_empty_prompt
        self._progress: dict[str, Any] = {}
        self._guidance_scale, self._interrupt, self._num_timesteps = 1.0, False, 0

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path = EMBEDDED_NAME,
        *,
        torch_dtype: Dtypes = None,
        dtype: Dtypes = None,
        device: torch.device | str = "cpu",
        variant: str | None = None,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        token: str | bool | None = None,
        use_safetensors: bool | None = None,
        text_encoder: ChatGLM | None = _LOAD,
        tokenizer: Tokenizer | None = _LOAD,
        unet: UNet = _LOAD,
        vae: VAE = _LOAD,
        scheduler: Scheduler = _LOAD,
    ) -> Self:
        """Load a checkpoint folder or hub repository; the embedded tiny model if none is named.

        torch_dtype, or by its newer name dtype: one, or a mapping {"text_encoder", "unet", "vae", "default"};
        float32 if None, and the VAE is never float16. variant: such as "fp16"; None takes the only one there
        is. device: where each tensor goes straight from its file. A component passed in is used as it is and
        its files are not fetched. Raises FileNotFoundError or ValueError naming the file, field or tensor.
        """
        if use_safetensors is False:
            raise ValueError("use_safetensors=False: pickles can run code, only safetensors are opened")
        if torch_dtype is not None and dtype is not None:
            raise ValueError("torch_dtype and dtype are two names of one argument: give one")
        asked = torch_dtype if dtype is None else dtype
        parts = {
            "text_encoder": text_encoder, "tokenizer": tokenizer, "unet": unet, "vae": vae,
            "scheduler": scheduler,
        }  # fmt: skip
        dtypes = {component: dtype_of(component, asked) for component in KINDS}
        wanted = [component for component, value in parts.items() if value is _LOAD]
        folder = resolve(
            name, wanted, variant=variant, revision=revision, cache_dir=cache_dir,
            local_files_only=local_files_only, token=token,
        )  # fmt: skip
        index = load_index(folder)
        for component in wanted:
            if component == "tokenizer":
                parts[component] = Tokenizer(folder / "tokenizer")
            elif component == "scheduler":
                parts[component] = load_scheduler(folder)
            else:
                parts[component] = load_component(
                    folder, component, variant=variant, dtype=dtypes[component], device=device
                )
        return cls(**parts, force_zeros_for_empty_prompt=index["force_zeros_for_empty_prompt"])

    def save_pretrained(self, folder: str | Path, *, variant: str | None = None) -> None:
        """Write a new folder that the reference and `from_pretrained` load, whole or not at all.

        Raises FileExistsError if `folder` is there already and not empty, ValueError if a model is left out.
        """
        if self.text_encoder is None or self.tokenizer is None:
            raise ValueError("this pipeline has no text encoder or tokenizer and cannot be saved whole")
        with new_folder(Path(folder)) as place:
            for component in KINDS:
                save_component(getattr(self, component), place, component, variant=variant)
            save_frame(place, type(self).__name__, self.components)

    def to(
        self,
        *targets: torch.device | str | torch.dtype,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """Move every model to a device, a dtype, or both; a VAE asked for in float16 takes float32."""
        for target in (*targets, device, dtype):
            if isinstance(target, str):
                target = named_device(target)
            for model_name, model in ((name, getattr(self, name)) for name in KINDS):
                if model is not None and target is not None:
                    model.to(dtype_of(model_name, target) if isinstance(target, torch.dtype) else target)
        return self

    @property
    def device(self) -> torch.device:
        """Where the UNet is."""
        return self.unet.conv_in.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """What the UNet computes in."""
        return self.unet.conv_in.weight.dtype

    @property
    def components(self) -> dict[str, Any]:
        """What the constructor takes, to build another pipeline that shares it."""
        names = (*KINDS, "tokenizer", "scheduler", "force_zeros_for_empty_prompt")
        return {name: getattr(self, name) for name in names}

    @property
    def guidance_scale(self) -> float:
        """Of the run; a callback that sets `_guidance_scale` to 1 or less ends guidance."""
        return self._guidance_scale

    @property
    def num_timesteps(self) -> int:
        """Steps of the run."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Whether a callback has set `_interrupt`, which ends the run after its step."""
        return self._interrupt

    def set_progress_bar_config(self, **options: Any) -> None:
        """Options of tqdm's bar, such as `disable=True`."""
        self._progress = options

    def _progress_bar(self, total: int) -> Any:
        from tqdm.auto import tqdm

        return tqdm(total=total, **self._progress)

    @torch.no_grad()
    def encode_prompt(
        self,
        prompt: Prompt | None = None,
        device: torch.device | str | None = None,
        num_images_per_prompt: int = 1,
        do_classifier_free_guidance: bool = True,
        negative_prompt: Prompt | None = None,
        prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        negative_pooled_prompt_embeds: Tensor | None = None,
        max_sequence_length: int = MAX_TOKENS,
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
        """Prompts as embeddings, repeated for each image: prompt by prompt, image by image.

        Returns prompt and negative embeddings [B, S, text_dim], then both pooled ones [B, text_dim]; the
        negative ones are None without guidance. Errors as in `embed`.
        """
        text, negative = self.embed(
            prompt, do_classifier_free_guidance, negative_prompt, prompt_embeds, pooled_prompt_embeds,
            negative_prompt_embeds, negative_pooled_prompt_embeds, max_sequence_length,
        )  # fmt: skip
        device = self.device if device is None else torch.device(device)
        num_images_per_prompt = whole_number("num_images_per_prompt", num_images_per_prompt)

        def repeated(tensor: Tensor) -> Tensor:
            return tensor.to(device).repeat_interleave(num_images_per_prompt, dim=0)

        if negative is None:
            return repeated(text.tokens), None, repeated(text.pooled), None
        return (
            repeated(text.tokens),
            repeated(negative.tokens),
            repeated(text.pooled),
            repeated(negative.pooled),
        )

    def embed(
        self,
        prompt: Prompt | None,
        is_guided: bool,
        negative_prompt: Prompt | None,
        prompt_embeds: Tensor | None,
        pooled_prompt_embeds: Tensor | None,
        negative_prompt_embeds: Tensor | None,
        negative_pooled_prompt_embeds: Tensor | None,
        max_sequence_length: int,
    ) -> tuple[TextEmbedding, TextEmbedding | None]:
        """One embedding a prompt, encoded or given, and under guidance the negative one.

        No negative prompt is the encoded empty one, or zeros if the checkpoint says
        `force_zeros_for_empty_prompt`; a single one serves all prompts. Raises ValueError naming what was
        given twice, not at all, or does not fit.
        """
        width = self.unet.config.text_dim
        text = _given("", prompt_embeds, pooled_prompt_embeds, width)
        negative = _given("negative_", negative_prompt_embeds, negative_pooled_prompt_embeds, width)
        if (prompt is None) == (text is None):
            raise ValueError("give either prompt or prompt_embeds, not both and not neither")
        if text is not None and max_sequence_length != MAX_TOKENS:
            raise ValueError("max_sequence_length has no effect on given prompt_embeds")
        if negative_prompt is not None and negative is not None:
            raise ValueError("give either negative_prompt or negative_prompt_embeds, not both")
        if text is None:
            text = self._encode("prompt", prompt, max_sequence_length)
        if not is_guided:
            return text, None
        if negative is None and negative_prompt is None and self.force_zeros_for_empty_prompt:
            negative = TextEmbedding(torch.zeros_like(text.tokens), torch.zeros_like(text.pooled))
        elif negative is None:
            wanted = "" if negative_prompt is None else negative_prompt
            negative = self._encode("negative_prompt", wanted, text.tokens.shape[1])
        return text, _matched(negative, text)

    def _encode(self, name: str, prompt: Prompt | None, max_length: int) -> TextEmbedding:
        if self.text_encoder is None or self.tokenizer is None:
            raise ValueError(
                "this pipeline has no text encoder or tokenizer: pass prompt_embeds in place of prompts"
            )
        prompts = [prompt] if isinstance(prompt, str) else prompt
        if (
            not isinstance(prompts, list | tuple)
            or not prompts
            or not all(isinstance(p, str) for p in prompts)
        ):
            raise ValueError(f"{name} must be a string or a list of at least one string, got {prompt!r}")
        if not 2 < whole_number("max_sequence_length", max_length) <= MAX_TOKENS:
            raise ValueError(f"max_sequence_length must be from 3 to {MAX_TOKENS}, got {max_length!r}")
        tokens = self.tokenizer(prompts, max_length)
        return self.text_encoder(tokens.to(self.text_encoder.embedding.weight.device))


def _given(prefix: str, tokens: Tensor | None, pooled: Tensor | None, width: int) -> TextEmbedding | None:
    """Embeddings given in place of a prompt, checked; None if none are."""
    if tokens is None and pooled is None:
        return None
    for name, tensor in (("prompt_embeds", tokens), ("pooled_prompt_embeds", pooled)):
        if tensor is not None and not isinstance(tensor, Tensor):
            raise TypeError(f"{prefix}{name} must be a torch.Tensor, got {type(tensor).__name__}")
    if tokens is None or pooled is None:
        raise ValueError(f"{prefix}prompt_embeds and {prefix}pooled_prompt_embeds must be given together")
    if tokens.ndim != 3 or tokens.shape[-1] != width or not len(tokens):
        raise ValueError(f"{prefix}prompt_embeds must be [batch, tokens, {width}], got {list(tokens.shape)}")
    if tuple(pooled.shape) != (len(tokens), width):
        raise ValueError(
            f"{prefix}pooled_prompt_embeds must be [{len(tokens)}, {width}], got {list(pooled.shape)}"
        )
    return TextEmbedding(tokens, pooled)


def _matched(negative: TextEmbedding, positive: TextEmbedding) -> TextEmbedding:
    """The negative embedding for as many prompts as the positive: a single one serves all."""
    count = len(positive.tokens)
    if len(negative.tokens) == 1:
        negative = TextEmbedding(negative.tokens.expand(count, -1, -1), negative.pooled.expand(count, -1))
    if negative.tokens.shape != positive.tokens.shape:
        got, wanted = list(negative.tokens.shape), list(positive.tokens.shape)
        raise ValueError(
            f"the negative prompts must match the prompts: wanted embeddings {wanted}, got {got}"
        )
    return negative


def _must_fit(vae: VAE, text_encoder: ChatGLM | None, tokenizer: Tokenizer | None, unet: UNet) -> None:
    """The widths at which the models meet."""
    latents = vae.config.latent_channels
    if (unet.config.in_channels, unet.config.out_channels) != (latents, latents):
        got = f"{unet.config.in_channels} in and {unet.config.out_channels} out"
        raise ValueError(f"the UNet has {got} channels, wanted the VAE's {latents} for both")
    if text_encoder is not None and text_encoder.config.hidden_size != unet.config.text_dim:
        got = f"the text encoder is {text_encoder.config.hidden_size} wide"
        raise ValueError(f"{got}, and the UNet reads {unet.config.text_dim}")
    if text_encoder is not None and tokenizer is not None and tokenizer.size > text_encoder.config.vocab_size:
        got = f"the tokenizer has {tokenizer.size} tokens"
        raise ValueError(f"{got}, and the text encoder only {text_encoder.config.vocab_size}")


def whole_number(name: str, value: Any, multiple: int = 1) -> int:
    """A positive whole number, of any integer type, that is a multiple; ValueError naming it otherwise."""
    try:
        number = 0 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = 0
    if number <= 0 or number % multiple:
        kind = "whole number" if multiple == 1 else f"multiple of {multiple}"
        raise ValueError(f"{name} must be a positive {kind}, got {value!r}")
    return number

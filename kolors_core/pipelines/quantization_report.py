"""Quantization of a pipeline's models (performance/quantize.py), and its error against full precision.

report = quantize(pipe, text_encoder=8, unet="w8a8", layer_error=0.05)
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kolors_core.adapters.ip_adapter import attached
from kolors_core.chatglm import TextEmbedding
from kolors_core.conditioning import Conditioning, concat_extra_channels, size_ids
from kolors_core.context import ImagePrompt
from kolors_core.devices import unwrap_compiled
from kolors_core.guidance import guided
from kolors_core.module import first_weight, reads_counts
from kolors_core.notebook import table_html
from kolors_core.performance.quantize import (
    Format,
    QuantizedConv2d,
    QuantizedLinear,
    format_name,
    model_bytes,
    quantizable_layers,
)
from kolors_core.performance.quantize import quantize as quantize_model
from kolors_core.pipelines.stages import Task
from kolors_core.sampling import randn_latents
from kolors_core.validation import check_float

# Encoded before and after. The first is drawn, guided away from the last, the usual negative prompt.
CALIBRATION_PROMPTS = (
    "一张瓢虫的照片，微距，变焦，高质量，电影",
    "a photo of a red panda beside a blue fire truck, in the style of an oil painting",
    "雪人", "",
)  # fmt: skip
STEPS, GUIDANCE = 4, 5.0
# The format of a layer whose error is too large; None: it stays whole.
MORE_EXACT: dict[Format, Format | None] = {
    4: 8, 8: None, "fp8": None, "w8a8": 8, "w8a8-fp8": "fp8", "w8a8-fp8-fast": "w8a8-fp8",
}  # fmt: skip


@dataclass(frozen=True)
class QuantizationError:
    """The error of tensors against those in full precision.

    cosine: of the last axis, the smallest; of images, of the whole. error: |x - y| / |y|, Euclidean.
    """

    cosine: float
    error: float

    @classmethod
    def between(cls, got: Sequence[Tensor], expected: Sequence[Tensor]) -> "QuantizationError":
        """Compare tensors of the same shapes, one by one, and return the worst."""
        pairs = [(x.float(), y.float()) for x, y in zip(got, expected, strict=True)]
        cosine = min(F.cosine_similarity(x, y, dim=-1).min().item() for x, y in pairs)
        return cls(cosine, max(((x - y).norm() / y.norm()).item() for x, y in pairs))

    def __str__(self) -> str:
        return f"cosine {self.cosine:.5f}, error {self.error:.2%}"


@dataclass(frozen=True)
class QuantizedComponent:
    """A quantized model: its format, and its bytes before and after, adapters included.

    layers: how many there are. others: of them, the formats of those whose error was too large for it.
    """

    format: Format
    bytes_before: int
    bytes_after: int
    layers: int
    others: dict[str, Format | None] = field(default_factory=dict)

    def __str__(self) -> str:
        counts = Counter("whole" if one is None else format_name(one) for one in self.others.values())
        kinds = ", ".join(f"{count} {name}" for name, count in counts.items())
        others = f" ({kinds} of {self.layers} layers)" if kinds else ""
        size = f"{self.bytes_before / 2**20:.1f} -> {self.bytes_after / 2**20:.1f} MiB"
        return f"{format_name(self.format)}{others}, {size}"


@dataclass(frozen=True, kw_only=True)
class QuantizationReport:
    """Quantized models, and the errors of their results against those before, in the pipeline's precision.

    text_encoder, unet: None for a model that was not quantized; it then has no error of its own.
    tokens, pooled: of the text encoder for `CALIBRATION_PROMPTS`. noise: of the UNet for the text from
    before, in the middle of the schedule. latents: of both models together after four guided steps.
    """

    text_encoder: QuantizedComponent | None
    unet: QuantizedComponent | None
    tokens: QuantizationError
    pooled: QuantizationError
    noise: QuantizationError
    latents: QuantizationError

    def __str__(self) -> str:
        parts = []
        if self.text_encoder is not None:
            parts.append(f"text_encoder {self.text_encoder}, tokens: {self.tokens}, pooled: {self.pooled}")
        if self.unet is not None:
            parts.append(f"unet {self.unet}, noise: {self.noise}")
        return "; ".join([*parts, f"latents after {STEPS} steps: {self.latents}"])

    def __repr__(self) -> str:
        """Return the text."""
        return f"<{type(self).__name__}: {self}>"

    def _repr_html_(self) -> str:  # in notebooks
        text, unet = self.text_encoder, self.unet
        rows = [("text_encoder", text, "tokens", self.tokens), ("text_encoder", text, "pooled", self.pooled)]
        rows = [*(rows if text else []), *([("unet", unet, "noise", self.noise)] if unet else [])]
        rows.append(("all", "", f"latents after {STEPS} steps", self.latents))
        cells = [(name, part, of, f"{e.cosine:.5f}", f"{e.error:.2%}") for name, part, of, e in rows]
        return table_html(type(self).__name__, ("model", "format", "result", "cosine", "error"), cells)


@torch.no_grad()
def quantize(
    pipe: Task, *, text_encoder: Format | None = None, unet: Format | None = None,
    layer_error: float | None = None, progress: Callable[[str, int, int], object] | None = None,
) -> QuantizationReport:  # fmt: skip
    """Quantize the large layers of a pipeline's text encoder, UNet or both to a format, and measure it.

    None leaves a model as it is. Both models run before and after, where and as the pipeline runs them;
    `performance.quantize.quantize` of a model alone runs nothing. To go back, load again. LoRAs are loaded
    after it. An IP-Adapter may be loaded already; it is measured with image tokens of zeros.
    layer_error: the most |x - y| / |y| of a layer's output while the calibration prompts are encoded and one
    step is predicted; a layer with more gets the next format of `MORE_EXACT`. None: all have one format.
    progress: called as progress(component, layers done, all), and for runs of the models ("measured", ..).
    ValueError, before any change, without format or text encoder, and for what `quantizable_layers` refuses.
    """
    formats = {name: n for name, n in (("text_encoder", text_encoder), ("unet", unet)) if n is not None}
    if not formats:
        raise ValueError("nothing to quantize: give text_encoder=8, unet=8 or another format, or both")
    if pipe.text_encoder is None or pipe.tokenizer is None:
        raise ValueError("this pipeline has no text encoder or tokenizer to measure quantizing with")
    if layer_error is not None:
        check_float("layer_error", layer_error, 0)
    models = {name: unwrap_compiled(getattr(pipe, name)) for name in formats}
    choices = {name: _Choice(model, formats[name], layer_error) for name, model in models.items()}
    show = (lambda *_: None) if progress is None else progress
    with _observed(choices.get("text_encoder")):
        texts = _encode(pipe)
    show("measured", 1, 4)
    with _observed(choices.get("unet")):
        noise = _predict(pipe, texts[0])
    latents = _denoise(pipe, texts)
    show("measured", 2, 4)
    quantized = {}
    for name, model in models.items():
        pipe._enter_stage(name)
        before, others = model_bytes(model), choices[name].exceptions()
        quantize_model(model, formats[name], exceptions=others, progress=partial(show, name))
        layers = len(choices[name].formats)
        quantized[name] = QuantizedComponent(formats[name], before, model_bytes(model), layers, others)
    new_texts = texts if text_encoder is None else _encode(pipe)
    show("measured", 3, 4)
    new_noise = noise if unet is None else _predict(pipe, texts[0])
    compare = QuantizationError.between
    report = QuantizationReport(
        text_encoder=quantized.get("text_encoder"), unet=quantized.get("unet"),
        tokens=compare([text.tokens for text in new_texts], [text.tokens for text in texts]),
        pooled=compare([text.pooled for text in new_texts], [text.pooled for text in texts]),
        noise=compare([new_noise], [noise]), latents=compare([_denoise(pipe, new_texts)], [latents]),
    )  # fmt: skip
    pipe._enter_stage()
    show("measured", 4, 4)
    return report


class _Choice:
    """Choice of each layer's format: the first whose error is small enough on all inputs that it has seen."""

    def __init__(self, model: nn.Module, weight_format: Format, most: float | None) -> None:
        self.model, self.format, self.most = model, weight_format, most
        paths = quantizable_layers(model, weight_format)
        self.formats: dict[str, Format | None] = dict.fromkeys(paths, weight_format)

    def exceptions(self) -> dict[str, Format | None]:
        """Return the formats of the layers that have another one than asked for."""
        return {path: one for path, one in self.formats.items() if one != self.format}

    def see(self, path: str, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        """Compare a layer's output with that of its quantized forms, and keep the first that is near."""
        assert self.most is not None
        kind = QuantizedConv2d if isinstance(layer, nn.Conv2d) else QuantizedLinear
        while (one := self.formats[path]) is not None:
            got = kind(layer, one).forward(*inputs)  # a call would run the hooks, which it has too
            if (got.float() - output.float()).norm() <= self.most * output.float().norm():
                return
            self.formats[path] = MORE_EXACT[one]


@contextmanager
def _observed(choice: _Choice | None) -> Iterator[None]:
    """Show a choice the inputs and outputs of its layers, which run uncompiled within the block."""
    if choice is None or choice.most is None:
        yield
        return
    handles = [
        choice.model.get_submodule(path).register_forward_hook(partial(choice.see, path))
        for path in choice.formats
    ]
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for handle in handles:
            handle.remove()


def _encode(pipe: Task) -> list[TextEmbedding]:
    """Encode the calibration prompts without the prompt cache."""
    assert pipe.text_encoder is not None and pipe.tokenizer is not None
    pipe._enter_stage("text_encoder")
    place = pipe._compute_device(first_weight(pipe.text_encoder))
    batches = [pipe.tokenizer([prompt]) for prompt in CALIBRATION_PROMPTS]
    if reads_counts(pipe.text_encoder):
        batches = [tokens.merge_padding() for tokens in batches]
    return [pipe.text_encoder(tokens.to(place)) for tokens in batches]


def _condition(pipe: Task, text: TextEmbedding) -> Conditioning:
    """Return the UNet's conditioning on a text at its own size, with image tokens of zeros."""
    place = {"device": pipe.device, "dtype": pipe.dtype}
    side = pipe.unet.config.sample_size * pipe.vae.config.vae_scale_factor
    ids = size_ids((side, side), (0, 0), (side, side)).to(pipe.device)
    counts = None if text.counts is None else text.counts.to(pipe.device)
    images = tuple(
        ImagePrompt(torch.zeros(1, 1, 1, pipe.unet.config.context_dim, **place)) for _ in attached(pipe.unet)
    )
    conditioning = Conditioning(text.tokens.to(**place), text.pooled.to(**place), ids, counts, images)
    return conditioning.with_zero_extra_channels(pipe.unet.config.in_channels, _noise(pipe).shape)


def _noise(pipe: Task) -> Tensor:
    """Draw standard normal noise [1, 4, H/8, W/8] at the UNet's own size, the same every time."""
    side = pipe.unet.config.sample_size
    shape = (1, pipe.unet.config.out_channels, side, side)
    return randn_latents(shape, torch.Generator().manual_seed(0), pipe.device, torch.float32)


def _predict(pipe: Task, text: TextEmbedding) -> Tensor:
    """Predict the UNet's noise for one text, in the middle of the schedule, flat."""
    pipe._enter_stage("unet")
    timestep = torch.tensor(pipe.scheduler.num_train_timesteps // 2, device=pipe.device)
    c = _condition(pipe, text)
    latents = concat_extra_channels(_noise(pipe).to(pipe.dtype), c.extra)
    images = {"image_prompts": c.image_prompts} if c.image_prompts else {}
    inputs = c.text_tokens, c.pooled_text, c.size_ids, c.text_counts
    return pipe.unet(latents, timestep, *inputs, **images).flatten()


def _denoise(pipe: Task, texts: Sequence[TextEmbedding]) -> Tensor:
    """Return the latents of a short guided run on the first text, flat."""
    pipe._enter_stage("unet")
    positive, negative = (_condition(pipe, text) for text in (texts[0], texts[-1]))
    schedule, generator = pipe.scheduler.schedule(STEPS), torch.Generator().manual_seed(1)
    x = _noise(pipe) * schedule.init_noise_sigma
    noise = partial(randn_latents, tuple(x.shape), generator, pipe.device, torch.float32)
    denoise = guided(pipe.unet, schedule, positive, negative, GUIDANCE)
    return pipe.scheduler.sampler(schedule, noise)(denoise, x, schedule.sigmas).flatten()

"""Quantising a pipeline's models, and what it costs: the error against full precision, measured.

The models themselves are quantised in quantize.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kolors_core.adapters.ip_adapter import attached
from kolors_core.chatglm import TextEmbedding
from kolors_core.conditioning import Conditioning, concat_extra_channels, size_ids
from kolors_core.context import ImagePrompt
from kolors_core.devices import plain
from kolors_core.guidance import guided
from kolors_core.performance.quantize import quantizable, quantize, weight_bytes
from kolors_core.pipelines.base import Components
from kolors_core.sampling import draw_noise, sampler_of

# What is encoded before and after. The first is drawn, away from the last: guidance's usual negative prompt.
PROBES = (
    "一张瓢虫的照片，微距，变焦，高质量，电影",
    "a photo of a red panda beside a blue fire truck, in the style of an oil painting",
    "雪人",
    "",
)
STEPS, GUIDANCE = 4, 5.0


@dataclass(frozen=True)
class Deviation:
    """How far tensors are from those in full precision.

    cosine: of the last axis, the smallest; of pictures, of the whole. error: |x - y| / |y|, Euclidean.
    """

    cosine: float
    error: float

    @classmethod
    def of(cls, got: Sequence[Tensor], wanted: Sequence[Tensor]) -> "Deviation":
        """Between tensors of the same shapes, one by one; the worst counts."""
        pairs = [(x.float(), y.float()) for x, y in zip(got, wanted, strict=True)]
        cosines = [F.cosine_similarity(x, y, dim=-1).min().item() for x, y in pairs]
        errors = [((x - y).norm() / y.norm()).item() for x, y in pairs]
        return cls(min(cosines), max(errors))

    def __str__(self) -> str:
        return f"cosine {self.cosine:.5f}, error {self.error:.2%}"


@dataclass(frozen=True)
class QuantizedComponent:
    """One model's bits, and its bytes before and after, adapters included."""

    bits: int
    bytes_before: int
    bytes_after: int

    def __str__(self) -> str:
        before, after = (count / 2**20 for count in (self.bytes_before, self.bytes_after))
        return f"int{self.bits}, {before:.1f} -> {after:.1f} MiB"


@dataclass(frozen=True, kw_only=True)
class QuantizationReport:
    """What was quantised, and how far the results are from those before, in the pipeline's own precision.

    text_encoder, unet: None for what was not quantised; it then has no error of its own.
    tokens, pooled: the text encoder's embeddings of `PROBES`. noise: one prediction of the UNet for the text
    from before, in the middle of the schedule. latents: what both together make of it in four guided steps.
    """

    text_encoder: QuantizedComponent | None
    unet: QuantizedComponent | None
    tokens: Deviation
    pooled: Deviation
    noise: Deviation
    latents: Deviation

    def __str__(self) -> str:
        said = []
        if self.text_encoder is not None:
            said.append(f"text_encoder {self.text_encoder}, tokens: {self.tokens}, pooled: {self.pooled}")
        if self.unet is not None:
            said.append(f"unet {self.unet}, noise: {self.noise}")
        return "; ".join([*said, f"latents after {STEPS} steps: {self.latents}"])


class Quantizing(Components):
    """A pipeline whose large models can be quantised."""

    @torch.no_grad()
    def quantize(self, *, text_encoder: int | None = None, unet: int | None = None) -> QuantizationReport:
        """Hold the linear layers of the text encoder, the UNet or both in 8 or 4 bits; None leaves it alone.

        Measures what that changes by running both models before and after, where and as the pipeline runs
        them; `performance.quantize.quantize` of a model alone runs nothing. To go back, load again. LoRAs are
        loaded after it. An IP-Adapter may be there already; it is measured with pictures that say nothing.
        Raises ValueError, before anything is changed, if nothing is asked for, there is no text encoder, or
        for what `quantizable` refuses.
        """
        asked = {"text_encoder": text_encoder, "unet": unet}
        bits = {name: value for name, value in asked.items() if value is not None}
        if not bits:
            raise ValueError("nothing to quantise: give text_encoder=8 or 4, unet=8 or 4, or both")
        if self.text_encoder is None or self.tokenizer is None:
            raise ValueError("this pipeline has no text encoder or tokenizer to measure quantising with")
        models = {name: plain(getattr(self, name)) for name in bits}
        for name, model in models.items():
            quantizable(model, bits[name])
        texts = self._probe_texts()
        noise, latents = self._probe_noise(texts[0]), self._probe_latents(texts)
        made = {}
        for name, model in models.items():
            self._on_device(name)
            before = weight_bytes(model)
            quantize(model, bits[name])
            made[name] = QuantizedComponent(bits[name], before, weight_bytes(model))
        new_texts = texts if text_encoder is None else self._probe_texts()
        new_noise = noise if unet is None else self._probe_noise(texts[0])
        report = QuantizationReport(
            text_encoder=made.get("text_encoder"),
            unet=made.get("unet"),
            tokens=Deviation.of([text.tokens for text in new_texts], [text.tokens for text in texts]),
            pooled=Deviation.of([text.pooled for text in new_texts], [text.pooled for text in texts]),
            noise=Deviation.of([new_noise], [noise]),
            latents=Deviation.of([self._probe_latents(new_texts)], [latents]),
        )
        self._on_device()
        return report

    def _probe_texts(self) -> list[TextEmbedding]:
        """The probes' embeddings, past the prompt cache."""
        assert self.text_encoder is not None and self.tokenizer is not None
        self._on_device("text_encoder")
        place = self._works_on(plain(self.text_encoder).embedding.weight)
        return [self.text_encoder(self.tokenizer([prompt]).collapse().to(place)) for prompt in PROBES]

    def _probe_condition(self, text: TextEmbedding) -> Conditioning:
        """What the UNet is told of a probe, at its own size; and of pictures, tokens of zeros."""
        place = {"device": self.device, "dtype": self.dtype}
        side = self.unet.config.sample_size * self.vae.config.downscale
        ids = size_ids((side, side), (0, 0), (side, side)).to(self.device)
        counts = None if text.counts is None else text.counts.to(self.device)
        silent = ImagePrompt(torch.zeros(1, 1, 1, self.unet.config.context_dim, **place))
        images = (silent,) * len(attached(self.unet))
        told = Conditioning(text.tokens.to(**place), text.pooled.to(**place), ids, counts, images)
        return told.with_zero_extra_channels(self.unet.config.in_channels, self._probe_start().shape)

    def _probe_start(self) -> Tensor:
        """Standard normal noise [1, 4, H/8, W/8] at the UNet's own size, the same every time."""
        config = self.unet.config
        shape = (1, config.out_channels, config.sample_size, config.sample_size)
        return draw_noise(shape, torch.Generator().manual_seed(0), self.device, torch.float32)

    def _probe_noise(self, text: TextEmbedding) -> Tensor:
        """What the UNet predicts once of one probe, in the middle of the schedule, flat."""
        self._on_device("unet")
        timestep = torch.tensor(self.scheduler.num_train_timesteps // 2, device=self.device)
        told = self._probe_condition(text)
        latents = concat_extra_channels(self._probe_start().to(self.dtype), told.extra)
        noise = self.unet(
            latents, timestep, told.text_tokens, told.pooled_text, told.size_ids,
            told.text_counts, told.image_prompts,
        )  # fmt: skip
        return noise.flatten()

    def _probe_latents(self, texts: Sequence[TextEmbedding]) -> Tensor:
        """Where a short guided run of the first probe ends, flat."""
        self._on_device("unet")
        positive, negative = (self._probe_condition(text) for text in (texts[0], texts[-1]))
        schedule, draw = self.scheduler.schedule(STEPS), torch.Generator().manual_seed(1)
        x = self._probe_start() * schedule.start_scale
        sampler = sampler_of(
            self.scheduler, schedule, lambda: draw_noise(tuple(x.shape), draw, self.device, torch.float32)
        )
        denoise = guided(self.unet, schedule, positive, negative, GUIDANCE)
        return sampler(denoise, x, schedule.sigmas).flatten()

"""ControlNet (https://arxiv.org/abs/2302.05543): conditions the denoiser on edges, depth or pose images.

A copy of the UNet's down path and middle block reads the latents plus the embedded control image. Its
outputs, after convolutions that start at zero, are added to the UNet's skip connections and middle block.
Source: `ControlNetModel` in diffusers' models/controlnets/controlnet.py; it leaves the text projection, which
the released Kolors ControlNets have, to its caller.
Shapes: B batch, C channels, H height and W width of latents; a control image is P (8) times as high and wide.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial, reduce
from itertools import pairwise, repeat
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kolors_core.conditioning import Conditioning, StepResiduals
from kolors_core.config import ConfigReader, PublicConfig, UNetConfig
from kolors_core.context import Context, KeysValues
from kolors_core.denoiser import require_unet
from kolors_core.module import WrapStep
from kolors_core.precompute import PrecomputedInputs, has_default_forward
from kolors_core.schedule import Schedule
from kolors_core.unet import TimeShift, UNet, UNetEncoder
from kolors_core.validation import check_float

_REQUIRED_VALUES: dict[str, Any] = {
    "_class_name": "ControlNetModel", "controlnet_conditioning_channel_order": "rgb",
    "conditioning_channels": 3, "global_pool_conditions": False,
}  # fmt: skip
_SHARED_FIELDS = {  # the UNet's public fields that a ControlNet's constructor takes too
    "in_channels", "flip_sin_to_cos", "freq_shift", "down_block_types", "mid_block_type",
    "only_cross_attention", "block_out_channels", "layers_per_block", "downsample_padding",
    "mid_block_scale_factor", "act_fn", "norm_num_groups", "norm_eps", "cross_attention_dim",
    "transformer_layers_per_block", "encoder_hid_dim", "encoder_hid_dim_type", "attention_head_dim",
    "use_linear_projection", "class_embed_type", "addition_embed_type", "addition_time_embed_dim",
    "num_class_embeds", "resnet_time_scale_shift", "projection_class_embeddings_input_dim",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ControlNetConfig(UNetConfig):
    """Sizes of a ControlNet: those of its UNet, and conditioning_widths, the channels of the image embedding,
    each at half the resolution of the one before.
    """

    conditioning_widths: tuple[int, ...] = (16, 32, 96, 256)

    @classmethod
    def from_public(cls, public: PublicConfig, where: str = "controlnet/config.json") -> Self:
        """Read diffusers' `ControlNetModel` config; ValueError for SDXL's, which has no text projection."""
        fields = ConfigReader(public, where)
        fields.require_fixed(_REQUIRED_VALUES)
        widths = fields.integers("conditioning_embedding_out_channels", most=2**16)
        rest = {name: value for name, value in public.items() if name not in fields.read_names}
        if unknown := [name for name in ("sample_size", "out_channels", "up_block_types") if name in rest]:
            fields.reject(unknown[0], rest[unknown[0]], "no such field of a ControlNet")
        downs, channels = rest.get("down_block_types"), rest.get("in_channels")
        ups = (
            [str(kind).replace("Down", "Up") for kind in downs[::-1]]
            if isinstance(downs, list | tuple)
            else []
        )
        rest |= {"up_block_types": ups, "out_channels": channels, "sample_size": cls.sample_size}
        return cls(**asdict(UNetConfig.from_public(rest, where)), conditioning_widths=widths)

    def to_public(self) -> dict[str, Any]:
        """Return the `config.json` that diffusers' ControlNetModel reads."""
        shared = {name: value for name, value in super().to_public().items() if name in _SHARED_FIELDS}
        own = {"conditioning_embedding_out_channels": list(self.conditioning_widths)}
        return shared | _REQUIRED_VALUES | own


class ImageEmbedding(nn.Module):
    """Embedding of the control image as a feature map of the latents' size."""

    def __init__(self, config: ControlNetConfig) -> None:
        super().__init__()
        widths = config.conditioning_widths
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        self.convs = nn.ModuleList()
        for c, next_c in pairwise(widths):
            self.convs += [nn.Conv2d(c, c, 3, padding=1), nn.Conv2d(c, next_c, 3, stride=2, padding=1)]
        self.conv_out = nn.Conv2d(widths[-1], config.channels[0], 3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        """Map image [B, 3, P * H, P * W] in [0, 1] to [B, C, H, W]."""
        for conv in (self.conv_in, *self.convs):
            image = F.silu(conv(image))
        return self.conv_out(image)


class ControlNet(UNetEncoder):
    """ControlNet: residuals of a control image for the UNet's skip connections and its middle block."""

    config: ControlNetConfig

    def __init__(self, config: ControlNetConfig) -> None:
        super().__init__(config)
        self.image_embedding = ImageEmbedding(config)
        self.to_skips = nn.ModuleList([nn.Conv2d(width, width, 1) for width in self.skip_channels])
        self.to_mid = nn.Conv2d(config.channels[-1], config.channels[-1], 1)
        for conv in (*self.to_skips, self.to_mid, self.image_embedding.conv_out):
            for parameter in conv.parameters():
                nn.init.zeros_(parameter)

    @classmethod
    def from_unet(
        cls, unet: UNet, conditioning_widths: Sequence[int] = ControlNetConfig.conditioning_widths
    ) -> Self:
        """Initialize a ControlNet for training from the UNet's weights; its residuals are zero.

        It has the text projection; of an inpainting UNet's inputs, only the latents. ValueError if quantized.
        """
        require_unet(unet, "a ControlNet")
        latents = unet.config.out_channels
        sizes = {"in_channels": latents, "conditioning_widths": tuple(conditioning_widths)}
        net = cls(ControlNetConfig(**asdict(unet.config) | sizes)).to(unet.conv_in.weight)
        of_unet, new = unet.state_dict(), ("image_embedding.", "to_skips.", "to_mid.")
        if missing := [n for n in net.state_dict() if n not in of_unet and not n.startswith(new)]:
            raise ValueError(f"the UNet, quantized perhaps, has no plain {missing[0]} to start from")
        state = {name: of_unet.get(name, tensor) for name, tensor in net.state_dict().items()}
        state["conv_in.weight"] = state["conv_in.weight"][:, :latents]
        net.load_state_dict(state)
        return net

    def forward(
        self, latents: Tensor, timestep: Tensor, text_tokens: Tensor, pooled_text: Tensor, size_ids: Tensor,
        image: Tensor, text_counts: Tensor | None = None,
    ) -> list[Tensor]:  # fmt: skip
        """Compute the residuals of the UNet's skip connections and, last, of its middle block, unscaled.

        image: the control image [1 or B, 3, P * H, P * W] in [0, 1]. The others: as for `UNet.forward`.
        """
        time = self.embed_time(timestep.expand(latents.shape[0]))  # [B, T]
        time = time + self.added_embedding(pooled_text, size_ids)  # [B, T]
        context = self.context(text_tokens, text_counts)
        return self.residuals(latents, self.image_embedding(image), repeat(time), repeat(context))

    def residuals(
        self, latents: Tensor, image: Tensor, times: Iterable[Tensor | TimeShift],
        contexts: Iterable[Context | KeysValues], copies: int = 1,
    ) -> list[Tensor]:  # fmt: skip
        """Compute `forward` from a run's constant inputs; arguments as for `UNet.forward_precomputed`.

        latents: [b, ..., H, W], only the first `in_channels` are read. image: [1 or B, C, H, W], embedded.
        """
        x = self.conv_in(latents[:, : self.config.in_channels])
        x = x.repeat(copies, 1, 1, 1) if copies > 1 else x  # [B, C, H, W]
        skips, mid = self.encode(x + image, iter(times), iter(contexts))
        return [conv(skip) for conv, skip in zip(self.to_skips, skips, strict=True)] + [self.to_mid(mid)]


@dataclass(frozen=True)
class ControlInput:
    """Input and schedule of one ControlNet. image: [1 or B, 3, P * H, P * W] in [0, 1], one for all images or
    one for each. scale: a factor on the residuals. start, end: the ControlNet acts in step i of n if
    i / n >= start and (i + 1) / n <= end. Raises ValueError for values that would have no effect.
    """

    net: ControlNet
    image: Tensor
    scale: float = 0.8
    start: float = 0.0
    end: float = 1.0

    def __post_init__(self) -> None:
        for name in ("scale", "start", "end"):
            value = check_float(f"a ControlNet's {name}", getattr(self, name))
            object.__setattr__(self, name, value)  # a dataclass that is frozen
        if self.scale == 0:
            raise ValueError("a ControlNet's scale must be a number that is not 0")
        if not 0 <= self.start < self.end <= 1:
            expected = "from 0 to below its end, at most 1"
            raise ValueError(f"a ControlNet's start must be {expected}, got {self.start} and {self.end}")

    @classmethod
    def cat(cls, *parts: "ControlInput") -> "ControlInput":
        """Concatenate batches; an image of one row that all share stays one."""
        first = parts[0]
        if len({(part.net, part.scale, part.start, part.end) for part in parts}) > 1:
            raise ValueError("controls of different ControlNets, scales or steps cannot be one batch")
        if all(part.image is first.image for part in parts) and len(first.image) == 1:
            return first
        return replace(first, image=torch.cat([part.image for part in parts]))


@dataclass(frozen=True)
class ControlResiduals:
    """Residuals of several ControlNets, each in its part of the run: `Conditioning.residuals`."""

    controls: tuple[ControlInput, ...]

    def cat(self, *others: "ControlResiduals") -> "ControlResiduals":
        """Concatenate batches; ValueError for controls of other ControlNets, scales or steps."""
        rows = zip(self.controls, *(other.controls for other in others), strict=True)
        return ControlResiduals(tuple(ControlInput.cat(*row) for row in rows))

    def prepare(
        self, schedule: Schedule, conditioning: Conditioning, repeats: int, *, precompute: bool,
        wrap_step: WrapStep | None,
    ) -> StepResiduals:  # fmt: skip
        """Return the sum of the residuals as a function of a run's steps; see `conditioning.Residuals`.

        A step is that in whose interval sigma lies, or the nearest. ValueError if a control has no step.
        """
        active, sigmas = active_controls(self.controls, len(schedule.timesteps)), schedule.sigmas.tolist()
        nets = [_prepare(c, schedule, conditioning, repeats, precompute, wrap_step) for c in self.controls]

        def residuals(latents: Tensor, timestep: float, sigma: float) -> list[Tensor]:
            step = min(max(sum(level >= sigma for level in sigmas), 1), len(active)) - 1
            scaled = [[self.controls[k].scale * r for r in nets[k](latents, timestep)] for k in active[step]]
            return [reduce(torch.add, row) for row in zip(*scaled, strict=True)]

        return residuals


def _prepare(
    control: ControlInput, schedule: Schedule, conditioning: Conditioning, repeats: int, precompute: bool,
    wrap_step: WrapStep | None,
) -> Callable[[Tensor, float], list[Tensor]]:  # fmt: skip
    net, c = control.net, conditioning
    if not (precompute and has_default_forward(net, ControlNet)):

        def call(latents: Tensor, timestep: float) -> list[Tensor]:
            time = torch.full((), timestep, dtype=torch.float32, device=latents.device)
            inputs = latents.repeat(repeats, 1, 1, 1), time, c.text_tokens, c.pooled_text, c.size_ids
            return net(*inputs, control.image, c.text_counts)

        return call
    inputs = PrecomputedInputs(net, schedule, replace(c, image_prompts=(), perturbed=(), added=None))
    constant = inputs.keys_values, net.image_embedding(control.image)

    def step(constant: Any, latents: Tensor, shifts: Tensor) -> list[Tensor]:
        keys_values, image = constant
        return net.residuals(latents, image, inputs.split(shifts), keys_values, repeats)

    run = partial(step, constant) if wrap_step is None else wrap_step(step, constant, [net], repeats)
    return lambda latents, timestep: run(latents, inputs.shifts(timestep))


def active_controls(controls: Sequence[ControlInput], steps: int) -> list[tuple[int, ...]]:
    """List the indices of the controls that act in each step. ValueError for one that never acts."""
    acts = [[i / steps >= c.start and (i + 1) / steps <= c.end for i in range(steps)] for c in controls]
    for number, (c, is_active) in enumerate(zip(controls, acts, strict=True), 1):
        if not any(is_active):
            part = f"none of the {steps} steps, from {c.start} to {c.end} of the run"
            raise ValueError(f"ControlNet {number} would act in {part}")
    return [tuple(k for k, is_active in enumerate(acts) if is_active[i]) for i in range(steps)]


def controlnets_of(controlnet: Any) -> list[ControlNet]:
    """List a pipeline's ControlNets: none, one or several. TypeError for anything else."""
    if controlnet is None:
        return []
    nets: list[Any] = list(controlnet) if is_multi(controlnet) else [controlnet]
    for net in nets:
        if not isinstance(getattr(net, "_orig_mod", net), ControlNet):
            got = f"{type(net).__module__}.{type(net).__name__}"
            raise TypeError(f"controlnet must be kolors_core's ControlNet, a list of them or None, got {got}")
    return nets


def is_multi(controlnet: Any) -> bool:
    """Return whether a pipeline has a list of ControlNets, even of one, and so takes a list of images."""
    return isinstance(controlnet, list | tuple | nn.ModuleList)


def check_fits(controlnet: Any, unet: UNet, vae_scale_factor: int) -> None:
    """Raise ValueError if a ControlNet is for another UNet or another size of latents."""
    of_unet = vars(unet.config) | {"in_channels": unet.config.out_channels}
    for net in controlnets_of(controlnet):
        of_net, side = vars(net.config), 2 ** (len(net.config.conditioning_widths) - 1)
        for name in ("in_channels", "channels", "resnets_per_level", "text_dim", "size_dim"):
            if of_net[name] != of_unet[name]:
                raise ValueError(f"the ControlNet's {name} is {of_net[name]}, and the UNet's {of_unet[name]}")
        if side != vae_scale_factor:
            raise ValueError(f"the ControlNet makes {side} pixels one latent, and the VAE {vae_scale_factor}")

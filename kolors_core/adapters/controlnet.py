"""ControlNet (https://arxiv.org/abs/2302.05543): an image of edges, depth or a pose steers the denoiser.

The UNet's way down and middle once more, with weights of their own: they read the latents and, added to them,
the control image. What they make of it goes through convolutions that start at zero, and is added to the
UNet's skips and to its middle.
Source: `ControlNetModel` in diffusers' models/controlnets/controlnet.py; it leaves the text projection, which
the released Kolors ControlNets have, to its caller.
Shapes: B batch, C channels, H height and W width of latents; a control image is P (8) times as high and wide.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import repeat
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kolors_core.conditioning import Conditioning, StepResiduals
from kolors_core.config import ConfigReader, PublicConfig, UNetConfig
from kolors_core.context import Context, KeysValues
from kolors_core.module import WrapStep
from kolors_core.precompute import PrecomputedInputs, has_default_forward
from kolors_core.schedule import Schedule
from kolors_core.unet import Encoder, Shift, UNet
from kolors_core.validation import check_float

_FIXED: dict[str, Any] = {
    "_class_name": "ControlNetModel", "controlnet_conditioning_channel_order": "rgb",
    "conditioning_channels": 3, "global_pool_conditions": False,
}  # fmt: skip
# Of the UNet's public fields, those that a ControlNet's constructor takes too.
_SHARED = {
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
    whose maps halve from one to the next.
    """

    conditioning_widths: tuple[int, ...] = (16, 32, 96, 256)

    @classmethod
    def from_public(cls, public: PublicConfig, where: str = "controlnet/config.json") -> Self:
        """Read diffusers' `ControlNetModel` config; SDXL's, which projects no text, is refused."""
        fields = ConfigReader(public, where)
        fields.require_fixed(_FIXED)
        widths = fields.integers("conditioning_embedding_out_channels", most=2**16)
        rest = {name: value for name, value in public.items() if name not in fields.read_names}
        if strangers := [name for name in ("sample_size", "out_channels", "up_block_types") if name in rest]:
            fields.reject(strangers[0], rest[strangers[0]], "no such field of a ControlNet")
        ups = [str(kind).replace("Down", "Up") for kind in reversed(rest.get("down_block_types") or ())]
        channels = rest.get("in_channels")
        rest |= {"up_block_types": ups, "out_channels": channels, "sample_size": cls.sample_size}
        return cls(**asdict(UNetConfig.from_public(rest, where)), conditioning_widths=widths)

    def to_public(self) -> dict[str, Any]:
        """The `config.json` that diffusers' ControlNetModel reads."""
        shared = {name: value for name, value in super().to_public().items() if name in _SHARED}
        return shared | _FIXED | {"conditioning_embedding_out_channels": list(self.conditioning_widths)}


class ImageEmbedding(nn.Module):
    """The control image as a map of the latents' size."""

    def __init__(self, config: ControlNetConfig) -> None:
        super().__init__()
        widths = config.conditioning_widths
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        self.convs = nn.ModuleList()
        for width, wider in zip(widths, widths[1:], strict=False):
            self.convs.append(nn.Conv2d(width, width, 3, padding=1))
            self.convs.append(nn.Conv2d(width, wider, 3, stride=2, padding=1))
        self.conv_out = nn.Conv2d(widths[-1], config.channels[0], 3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        """image: [B, 3, P * H, P * W] in [0, 1]. Returns [B, C, H, W]."""
        x = F.silu(self.conv_in(image))
        for conv in self.convs:
            x = F.silu(conv(x))
        return self.conv_out(x)


class ControlNet(Encoder):
    """What a control image adds to the UNet: a map for each skip, and one for the middle."""

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
        """One to be trained: the UNet's own weights, text projection included, and as yet no effect.

        Of an inpainting UNet it knows the latents alone. ValueError for a quantized UNet.
        """
        latents = unet.config.out_channels
        config = asdict(unet.config) | {
            "in_channels": latents,
            "conditioning_widths": tuple(conditioning_widths),
        }
        net = cls(ControlNetConfig(**config)).to(unet.conv_in.weight)
        theirs, own = unet.state_dict(), ("image_embedding.", "to_skips.", "to_mid.")
        absent = (name for name in net.state_dict() if name not in theirs and not name.startswith(own))
        if (first := next(absent, None)) is not None:
            raise ValueError(f"the UNet, quantised perhaps, has no plain {first} to start from")
        state = {name: theirs.get(name, tensor) for name, tensor in net.state_dict().items()}
        state["conv_in.weight"] = state["conv_in.weight"][:, :latents]
        net.load_state_dict(state)
        return net

    def forward(
        self,
        latents: Tensor,
        timestep: Tensor,
        text_tokens: Tensor,
        pooled_text: Tensor,
        size_ids: Tensor,
        image: Tensor,
        text_counts: Tensor | None = None,
    ) -> list[Tensor]:
        """What to add to the UNet's skips and, last, to its middle, before any scale.

        image: the control image [1 or B, 3, P * H, P * W] in [0, 1]. All others: as for `UNet.forward`.
        """
        time = self.embed_time(timestep.expand(latents.shape[0]))  # [B, T]
        time = time + self.added_embedding(pooled_text, size_ids)  # [B, T]
        context = self.context(text_tokens, text_counts, ())
        return self.residuals(latents, self.image_embedding(image), repeat(time), repeat(context))

    def residuals(
        self,
        latents: Tensor,
        image: Tensor,
        times: Iterable[Tensor | Shift],
        contexts: Iterable[Context | KeysValues],
        copies: int = 1,
    ) -> list[Tensor]:
        """`forward` on what a run computes once; arguments as for `UNet.denoise`.

        latents: [b, ..., H, W], of which it reads the first channels. image: [1 or B, C, H, W], embedded.
        """
        x = self.conv_in(latents[:, : self.config.in_channels])
        if copies > 1:
            x = x.repeat(copies, 1, 1, 1)  # [B, C, H, W]
        skips, mid = self.descend(x + image, iter(times), iter(contexts))
        return [conv(skip) for conv, skip in zip(self.to_skips, skips, strict=True)] + [self.to_mid(mid)]


@dataclass(frozen=True)
class Control:
    """One control image and how it acts.

    image: [1 or B, 3, P * H, P * W] in [0, 1], one for all images or one for each. scale: a factor on what
    `net` adds. start, end: it acts in step i of n if i / n >= start and (i + 1) / n <= end.
    Raises ValueError for what would have no effect.
    """

    net: ControlNet
    image: Tensor
    scale: float = 0.8
    start: float = 0.0
    end: float = 1.0

    def __post_init__(self) -> None:
        for name in ("scale", "start", "end"):
            check_float(f"a ControlNet's {name}", getattr(self, name))
        if self.scale == 0:
            raise ValueError("a ControlNet's scale must be a number that is not 0")
        if not 0 <= self.start < self.end <= 1:
            got = f"{self.start} and {self.end}"
            raise ValueError(f"a ControlNet's start must be from 0 to below its end, at most 1, got {got}")

    @classmethod
    def cat(cls, *parts: "Control") -> "Control":
        """One for batches one after another; an image of one row that is the same for all stays one."""
        first = parts[0]
        if len({(part.net, part.scale, part.start, part.end) for part in parts}) > 1:
            raise ValueError("controls of different ControlNets, scales or steps cannot be one batch")
        if all(part.image is first.image for part in parts) and len(first.image) == 1:
            return first
        return replace(first, image=torch.cat([part.image for part in parts]))


@dataclass(frozen=True)
class ControlResiduals:
    """What several ControlNets add, each in its part of the run: `Conditioning.residuals`."""

    controls: tuple[Control, ...]

    def cat(self, *others: "ControlResiduals") -> "ControlResiduals":
        """Concatenate batches; ValueError for controls of other ControlNets, scales or steps."""
        rows = zip(self.controls, *(other.controls for other in others), strict=True)
        return ControlResiduals(tuple(Control.cat(*row) for row in rows))

    def prepare(
        self,
        schedule: Schedule,
        conditioning: Conditioning,
        repeats: int,
        *,
        precompute: bool,
        wrap_step: WrapStep | None,
    ) -> StepResiduals:
        """Return the sum of the residuals as a function of a run's steps; see `conditioning.Residuals`.

        A control acts in the step in whose interval sigma lies: before the first it is the first, at the end
        the last. ValueError for one that acts in no step.
        """
        active = active_controls(self.controls, len(schedule.timesteps))
        sigmas = schedule.sigmas.tolist()
        nets = [_prepare(c, schedule, conditioning, repeats, precompute, wrap_step) for c in self.controls]

        def residuals(latents: Tensor, timestep: float, sigma: float) -> list[Tensor]:
            step = min(max(sum(level >= sigma for level in sigmas), 1), len(active)) - 1
            return sum_residuals((self.controls[k].scale, nets[k](latents, timestep)) for k in active[step])

        return residuals


def _prepare(
    control: Control,
    schedule: Schedule,
    conditioning: Conditioning,
    repeats: int,
    precompute: bool,
    wrap_step: WrapStep | None,
) -> Callable[[Tensor, float], list[Tensor]]:
    """Return one ControlNet's residuals as a function of latents and timestep."""
    net, c = control.net, conditioning
    if not (precompute and has_default_forward(net, ControlNet)):

        def call(latents: Tensor, timestep: float) -> list[Tensor]:
            time = torch.tensor(timestep, dtype=torch.float32, device=latents.device)
            inputs = latents.repeat(repeats, 1, 1, 1), time, c.text_tokens, c.pooled_text, c.size_ids
            return net(*inputs, control.image, c.text_counts)

        return call
    inputs = PrecomputedInputs(net, schedule, conditioning)
    constant = inputs.reads, net.image_embedding(control.image)

    def step(constant: Any, latents: Tensor, shifts: Tensor) -> list[Tensor]:
        reads, image = constant
        return net.residuals(latents, image, inputs.split(shifts), reads, repeats)

    run = partial(step, constant) if wrap_step is None else wrap_step(step, constant, [net], repeats)
    return lambda latents, timestep: run(latents, inputs.shifts(timestep))


def active_controls(controls: Sequence[Control], steps: int) -> list[tuple[int, ...]]:
    """For each step of a run, which of the controls act. ValueError for one that never does."""
    found = [
        tuple(k for k, c in enumerate(controls) if i / steps >= c.start and (i + 1) / steps <= c.end)
        for i in range(steps)
    ]
    for k, control in enumerate(controls):
        if not any(k in those for those in found):
            got = f"from {control.start} to {control.end}"
            raise ValueError(f"ControlNet {k + 1} would act in none of the {steps} steps, {got} of the run")
    return found


def sum_residuals(parts: Iterable[tuple[float, Sequence[Tensor]]]) -> list[Tensor]:
    """(scale, residuals) of several ControlNets, as one; nothing of none."""
    total: list[Tensor] = []
    for scale, residuals in parts:
        scaled = [scale * residual for residual in residuals]
        total = [a + b for a, b in zip(total, scaled, strict=True)] if total else scaled
    return total


def controlnets_of(controlnet: Any) -> list[ControlNet]:
    """A pipeline's ControlNets: none, one or a list. TypeError for what is none."""
    if controlnet is None:
        return []
    nets: list[Any] = list(controlnet) if is_multi(controlnet) else [controlnet]
    for net in nets:
        if not isinstance(getattr(net, "_orig_mod", net), ControlNet):
            got = f"{type(net).__module__}.{type(net).__name__}"
            raise TypeError(f"controlnet must be kolors_core's ControlNet, a list of them or None, got {got}")
    return nets


def is_multi(controlnet: Any) -> bool:
    """Whether a pipeline has a list of ControlNets, be it of one, and so takes a list of images."""
    return isinstance(controlnet, list | tuple | nn.ModuleList)


def check_fits(controlnet: Any, unet: UNet, vae_scale_factor: int) -> None:
    """ValueError if a ControlNet was made for another UNet or another size of latents."""
    of_unet = vars(unet.config) | {"in_channels": unet.config.out_channels}
    for net in controlnets_of(controlnet):
        own, pixels = vars(net.config), 2 ** (len(net.config.conditioning_widths) - 1)
        for name in ("in_channels", "channels", "resnets_per_level", "text_dim", "size_dim"):
            if own[name] != of_unet[name]:
                raise ValueError(f"the ControlNet's {name} is {own[name]}, and the UNet's {of_unet[name]}")
        if pixels != vae_scale_factor:
            raise ValueError(
                f"the ControlNet makes {pixels} pixels one latent, and the VAE {vae_scale_factor}"
            )

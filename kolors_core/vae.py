"""VAE: images [B, 3, H, W] in [-1, 1] <-> latents [B, 4, H/8, W/8] of about unit variance.

Source: `AutoencoderKL` in diffusers' models/autoencoders/autoencoder_kl.py. SDXL's weights overflow in fp16.
Shapes: B batch, C channels, H height, W width, N = H * W.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kolors_core.attention import attention
from kolors_core.config import VAEConfig
from kolors_core.module import Model

NORM_EPS = 1e-6


@dataclass(frozen=True)
class LatentDistribution:
    """Diagonal Gaussian over latents: mean and standard deviation, each [B, 4, H/8, W/8]."""

    mean: Tensor
    std: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        """Compute mean + std * noise, for standard normal noise of the same shape."""
        return self.mean + self.std * noise.to(self.mean)


class ResBlock(nn.Module):
    """ResBlock of two convolutions and a shortcut; the UNet's without a time embedding."""

    is_block = True

    def __init__(self, in_channels: int, out_channels: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels, eps=NORM_EPS)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=NORM_EPS)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        is_same = in_channels == out_channels
        self.shortcut = nn.Identity() if is_same else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map x [B, C, H, W] to [B, out_channels, H, W]."""
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return self.shortcut(x) + h


class Attention(nn.Module):
    """Attention with one head over all pixels, as a residual."""

    is_block = True

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=NORM_EPS)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map x [B, C, H, W] to [B, C, H, W]."""
        h = self.norm(x).flatten(2).transpose(1, 2)  # [B, N, C]
        q, k, v = (project(h).unsqueeze(1) for project in (self.to_q, self.to_k, self.to_v))  # [B, 1, N, C]
        h = self.to_out(attention(q, k, v).squeeze(1))  # [B, N, C]
        return x + h.transpose(1, 2).unflatten(2, x.shape[-2:])  # [B, C, H, W]


class MidBlock(nn.Module):
    """Mid level: ResBlock, attention, ResBlock at the smallest size."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.resnet_in = ResBlock(channels, channels, groups)
        self.attention = Attention(channels, groups)
        self.resnet_out = ResBlock(channels, channels, groups)

    def forward(self, x: Tensor) -> Tensor:
        """Map x [B, C, H, W] to [B, C, H, W]."""
        return self.resnet_out(self.attention(self.resnet_in(x)))


class DownBlock(nn.Module):
    """Down level: ResBlocks, then downsampling by 2 unless innermost."""

    def __init__(self, in_channels: int, channels: int, is_last: bool, config: VAEConfig) -> None:
        super().__init__()
        inputs = [in_channels] + [channels] * (config.resnets_per_level - 1)
        self.resnets = nn.ModuleList([ResBlock(width, channels, config.norm_groups) for width in inputs])
        self.downsample = None if is_last else nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """Map x [B, C, H, W] to [B, channels, H/2, W/2], or to [B, channels, H, W] at the innermost level."""
        for resnet in self.resnets:
            x = resnet(x)
        if self.downsample is not None:
            x = self.downsample(F.pad(x, (0, 1, 0, 1)))  # below and to the right, as it was trained
        return x


class UpBlock(nn.Module):
    """Up level: ResBlocks, then upsampling by 2 unless outermost."""

    def __init__(self, in_channels: int, channels: int, is_last: bool, config: VAEConfig) -> None:
        super().__init__()
        inputs = [in_channels] + [channels] * config.resnets_per_level
        self.resnets = nn.ModuleList([ResBlock(width, channels, config.norm_groups) for width in inputs])
        self.upsample = None if is_last else nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Map x [B, C, H, W] to [B, channels, 2H, 2W], or to [B, channels, H, W] at the outermost level."""
        for resnet in self.resnets:
            x = resnet(x)
        if self.upsample is not None:
            x = self.upsample(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return x


class Encoder(nn.Module):
    """Encoder: image -> mean and log-variance of the latents, concatenated as channels."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        first, last = config.channels[0], config.channels[-1]
        inputs, innermost = (first, *config.channels), len(config.channels) - 1
        self.conv_in = nn.Conv2d(config.image_channels, first, 3, padding=1)
        self.down = nn.ModuleList(
            [DownBlock(inputs[i], width, i == innermost, config) for i, width in enumerate(config.channels)]
        )
        self.mid = MidBlock(last, config.norm_groups)
        self.norm_out = nn.GroupNorm(config.norm_groups, last, eps=NORM_EPS)
        self.conv_out = nn.Conv2d(last, 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Map images [B, 3, H, W] to [B, 8, H/8, W/8]."""
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    """Decoder: latents -> image."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        widths = config.channels[::-1]
        inputs, outermost = (widths[0], *widths), len(widths) - 1
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid = MidBlock(widths[0], config.norm_groups)
        self.up = nn.ModuleList(
            [UpBlock(inputs[i], width, i == outermost, config) for i, width in enumerate(widths)]
        )
        self.norm_out = nn.GroupNorm(config.norm_groups, widths[-1], eps=NORM_EPS)
        self.conv_out = nn.Conv2d(widths[-1], config.image_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Map latents [B, 4, H/8, W/8] to [B, 3, H, W]."""
        x = self.mid(self.conv_in(x))
        for level in self.up:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


def check_sides(images: Tensor, side: int) -> None:
    """Raise ValueError unless images [..., H, W] have sides that are multiples of `side`."""
    height, width = images.shape[-2:]
    if height % side or width % side:
        raise ValueError(f"image sides must be multiples of {side}, got {height} x {width}")


RunCoder = Callable[[nn.Module, Tensor], Tensor]


def call(coder: nn.Module, x: Tensor) -> Tensor:
    """Return coder(x)."""
    return coder(x)


def run_channels_last(run_coder: RunCoder, coder: nn.Module, x: Tensor) -> Tensor:
    """Run a coder with feature maps in channels-last layout, and return its result in the default one.

    On a CPU in half precision, convolutions are 1.07 times as fast this way (benchmarks/NOTES.md) and make no
    layout copies. In float32, torch's GroupNorm would lose digits in this layout: 2e-4 at 1024x1024.
    """
    return run_coder(coder, x.contiguous(memory_format=torch.channels_last)).contiguous()


class VAE(Model):
    """VAE of an encoder and a decoder. Outside this class latents are scaled by `config.scaling_factor`.

    run_coder: the function (coder, x) -> result that runs either; performance/vae_tiling.py's runs tiles.
    """

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config
        latents = config.latent_channels
        self.encoder = Encoder(config)
        self.quant_conv = nn.Conv2d(2 * latents, 2 * latents, 1)
        self.post_quant_conv = nn.Conv2d(latents, latents, 1)
        self.decoder = Decoder(config)
        self.run_coder: RunCoder = call

    def encode_images(self, images: Tensor) -> LatentDistribution:
        """Encode images [B, 3, H, W] in [-1, 1], whose sides are multiples of 8, to a latent distribution."""
        check_sides(images, self.config.vae_scale_factor)
        mean, log_variance = self.quant_conv(self._run(self.encoder, images)).chunk(2, dim=1)
        std = torch.exp(0.5 * log_variance.clamp(-30.0, 20.0))
        return LatentDistribution(mean * self.config.scaling_factor, std * self.config.scaling_factor)

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Decode scaled latents [B, 4, H/8, W/8] to images [B, 3, H, W] of about [-1, 1], not clamped."""
        return self._run(self.decoder, self.post_quant_conv(latents / self.config.scaling_factor))

    def _run(self, coder: nn.Module, x: Tensor) -> Tensor:
        if x.device.type == "cpu" and x.dtype.itemsize == 2 and x.is_contiguous():
            return run_channels_last(self.run_coder, coder, x)
        return self.run_coder(coder, x)

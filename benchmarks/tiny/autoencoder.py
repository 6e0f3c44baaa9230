"""Training the embedded model's VAE: on crops, then on whole pictures, of every emoji of the font.

Loss: absolute and squared error of the picture and of two smaller ones, which carry the colours, and a small
KL term (https://arxiv.org/abs/1312.6114) that keeps the latents near the unit Gaussian.
Shapes: N pictures of the pool, B of a batch, H and W pixels.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.tiny.emoji import SIZE, draw
from kolors_core.config import VAEConfig
from kolors_core.training.data import derive_seed
from kolors_core.training.run_record import digest
from kolors_core.training.trainer import Trainer, TrainingConfig
from kolors_core.vae import VAE, ResBlock

SCALES = ((1, 1.0), (4, 0.5), (16, 0.5))  # (how much smaller, weight of the error there)
KL_WEIGHT = 1e-4


@dataclass(frozen=True)
class Pixels:
    """images [B, 3, H, W] in [-1, 1], and standard normal noise [B, 4, H/8, W/8] for their latents."""

    images: Tensor
    noise: Tensor


class Reconstruction(nn.Module):
    """The autoencoder's loss as one module."""

    def __init__(self, vae: VAE) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, batch: Pixels) -> Tensor:
        """The mean loss of the batch."""
        found = self.vae.encode_images(batch.images)
        images = self.vae.decode_latents(found.sample(batch.noise)).float()
        mean, std = (t.float() / self.vae.config.scaling_factor for t in (found.mean, found.std))
        loss = KL_WEIGHT * 0.5 * (mean.square() + std.square() - 1 - 2 * std.log()).mean()
        for factor, weight in SCALES:
            error = F.avg_pool2d(images - batch.images, factor)
            loss = loss + weight * (error.abs().mean() + error.square().mean())
        return loss


class Pool:
    """Batches of emoji on grounds of any colour, half of them on white; mirrored at random.

    glyphs: [N, SIZE, SIZE, 4] bytes. Every second picture is one of the first `favourites`. Up to the step
    `whole_from` a picture is a crop of half its side: convolutions learn as much from it in a quarter of the
    time.
    """

    def __init__(self, glyphs: Tensor, favourites: int, whole_from: int, batch_size: int, seed: int) -> None:
        self.glyphs, self.favourites, self.whole_from = glyphs, favourites, whole_from
        self.batch_size, self.seed = batch_size, seed

    def batch(self, step: int, rows: slice, device: torch.device) -> Pixels:
        """The pictures `part` of the batch of a step."""
        draw, count = torch.Generator().manual_seed(derive_seed(self.seed, step)), self.batch_size
        chosen = torch.randint(len(self.glyphs), (count,), generator=draw)
        chosen[::2] = torch.randint(self.favourites, (len(chosen[::2]),), generator=draw)
        colours = torch.rand(count, 3, 1, 1, generator=draw)
        colours[torch.rand(count, generator=draw) < 0.5] = 1.0
        mirrored = torch.rand(count, 1, 1, 1, generator=draw) < 0.5
        corners = torch.randint(SIZE // 2 + 1, (count, 2), generator=draw)
        glyphs = self.glyphs[chosen].permute(0, 3, 1, 2) / 255.0  # [B, 4, SIZE, SIZE]
        images = glyphs[:, :3] * glyphs[:, 3:] + colours * (1 - glyphs[:, 3:])  # [B, 3, SIZE, SIZE]
        images = torch.where(mirrored, images.flip(-1), images)
        if step < self.whole_from:
            side = SIZE // 2
            images = torch.stack(
                [image[:, y : y + side, x : x + side] for image, (y, x) in zip(images, corners, strict=True)]
            )  # [B, 3, H, W]
        noise = torch.randn(count, 4, images.shape[2] // 8, images.shape[3] // 8, generator=draw)
        return Pixels((images[rows] * 2 - 1).to(device), noise[rows].to(device))

    def record(self) -> dict[str, object]:
        """What its batches depend on besides the step."""
        return {
            "glyphs": digest(self.glyphs),
            "data": [self.favourites, self.whole_from, self.batch_size, self.seed],
        }


def read_glyphs(characters: list[str]) -> Tensor:
    """Pictures of the emoji that the font has: [N, SIZE, SIZE, 4] bytes, red, green, blue, opacity."""
    pictures = []
    for character in characters:
        try:
            pictures.append(np.array(draw(character)))
        except ValueError:
            continue
    return torch.from_numpy(np.stack(pictures))


def new_vae(config: VAEConfig) -> VAE:
    """Random weights that train well from the start: residuals are zero, and the latents' noise is small."""
    vae = VAE(config)
    for module in vae.modules():
        if isinstance(module, ResBlock):
            nn.init.zeros_(module.conv2.weight)
            nn.init.zeros_(module.conv2.bias)  # type: ignore[arg-type]
    assert vae.quant_conv.bias is not None
    with torch.no_grad():
        vae.quant_conv.weight[config.latent_channels :] *= 0.1
        vae.quant_conv.bias[config.latent_channels :] = -8.0
    return vae


@torch.no_grad()
def standardise(vae: VAE, images: Tensor) -> None:
    """Give each latent channel mean 0 and variance 1 over `images` [B, 3, H, W]; decoding undoes it exactly.

    The change goes into the 1x1 convolutions at both sides of the latents.
    """
    means = torch.cat([vae.encode_images(image[None]).mean for image in images])  # [B, 4, H/8, W/8]
    shift, scale = means.mean((0, 2, 3)), means.std((0, 2, 3))  # [4]
    inner, outer = vae.quant_conv, vae.post_quant_conv
    assert inner.bias is not None and outer.bias is not None
    channels, factor = vae.config.latent_channels, vae.config.scaling_factor
    inner.weight[:channels] /= scale[:, None, None, None]
    inner.bias[:channels] = (inner.bias[:channels] - shift / factor) / scale
    inner.bias[channels:] -= 2 * scale.log()  # the log-variance
    outer.bias += outer.weight[:, :, 0, 0] @ (shift / factor)
    outer.weight *= scale[None, :, None, None]


def train(config: VAEConfig, characters: list[str], favourites: int, training: TrainingConfig, folder: Path,
          device: torch.device, whole_from: int) -> VAE:  # fmt: skip
    """Train a VAE, or take up the run in `folder`; the latents of the favourites come out standardised."""
    glyphs = read_glyphs(characters)
    torch.manual_seed(training.seed)  # of the first weights
    vae = new_vae(config).to(device)
    pool = Pool(glyphs, favourites, whole_from, training.batch_size, training.seed)

    def report(step: int, loss: float) -> None:
        if step % 100 == 0:
            print(f"autoencoder step {step}: loss {loss:.4f}", flush=True)

    Trainer(Reconstruction(vae), pool, training, folder, report).fit(progress=False)
    opaque = glyphs[:favourites].permute(0, 3, 1, 2) / 255.0
    images = (opaque[:, :3] * opaque[:, 3:] + 1 - opaque[:, 3:]) * 2 - 1
    vae.eval().requires_grad_(False)
    standardise(vae, images.to(device))
    return vae

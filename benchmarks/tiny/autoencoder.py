"""Training the embedded model's VAE: on crops of every emoji of the font, then on crops of scenes.

Loss: absolute and squared error of the picture and of two smaller ones, which carry the colours, absolute
error of the differences of neighbouring pixels, which are the edges, and a small KL term
(https://arxiv.org/abs/1312.6114) that keeps the latents near the unit Gaussian. In the last stage the latents
are disturbed before they are decoded, so that the small errors that a UNet leaves do not show.
Shapes: N pictures of the pool, B of a batch, H and W pixels.
"""

import random
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.tiny.emoji import SIZE, draw
from benchmarks.tiny.processes import report_every
from benchmarks.tiny.scenes import Scene, compose, pixels
from kolors_core.config import VAEConfig
from kolors_core.training.data import derive_seed
from kolors_core.training.run_record import digest
from kolors_core.training.trainer import BatchSource, Trainer, TrainingConfig
from kolors_core.vae import VAE, ResBlock

SCALES = ((1, 1.0), (4, 0.5), (16, 0.5))  # (how much smaller, weight of the error there)
KL_WEIGHT, EDGES_WEIGHT = 1e-4, 0.5
CROP = 64  # pixels of a side: as much is learnt from it as from a whole picture, in a quarter of the time
ASTRAY = 24  # pixels that the middle of a scene's crop may be off the middle of a thing
CROPS = 2  # of a scene


@dataclass(frozen=True)
class Pixels:
    """images [B, 3, H, W] in [-1, 1], standard normal noise [B, 4, H/8, W/8] for their latents, and another
    noise of the same shape, from 0 to 1 times standard normal, by which they may be disturbed.
    """

    images: Tensor
    noise: Tensor
    disturbance: Tensor


class Reconstruction(nn.Module):
    """The autoencoder's loss as one module. disturbed: the largest disturbance, in latents' deviations."""

    def __init__(self, vae: VAE, disturbed: float = 0.0) -> None:
        super().__init__()
        self.vae, self.disturbed = vae, disturbed

    def state_key(self) -> tuple[float]:
        """Return the disturbance, see kolors_core/module.py."""
        return (self.disturbed,)

    def forward(self, batch: Pixels) -> Tensor:
        """The mean loss of the batch."""
        found = self.vae.encode_images(batch.images)
        spread = found.mean.detach().float().std((0, 2, 3), keepdim=True)  # [1, 4, 1, 1]
        disturbance = (self.disturbed * spread * batch.disturbance).to(found.mean.dtype)
        images = self.vae.decode_latents(found.sample(batch.noise) + disturbance).float()
        mean, std = (t.float() / self.vae.config.scaling_factor for t in (found.mean, found.std))
        loss = KL_WEIGHT * 0.5 * (mean.square() + std.square() - 1 - 2 * std.log()).mean()
        for factor, weight in SCALES:
            error = F.avg_pool2d(images - batch.images, factor)
            loss = loss + weight * (error.abs().mean() + error.square().mean())
        error = images - batch.images
        edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
        return loss + EDGES_WEIGHT * edges


class EmojiCrops:
    """Crops of emoji on grounds of any colour, half of them on white; mirrored at random.

    glyphs: [N, SIZE, SIZE, 4] bytes. Every second picture is one of the first `favourites`.
    """

    def __init__(self, glyphs: Tensor, favourites: int, batch_size: int, seed: int) -> None:
        self.glyphs, self.favourites, self.batch_size, self.seed = glyphs, favourites, batch_size, seed

    def batch(self, step: int, rows: slice, device: torch.device) -> Pixels:
        """The `rows` of a step's pictures."""
        draw, count = torch.Generator().manual_seed(derive_seed(self.seed, step)), self.batch_size
        chosen = torch.randint(len(self.glyphs), (count,), generator=draw)
        chosen[::2] = torch.randint(self.favourites, (len(chosen[::2]),), generator=draw)
        colours = torch.rand(count, 3, 1, 1, generator=draw)
        colours[torch.rand(count, generator=draw) < 0.5] = 1.0
        mirrored = torch.rand(count, 1, 1, 1, generator=draw) < 0.5
        corners = torch.randint(SIZE - CROP + 1, (count, 2), generator=draw)
        glyphs = self.glyphs[chosen].permute(0, 3, 1, 2) / 255.0  # [B, 4, SIZE, SIZE]
        images = glyphs[:, :3] * glyphs[:, 3:] + colours * (1 - glyphs[:, 3:])  # [B, 3, SIZE, SIZE]
        images = torch.where(mirrored, images.flip(-1), images)
        images = torch.stack(
            [_crop(image, x, y) for image, (y, x) in zip(images, corners.tolist(), strict=True)]
        )
        noise, disturbance = _noises(count, draw)
        return Pixels((images[rows] * 2 - 1).to(device), noise[rows].to(device), disturbance[rows].to(device))

    def record(self) -> dict[str, object]:
        """What its batches depend on besides the step."""
        return {"glyphs": digest(self.glyphs), "data": [self.favourites, CROP, self.batch_size, self.seed]}


class SceneCrops:
    """Crops of scenes, each about one of its things."""

    def __init__(self, batch_size: int, seed: int) -> None:
        self.batch_size, self.seed = batch_size, seed

    def batch(self, step: int, rows: slice, device: torch.device) -> Pixels:
        """The `rows` of a step's pictures."""
        images = []
        draw_scene = cache(lambda number: _drawn(derive_seed(self.seed, step, number)))
        for i in range(*rows.indices(self.batch_size)):
            scene, image = draw_scene(i // CROPS)
            order = random.Random(derive_seed(self.seed, step, i // CROPS, i % CROPS))
            item = order.choice(scene.items)
            corner = (middle - CROP / 2 + order.uniform(-ASTRAY, ASTRAY) for middle in (item.x, item.y))
            x, y = (min(max(round(place), 0), SIZE - CROP) for place in corner)
            images.append(_crop(image, x, y))
        draw = torch.Generator().manual_seed(derive_seed(self.seed, step))
        noise, disturbance = _noises(self.batch_size, draw)
        return Pixels(torch.stack(images).to(device), noise[rows].to(device), disturbance[rows].to(device))

    def record(self) -> dict[str, object]:
        """What its batches depend on besides the step."""
        return {"scenes": [CROP, ASTRAY, CROPS, self.batch_size, self.seed]}


def _drawn(seed: int) -> tuple[Scene, Tensor]:
    scene = compose(seed)
    return scene, pixels(scene)


def _noises(count: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    noise, other = (torch.randn(count, 4, CROP // 8, CROP // 8, generator=draw) for _ in range(2))
    return noise, other * torch.rand(count, 1, 1, 1, generator=draw)


def _crop(image: Tensor, x: int, y: int) -> Tensor:
    return image[:, y : y + CROP, x : x + CROP]


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


def train(
    vae: VAE, data: BatchSource, training: TrainingConfig, folder: Path, disturbed: float = 0.0
) -> None:  # fmt: skip
    """Train a VAE in place, or take up the run in `folder`; it ends as its weights' moving average."""
    report = report_every(100, "autoencoder")
    trainer = Trainer(Reconstruction(vae, disturbed), data, training, folder, report)
    trainer.fit(progress=False)
    trainer.load_ema_weights()


@torch.no_grad()
def psnr(vae: VAE, images: Tensor) -> float:
    """The mean over images [B, 3, H, W] of the reconstructions' peak signal-to-noise ratios in dB."""
    found = torch.cat([vae.decode_latents(vae.encode_images(image[None]).mean) for image in images])
    errors = ((found.clamp(-1, 1) - images) / 2).square().mean((1, 2, 3))
    return float((-10 * errors.log10()).mean())

"""Training a small image encoder of CLIP's architecture: to tell what stands where in a scene.

CLIP learns from pairs of images and texts. This one learns what the embedded model's image prompts need: the
kinds of things, their places and the ground. Heads that read its states, as the IP-Adapter does, are trained
with it and thrown away. The last layer, which the IP-Adapter does not read, and the projection learn kinds.
Shapes: B images, S side in pixels, P patches (the grid of text.py), K kinds, C width.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.tiny.processes import is_first
from benchmarks.tiny.scenes import GROUNDS, KINDS, compose, render
from benchmarks.tiny.text import NOTHING_WEIGHT, SIDE, grid_of
from kolors_core.adapters.clip_vision import CLIPVision, CLIPVisionConfig, preprocess_clip
from kolors_core.training.data import derive_seed
from kolors_core.training.step import Step
from kolors_core.training.trainer import Trainer, TrainingConfig

ENCODER = CLIPVisionConfig(
    image_size=128, patch_size=16, hidden_size=96, feed_forward_size=192, layers=4, heads=3, projection_dim=64
)
TRAINING = TrainingConfig(
    steps=4000, batch_size=48, learning_rate=2e-3, schedule="cosine", warmup=200, weight_decay=0.02,
    dtype=torch.bfloat16, save_every=200,
)  # fmt: skip
APART, USES = 50, 4  # steps between two uses of a scene, and how many there are
TESTED = 256  # scenes of combinations that are not trained on


@dataclass(frozen=True)
class SceneImages:
    """Scenes for the encoder and what is on them.

    pixels: as CLIP reads them, [B, 3, S, S]. grid: the kind at each place [B, P], K for none. grounds: [B].
    """

    pixels: Tensor
    grid: Tensor
    grounds: Tensor


def scene_images(seeds: list[int], side: int, is_trained: bool = True) -> SceneImages:
    """Scenes of these seeds as images of `side` pixels, with what is to be read of them."""
    scenes = [compose(seed, is_trained) for seed in seeds]
    pixels = preprocess_clip([render(scene) for scene in scenes], side)
    grids, grounds = map(grid_of, scenes), [GROUNDS.index(scene.ground) for scene in scenes]
    return SceneImages(pixels, torch.stack(list(grids)), torch.tensor(grounds))


class SceneImageSource:
    """Batches of scenes, half of them mirrored: a function of seed and step.

    To draw a scene costs more than a step on it, so each is used again every `APART` steps, `USES` times.
    """

    def __init__(self, config: TrainingConfig, side: int) -> None:
        self.config, self.side = config, side
        self._made: dict[tuple[int, int], tuple[int, SceneImages]] = {}

    def batch(self, step: int, rows: slice, device: torch.device) -> SceneImages:
        """The `rows` of a step's scenes."""
        own = range(*rows.indices(self.config.batch_size))
        made = [vars(self._scene(step, row)).values() for row in own]
        pixels, grids, grounds = (torch.cat(parts) for parts in zip(*made, strict=True))
        draw = torch.Generator().manual_seed(derive_seed(self.config.seed, step))
        is_mirrored = torch.rand(self.config.batch_size, generator=draw)[rows] < 0.5
        grids = grids.unflatten(1, (SIDE, SIDE))
        pixels = torch.where(is_mirrored[:, None, None, None], pixels.flip(-1), pixels)
        grids = torch.where(is_mirrored[:, None, None], grids.flip(-1), grids).flatten(1)  # [B, P]
        return SceneImages(pixels.to(device), grids.to(device), grounds.to(device))

    def _scene(self, step: int, row: int) -> SceneImages:
        """One scene: drawn, unless the last that was drawn in its place is the same."""
        generation, place = (step // APART + row) // USES, (step % APART, row)
        seed = derive_seed(self.config.seed, 7, generation, *place)
        if self._made.get(place, (None,))[0] != seed:
            self._made[place] = seed, scene_images([seed], self.side)
        return self._made[place][1]

    def record(self) -> dict[str, object]:
        """What its batches depend on besides the step and the settings."""
        return {"kinds": list(KINDS), "grounds": list(GROUNDS), "data": [self.side, APART, USES]}


class ImageReading(nn.Module):
    """Cross-entropies of the kinds on the patches, and of the ground; and of the kinds in the projection."""

    def __init__(self, encoder: CLIPVision) -> None:
        super().__init__()
        self.encoder, width = encoder, encoder.config.hidden_size
        self.norm = nn.LayerNorm(width)
        self.to_kind = nn.Linear(width, len(KINDS) + 1)
        self.to_ground = nn.Linear(width, len(GROUNDS))
        self.to_kinds = nn.Linear(encoder.config.projection_dim, len(KINDS))

    def read(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits of the grid [B, P, K + 1] and grounds [B, G] from the states that an IP-Adapter reads, and
        of the kinds [B, K] from the projection.
        """
        found = self.encoder(pixels, output_hidden_states=True)
        assert found.hidden_states is not None
        states = self.norm(found.hidden_states[-2])  # [B, 1 + P, C]
        return self.to_kind(states[:, 1:]), self.to_ground(states[:, 0]), self.to_kinds(found.image_embeds)

    def forward(self, batch: SceneImages) -> Tensor:
        """The mean loss of the batch."""
        grid, grounds, kinds = (logits.float() for logits in self.read(batch.pixels))
        weights = grid.new_ones(len(KINDS) + 1)
        weights[-1] = NOTHING_WEIGHT
        losses = [
            F.cross_entropy(grid.flatten(0, 1), batch.grid.flatten(), weights),
            0.3 * F.cross_entropy(grounds, batch.grounds),
            10 * F.binary_cross_entropy_with_logits(kinds, kinds_of(batch.grid).float()),
        ]
        return torch.stack(losses).sum()

    @torch.no_grad()
    def kinds(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Whether each kind is on the image [B, K]: read at two patches or more; and the ground [B]."""
        grid, grounds, _ = self.read(pixels)
        counts = F.one_hot(grid.argmax(-1), len(KINDS) + 1).sum(1)[:, :-1]  # [B, K]
        return counts > 1, grounds.argmax(-1)


def kinds_of(grid: Tensor) -> Tensor:
    """Whether each kind is somewhere on the grid: [B, P] to [B, K]."""
    return F.one_hot(grid, len(KINDS) + 1).amax(1)[:, :-1] > 0


@torch.no_grad()
def accuracy(reading: ImageReading, batch: SceneImages) -> dict[str, float]:
    """Shares of occupied places whose kind is read, kinds found, kinds found that are there, and grounds."""
    grid, _, _ = reading.read(batch.pixels)
    found, grounds = reading.kinds(batch.pixels)
    wanted, is_occupied = kinds_of(batch.grid), batch.grid < len(KINDS)
    return {
        "kind of a place": float((grid.argmax(-1) == batch.grid)[is_occupied].float().mean()),
        "kinds found": float((found & wanted).sum() / wanted.sum()),
        "found that are there": float((found & wanted).sum() / found.sum().clamp(min=1)),
        "ground": float((grounds == batch.grounds).float().mean()),
    }


def train(
    config: CLIPVisionConfig, training: TrainingConfig, folder: Path, device: torch.device
) -> ImageReading:
    """Train an encoder with its heads, or take up the run in `folder`."""
    if config.image_size != SIDE * config.patch_size:
        raise ValueError(f"expected {SIDE} patches a side, got {config.image_size / config.patch_size}")
    torch.manual_seed(training.seed)  # of the first weights
    reading = ImageReading(new_encoder(config)).to(device)
    unseen = scene_images(list(range(TESTED)), config.image_size, is_trained=False)
    unseen = SceneImages(*(tensor.to(device) for tensor in vars(unseen).values()))

    def report(step: Step) -> None:
        if step.step % 200 == 199 and is_first():
            shares = ", ".join(f"{name} {share:.1%}" for name, share in accuracy(reading, unseen).items())
            print(f"image encoder step {step.step + 1}: loss {step.loss:.4f}; {shares}", flush=True)

    Trainer(reading, SceneImageSource(training, config.image_size), training, folder, report).fit(
        progress=False
    )
    return reading.eval().requires_grad_(False)


def new_encoder(config: CLIPVisionConfig) -> CLIPVision:
    """Random weights; the residuals start small, as CLIP's do."""
    encoder = CLIPVision(config)
    for name, parameter in encoder.named_parameters():
        if name.endswith(("to_out.weight", "proj_out.weight")):
            nn.init.normal_(parameter, std=config.hidden_size**-0.5 * (2 * config.layers) ** -0.5)
        elif "positions" in name or "class_token" in name:
            nn.init.normal_(parameter, std=0.02)
    return encoder

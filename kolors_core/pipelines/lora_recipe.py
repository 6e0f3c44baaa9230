"""Recipe of a LoRA: a folder of images and a word in, a file out, with what it changed, seen and measured.

The word names the subject of the images. Beside them the model trains on images of other things that it draws
itself before, so that it keeps them (DreamBooth's prior preservation, https://arxiv.org/abs/2208.12242,
section 3.2). The settings are measured on the embedded model: benchmarks/tiny/lora.py.
Shapes: B images, N known ones, H and W pixels.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kolors_core.adapters.lora import LoRAAdapter, attach, check_name, save_adapters
from kolors_core.attention import attention_kernel, forced_kernel
from kolors_core.devices import unwrap_compiled
from kolors_core.image import pil_to_tensor, png_bytes
from kolors_core.inspection.before_after import Pair, render_pairs
from kolors_core.pipelines.png_metadata import save_png
from kolors_core.pipelines.stages import Task
from kolors_core.pipelines.text_to_image import KolorsPipeline
from kolors_core.schedulers import DPMSolverMultistepScheduler
from kolors_core.targets import TARGETS
from kolors_core.training.data import Batches, Example, LatentDataset, buckets, load_pixels, read_folder
from kolors_core.training.loss import DiffusionLoss
from kolors_core.training.run_record import Losses, digest_model
from kolors_core.training.trainer import Trainer, TrainingConfig
from kolors_core.validation import as_new_path, as_path, check_float, check_int, short_repr
from weights_convert.atomic_write import write_bytes

if TYPE_CHECKING:
    from PIL.Image import Image

FEWEST_IMAGES, LONGEST_WORD = 3, 40
SMALLEST = 0.5  # of the model's own size: smaller images would teach it to blur
PIXELS_AT_ONCE = 512**2  # drawn in one batch
MEASURED_SEED, OTHERS_SEED = 7, 100  # added to the run's seed, and to an image's number


@dataclass(frozen=True, kw_only=True)
class LoRARecipe:
    """Settings of `train_lora`; the defaults are those measured on the embedded model.

    phrases: captions, for images that have none, with {x} for the word; of `others`, the things whose images
    the model draws before, each gets one. unseen: English phrases, then as many Chinese, in which the word
    and `kept`, things not trained on here, are drawn before and after, to see and measure what changed.
    """

    training: TrainingConfig = field(
        default_factory=lambda: TrainingConfig(
            steps=400, batch_size=16, learning_rate=2e-3, schedule="cosine", warmup=20, weight_decay=0.0,
            min_snr_gamma=1.0, dtype=torch.bfloat16, save_every=100,
        )
    )  # fmt: skip
    rank: int = 16
    phrases: tuple[str, ...] = (
        "a photo of a {x}", "a {x}", "{x}", "一张{x}的照片", "画一个{x}", "the {x}", "show me a {x}",
    )  # fmt: skip
    others: tuple[str, ...] = (
        "cat", "ladybug", "rocket", "apple", "car", "panda", "sunflower", "pizza", "guitar", "house", "fox",
        "owl", "penguin", "turtle", "shark", "elephant", "cactus", "mushroom", "cake", "hamburger", "key",
        "ship", "drum", "camera", "猫", "瓢虫", "火箭", "公交车", "熊猫", "蝴蝶", "西瓜", "鲸鱼", "恐龙",
        "月亮", "马", "猪", "孔雀", "蜗牛", "螃蟹", "葡萄", "草莓", "面包", "咖啡", "直升机", "城堡", "足球",
        "礼物", "灯泡",
    )  # fmt: skip
    unseen: tuple[str, ...] = (
        "please draw a {x} for me", "I would like to see a {x}", "请给我画{x}", "我想看{x}的图片",
    )  # fmt: skip
    kept: tuple[str, ...] = (
        "dog", "tiger", "banana", "chair", "rabbit", "bee", "狮子", "柠檬", "青蛙", "自行车", "雪人", "钻石",
    )  # fmt: skip
    inference_steps: int = 25
    guidance_scale: float = 5.0

    def __post_init__(self) -> None:
        for name in ("phrases", "others", "unseen", "kept"):
            if isinstance(texts := getattr(self, name), str) or not texts:
                raise ValueError(f"{name} must be a tuple of texts, got {short_repr(texts)}")
        for phrase in (*self.phrases, *self.unseen):
            if "{x}" not in phrase:
                raise ValueError(f"a phrase must have {{x}} for the word, got {short_repr(phrase)}")
        for name in ("rank", "inference_steps"):
            check_int(name, getattr(self, name))
        check_float("guidance_scale", self.guidance_scale, 0)

    def measured_prompts(self, word: str) -> tuple[list[str], list[str]]:
        """Return the prompts with the word, and those of kept things, in the language of each."""
        half = len(self.unseen) // 2
        english, chinese = self.unseen[:half] or self.unseen, self.unseen[half:]
        phrases = (english if name.isascii() else chinese for name in self.kept)
        others = [group[i % len(group)].format(x=name)
                  for i, (group, name) in enumerate(zip(phrases, self.kept, strict=True))]  # fmt: skip
        return [phrase.format(x=word) for phrase in self.unseen], others


@dataclass(frozen=True)
class LoRAEffect:
    """Effect of a LoRA on images drawn before and after with the same noise.

    An image shows the subject if of all known images, by the mean square of all pixels, one of the subject is
    nearest, and is kept if that is its own of before. moved: mean difference of an image's pixels, in gray
    levels of 255.
    """

    with_word: int  # images
    shows_before: int
    shows_after: int
    others: int  # images
    others_showing: int
    others_kept: int
    moved_with_word: float
    moved_others: tuple[float, ...]

    def __str__(self) -> str:
        others, mean = self.others, sum(self.moved_others) / len(self.moved_others)
        return (
            f"in {self.shows_after} of {self.with_word} images with its word ({self.shows_before} before), "
            f"in {self.others_showing} of {others} without it; {self.others_kept} of these {others} stayed "
            f"what they were and moved by {mean:.1f} gray levels (at most {max(self.moved_others):.1f}), "
            f"those with the word by {self.moved_with_word:.1f}"
        )


@dataclass(frozen=True)
class LoRAResult:
    """Trained LoRA: its file, the losses of all steps, its effect, and a sheet of before and after."""

    word: str
    file: Path
    losses: Losses
    effect: LoRAEffect
    sheet: "Image"

    def __str__(self) -> str:
        return f"{self.word}: {self.effect}"

    def _repr_png_(self) -> bytes:  # in notebooks
        return png_bytes(self.sheet)


def train_lora(
    pipe: Task, images: str | Path, word: str, file: str | Path, recipe: LoRARecipe | None = None, *,
    resume: str = "same", overwrite: bool = False, progress: bool = True,
) -> LoRAResult:  # fmt: skip
    """Train a LoRA of the subject of a folder's images, named by a word; write it to `file`.

    The pipeline stays as it was. images: at least three; captions, if there are any, have the word. The run
    is kept in a folder beside `file`, `zorp.run` of `zorp.safetensors`; called again, it goes on from there,
    and a finished one writes the same file. resume: see `Trainer`. Raises ValueError, or OSError, for too few
    or too small images, captions without the word, another run's folder, or a file of no run that exists.
    """
    recipe, file = recipe or LoRARecipe(), as_path("file", file)
    folder = file.with_suffix(".run")
    as_new_path("file", file, overwrite or (folder / "state.safetensors").exists())
    _check(pipe)
    examples = subject_examples(images, word, recipe, SMALLEST * _side(pipe))
    prompts, others = recipe.measured_prompts(word)
    known = _draw_others(pipe, recipe, folder / "others", resume == "never", progress)
    with _attached(pipe, recipe) as adapter:
        losses = _train(pipe, examples, known, recipe, folder, resume, progress)
        file.parent.mkdir(parents=True, exist_ok=True)
        save_adapters({"unet": adapter}, file, overwrite=True)
        after = _draw(pipe, prompts + others, recipe, MEASURED_SEED, "after", progress)
    before = _draw(pipe, prompts + others, recipe, MEASURED_SEED, "before", progress)  # it is as it was
    effect = measure(before, after, len(prompts), _pixels(examples, pipe), _pixels(known, pipe))
    labels = [word] * len(prompts) + list(recipe.kept)
    pairs = [Pair(*pair) for pair in zip(labels, before, after, strict=True)]
    return LoRAResult(word, file, losses, effect, render_pairs(f"{word}: {effect}", pairs))


def subject_examples(
    images: str | Path, word: str, recipe: LoRARecipe, smallest: float = 0
) -> list[Example]:  # fmt: skip
    """List the images of the subject; those without captions get the recipe's phrases.

    Raises ValueError for an unusable word, fewer than three images, one of fewer than `smallest` pixels a
    side, or a caption without the word.
    """
    if not isinstance(word, str) or not 0 < len(word) <= LONGEST_WORD or not word.isprintable():
        raise ValueError(f"word must be a text of 1 to {LONGEST_WORD} characters, got {short_repr(word)}")
    captions = [phrase.format(x=word) for phrase in recipe.phrases]
    examples = read_folder(images, default_captions=captions)
    if len(examples) < FEWEST_IMAGES:
        raise ValueError(f"{images}: expected at least {FEWEST_IMAGES} images, got {len(examples)}")
    for example in examples:
        if min(example.height, example.width) < smallest:
            size = f"{example.width}x{example.height}"
            raise ValueError(f"{example.file}: is {size}, expected at least {smallest:.0f} pixels a side")
        if without := [caption for caption in example.captions if word not in caption]:
            raise ValueError(f"{example.file}: its caption {short_repr(without[0])} lacks the word {word!r}")
    return examples


def measure(
    before: Sequence["Image"], after: Sequence["Image"], with_word: int, subject: Tensor, others: Tensor
) -> LoRAEffect:
    """Measure the effect on images of which the first `with_word` have the word; both others [N, 3, H, W]."""
    old, new = (torch.stack([_levels(image) for image in images]) for images in (before, after))
    known, count = torch.cat([subject, old[with_word:], others]), len(subject)
    shows_before, shows_after = ([i < count for i in nearest(images, known)] for images in (old, new))
    found = nearest(new[with_word:], known)
    moved = ((new - old).abs().mean((1, 2, 3)) * 127.5).tolist()
    return LoRAEffect(
        with_word=with_word, shows_before=sum(shows_before[:with_word]),
        shows_after=sum(shows_after[:with_word]), others=len(found),
        others_showing=sum(shows_after[with_word:]),
        others_kept=sum(place == count + i for i, place in enumerate(found)),
        moved_with_word=sum(moved[:with_word]) / with_word, moved_others=tuple(moved[with_word:]),
    )  # fmt: skip


def nearest(images: Tensor, known: Tensor) -> list[int]:
    """Find for each of images [B, 3, H, W] the index of the nearest of known [N, 3, H, W], by all pixels."""
    return torch.cdist(images.flatten(1).double(), known.flatten(1).double()).argmin(1).tolist()


def _check(pipe: Task) -> None:
    if pipe.text_encoder is None or pipe.tokenizer is None:
        raise ValueError("this pipeline has no text encoder or tokenizer, which training needs")
    if (reason := pipe._needs_alone()) is not None:
        raise ValueError(f"this pipeline uses {reason}, which training cannot")
    check_name(unwrap_compiled(pipe.unet), "default")


def _side(pipe: Task) -> int:
    return pipe.unet.config.sample_size * pipe.vae.config.vae_scale_factor


def _levels(image: "Image") -> Tensor:
    return pil_to_tensor(image) / 127.5 - 1  # [3, H, W]


def _pixels(examples: Sequence[Example], pipe: Task) -> Tensor:
    size = (_side(pipe), _side(pipe))
    return torch.stack([load_pixels(example, size)[0] for example in examples])  # [N, 3, H, W]


def _draw(
    pipe: Task, prompts: Sequence[str], recipe: LoRARecipe, seed: int, title: str, progress: bool
) -> list["Image"]:
    """Draw an image of each prompt, at the model's own size; image i has the seed plus i."""
    drawer = KolorsPipeline.from_pipe(pipe, controlnet=None)
    solver = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, use_karras_sigmas=True)
    if solver.target == pipe.scheduler.target:  # else it is of other models
        drawer.scheduler = solver
    drawer.set_progress_bar_config(
        **pipe._progress | {"desc": title} | ({} if progress else {"disable": True})
    )
    at_once, images = max(1, PIXELS_AT_ONCE // _side(pipe) ** 2), list[Any]()
    seeds = [recipe.training.seed + seed + i for i in range(len(prompts))]
    for start in range(0, len(prompts), at_once):
        rows = slice(start, start + at_once)
        images += drawer(
            list(prompts[rows]), num_inference_steps=recipe.inference_steps,
            guidance_scale=recipe.guidance_scale,
            generator=[torch.Generator().manual_seed(own) for own in seeds[rows]],
        )[0]  # fmt: skip
    return images


def _draw_others(pipe: Task, recipe: LoRARecipe, folder: Path, anew: bool, progress: bool) -> list[Example]:
    """Draw the things to keep, or take what an interrupted run of this model and recipe has drawn."""
    prompts = [recipe.phrases[i % len(recipe.phrases)].format(x=name) for i, name in enumerate(recipe.others)]
    made = {"model": digest_model(unwrap_compiled(pipe.unet)), "steps": recipe.inference_steps,
            "guidance_scale": recipe.guidance_scale, "seed": recipe.training.seed}  # fmt: skip
    rows = [
        {"file_name": f"{i:03}.png", "text": [phrase.format(x=name) for phrase in recipe.phrases], **made}
        for i, name in enumerate(recipe.others)
    ]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    metadata = folder / "metadata.jsonl"
    if anew or not metadata.exists() or metadata.read_bytes() != lines:
        images = _draw(pipe, prompts, recipe, OTHERS_SEED, "other things", progress)
        for row, image in zip(rows, images, strict=True):
            save_png(image, folder / str(row["file_name"]))
        write_bytes(lines, metadata)
    return read_folder(folder)


@contextmanager
def _attached(pipe: Task, recipe: LoRARecipe) -> Iterator[LoRAAdapter]:
    """Attach a new LoRA to the frozen UNet; at the end the UNet is as it was."""
    unet: nn.Module = unwrap_compiled(pipe.unet)
    trained = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    unet.requires_grad_(False)
    generator = torch.Generator().manual_seed(recipe.training.seed)
    adapter = attach(unet, recipe.rank, generator=generator)
    try:
        yield adapter
    finally:
        adapter.detach()
        for parameter in trained:
            parameter.requires_grad_(True)


def _training_of(pipe: Task, recipe: LoRARecipe) -> TrainingConfig:
    """Return the recipe's training of what the model predicts; ValueError if the recipe says otherwise."""
    own = next((name for name, target in TARGETS.items() if target == pipe.scheduler.target), None)
    if own is None:
        raise ValueError(f"{type(pipe.scheduler).__name__} is of models that cannot be trained here")
    if (asked := recipe.training.prediction_type) not in ("epsilon", own):
        raise ValueError(f"prediction_type must be the model's own, {own!r}, got {asked!r}")
    return replace(recipe.training, prediction_type=own)


def _train(
    pipe: Task, subject: Sequence[Example], others: Sequence[Example], recipe: LoRARecipe, folder: Path,
    resume: str, progress: bool,
) -> Losses:  # fmt: skip
    """Train the UNet's adapter on as many images of the subject, repeated, as of other things."""
    config, side, sigmas = _training_of(pipe, recipe), _side(pipe), pipe.scheduler.training_sigmas()
    assert pipe.tokenizer is not None
    examples = [*list(subject) * max(1, round(len(others) / len(subject))), *others]
    batches = Batches(examples, buckets(side, step=max(8, side // 4)), config.batch_size, config.seed, 0.0)
    data = LatentDataset(
        examples, batches, pipe.vae, pipe.tokenizer, config, frozen_text=unwrap_compiled(pipe.text_encoder),
        timesteps=len(sigmas),
    )  # fmt: skip
    loss = DiffusionLoss(unwrap_compiled(pipe.unet), None, sigmas, config)
    trainer = Trainer(loss, data, config, folder, resume=resume)
    kernel = "matmul" if pipe.device.type == "cpu" else "sdpa"
    with attention_kernel(forced_kernel() or kernel):
        trainer.fit(progress)
    return trainer.losses

"""Studio of the page: drawing, comparing and looking inside with one pipeline, each as the work of a job."""

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import accumulate
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from kolors_core.adapters.canny import canny
from kolors_core.adapters.textual_inversion import words_of
from kolors_core.checkpoint import EMBEDDED_NAME
from kolors_core.cli import generate
from kolors_core.cli import options as cli
from kolors_core.cli.samplers import choose_scheduler, default_steps
from kolors_core.config import VERSION
from kolors_core.devices import named_device, unwrap_compiled
from kolors_core.image import load_image, png_bytes
from kolors_core.inspection.attention_report import PARTS, colorize, data_uri, normalize
from kolors_core.inspection.features import capture
from kolors_core.inspection.token_attention import explain_prompt
from kolors_core.module import is_block
from kolors_core.pipelines.png_metadata import as_json, attach_metadata
from kolors_core.pipelines.stages import Task
from kolors_core.pipelines.text_to_image import KolorsPipeline
from kolors_core.ui import sheet
from kolors_core.ui.gallery import Gallery
from kolors_core.ui.jobs import Job
from kolors_core.ui.preview import Preview
from kolors_core.ui.requests import MODEL, Request, options_of

if TYPE_CHECKING:
    from PIL.Image import Image

# Fields of a request that a map of tokens takes.
EXPLAINED = {"prompt", "negative", "height", "width", "seed", "steps", "sampler", "schedule", "guidance"}
STRONGEST = 15  # channels of a layer that are shown beside the three main directions


# Options of the model, with which the page was started.
STARTED = (
    *MODEL, "variant", "revision", "local_files_only", "device", "dtype", "report", "offload", "vae_tiling",
)  # fmt: skip


class Part(NamedTuple):
    """Part of a job, and where it starts and ends in the whole."""

    name: str
    start: float
    end: float


WHOLE = Part("", 0.0, 1.0)


class Studio:
    """One pipeline, loaded once, and the folder of its images. One job at a time uses it."""

    def __init__(self, options: argparse.Namespace, gallery: Gallery) -> None:
        """options: of `ui`, among them those of the model. Raises as `load_pipeline` does."""
        self.model, self.gallery = argparse.Namespace(**{n: getattr(options, n) for n in STARTED}), gallery
        self.pipe: Task = cli.load_pipeline(options, named_device(options.device))
        self.pipe.set_progress_bar_config(disable=True)
        self.preview = Preview(self.pipe)

    def about(self) -> dict[str, Any]:
        """Tell the page what it can ask for."""
        is_embedded = self.model.weights == EMBEDDED_NAME
        side = self.pipe.unet.config.sample_size * self.pipe.vae.config.vae_scale_factor
        return {
            "version": VERSION, "model": self.model.weights, "device": str(self.pipe.device), "size": side,
            "samplers": cli.parsers.SAMPLERS, "schedules": cli.parsers.SCHEDULES, "axes": sheet.AXES,
            "adapters": [EMBEDDED_NAME] if is_embedded else [], "layers": self.layers(),
            "controls": [EMBEDDED_NAME] if is_embedded else list(generate.CONTROLNETS),
            "prompt": "a red apple" if is_embedded
            else "一张瓢虫的照片，微距，变焦，高质量，电影，拿着一个木牌，写着“可图”",
        }  # fmt: skip

    def layers(self) -> list[str]:
        """List the UNet's layers whose features can be seen: its blocks and what they are made of."""
        model = unwrap_compiled(self.pipe.unet)
        return [name for name, module in model.named_modules() if name and is_block(module)]

    def check(self, request: Request) -> None:
        """Raise ValueError, as the command line words it, for a request that is refused before it waits."""
        options_of(request, self.model, self.gallery.find)

    def draw(self, request: Request, job: Job) -> dict[str, Any]:
        """Draw images; return their names."""
        options, call = self._prepared(request)
        with self._adapters_removed(job):
            return {"images": self.gallery.save(self._draw(options, call, job))}

    def compare(self, request: Request, axes: list[sheet.Axis], job: Job) -> dict[str, Any]:
        """Draw a sheet of all settings of the axes; return its name."""
        asked = sheet.cells(request, axes)
        ready = [self._prepared(cell) for cell in asked]  # all are checked before the first is drawn
        steps = [self._steps(options) for options, _ in ready]
        ends = [end / sum(steps) for end in accumulate(steps, initial=0)]
        images = []
        for i, (options, call) in enumerate(ready):
            with self._adapters_removed(job):
                part = Part(f"image {i + 1} of {len(ready)}", ends[i], ends[i + 1])
                images += self._draw(options, call, job, part)[:1]
        facts = dict(request) | {"axes": [{"name": name, "values": values} for name, values in axes]}
        title = str(request.get("prompt", ""))
        image = sheet.render(images, axes, title)
        software = f"kolors_core {VERSION}"
        told = {"prompt": title, "sheet": as_json(facts), "model": self.model.weights, "software": software}
        attach_metadata(image, told)
        return {"images": self.gallery.save([image]), "cells": asked}

    def explain(self, request: Request, job: Job) -> dict[str, Any]:
        """Draw an image and where each token of its prompt acted; return it and the maps, as addresses."""
        options, _ = self._prepared(request)
        if strangers := sorted(request.keys() - EXPLAINED):
            raise ValueError(f"{strangers[0]} has no effect on a map of tokens: leave it out")
        pipe = self._task(KolorsPipeline, options)
        generator = torch.Generator().manual_seed(cli.select_seed(options))
        found = explain_prompt(
            pipe, options.prompt, self._steps(options), words_of(unwrap_compiled(pipe.text_encoder)),
            negative_prompt=options.negative, height=options.height, width=options.width,
            guidance_scale=options.guidance, generator=generator,
            callback_on_step_end=self._watch(job),
        )  # fmt: skip
        views = {
            f"{part}|{span}": {
                "maps": [data_uri(colorize(one)) for one in normalize(maps)],
                "shares": [round(share, 4) for share in maps.mean((1, 2)).tolist()],
            }
            for (part, span), maps in found.views.items()
        }
        return {
            "image": self.gallery.save([found.image])[0], "views": views, "parts": PARTS,
            "tokens": [{"label": token.label, "pieces": token.pieces} for token in found.tokens],
        }  # fmt: skip

    def features(self, request: Request, layer: str, step: int, job: Job) -> dict[str, Any]:
        """Draw an image and what a layer computes in a step: its main directions as colors, its channels."""
        options, call = self._prepared(request)
        if layer not in self.layers():
            raise ValueError(f"no layer is named {layer[:100]!r}")
        steps = self._steps(options)
        if not 1 <= step <= steps:
            raise ValueError(f"the step must be from 1 to {steps}, got {step}")
        with (
            self._adapters_removed(job),
            capture(self.pipe.unet, layer, steps=[step - 1], keep=on_cpu) as found,
        ):
            images = self._draw(options, call, job)
        x = found[layer][0][-1]  # the prompt's row, the last, of the output or of the first of several
        maps = as_map(x, images[0].height / images[0].width)  # [C, h, w]
        order = maps.flatten(1).var(1).argsort(descending=True)[:STRONGEST]
        channels = [{"number": int(i), "map": data_uri(colorize(normalize(maps[i])))} for i in order]
        size = f"{maps.shape[0]} channels of {maps.shape[2]} by {maps.shape[1]}"
        image, main = self.gallery.save(images)[0], data_uri(main_colors(maps))
        return {"layer": layer, "image": image, "main": main, "size": size, "channels": channels}

    def edges(self, name: str, low: float, high: float) -> dict[str, Any]:
        """Return the edges of an image, as a ControlNet sees them, kept as an image of the page."""
        return self.gallery.bring(png_bytes(canny(load_image(str(self.gallery.find(name))), low, high)))

    def _prepared(self, request: Request) -> tuple[argparse.Namespace, generate.Call]:
        options = options_of(request, self.model, self.gallery.find)
        options.out = self.gallery.new()
        return options, generate.prepare(options)

    def _task(self, kind: type[Task], options: argparse.Namespace) -> Any:
        pipe = kind.from_pipe(self.pipe)
        pipe.scheduler = choose_scheduler(self.pipe.scheduler, options.sampler, options.schedule)
        return pipe

    def _draw(
        self, options: argparse.Namespace, call: generate.Call, job: Job, part: Part = WHOLE
    ) -> list["Image"]:
        pipe = self._task(generate.task_of(options), options)
        watched = call.arguments | {"callback_on_step_end": self._watch(job, part)}
        return generate.draw(pipe, options, call._replace(arguments=watched))

    def _watch(self, job: Job, part: Part = WHOLE) -> Callable[..., dict[str, Any]]:
        """Return a callback that reports each step with its preview."""

        def watch(pipe: Any, i: int, _timestep: Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
            done = part.start + (part.end - part.start) * (i + 1) / pipe.num_timesteps
            preview = self.preview.address(tensors["latents"])
            job.report(i + 1, pipe.num_timesteps, part.name, preview, done)
            return tensors

        return watch

    def _steps(self, options: argparse.Namespace) -> int:
        return default_steps(options.sampler) if options.steps is None else options.steps

    @contextmanager
    def _adapters_removed(self, job: Job) -> Iterator[None]:
        """Remove what a job attaches to the models, however it ends."""

        def remove() -> None:
            self.pipe.disable_freeu()
            self.pipe.unload_lora_weights()
            self.pipe.unload_ip_adapter()
            self.pipe.unload_textual_inversion()

        try:
            yield
        finally:
            job.finish(remove)


def on_cpu(x: Tensor) -> Tensor:
    """Copy features to the CPU."""
    return x.detach().float().cpu()


def as_map(x: Any, ratio: float) -> Tensor:
    """Return features of a row, a map [C, h, w] or tokens [h w, C] with h / w = ratio, as a map [C, h, w]."""
    x = x[0] if isinstance(x, list | tuple) else x
    if x.ndim == 3:
        return x
    height = max(1, round((len(x) * ratio) ** 0.5))
    if len(x) % height:
        raise ValueError(f"{len(x)} tokens are no map of an image")
    return x.T.unflatten(1, (height, -1))


def main_colors(maps: Tensor) -> "Image":
    """Color the three main directions of features [C, h, w] red, green and blue, from least to most."""
    from PIL import Image

    rows = maps.flatten(1).T  # [h w, C]
    rows = rows - rows.mean(0)
    directions = torch.linalg.svd(rows, full_matrices=False).Vh[:3]
    levels = normalize((rows @ directions.T).T.unflatten(1, maps.shape[1:]))
    return Image.fromarray((levels * 255).round().to(torch.uint8).movedim(0, -1).numpy())

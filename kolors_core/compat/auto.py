"""Loaders that choose the pipeline's class: by its checkpoint, or by a task.

Source: diffusers' pipelines/auto_pipeline.py, and `DiffusionPipeline` of its pipelines/pipeline_utils.py.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from kolors_core import checkpoint
from kolors_core.compat import pipelines
from kolors_core.compat.pipeline_files import load_index
from kolors_core.compat.pipeline_methods import ReferenceMethods
from kolors_core.pipelines.base import Components
from kolors_core.pipelines.request import KolorsPipelineOutput
from kolors_core.validation import short_repr


class DiffusionPipeline(ABC):
    """Loader by the `_class_name` in `model_index.json`; every pipeline here is an instance of it too."""

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path = checkpoint.EMBEDDED_NAME, **options: Any
    ) -> Any:
        """Load the pipeline that was saved; options: as for its class. ValueError for one not of Kolors."""
        name, tasks = class_name(pretrained_model_name_or_path, options), AutoPipeline.__subclasses__()
        classes = {kind.__name__: kind for task in tasks for kind in task.classes.values()}
        if name not in classes:
            known = ", ".join(sorted(classes))
            raise ValueError(f"{pretrained_model_name_or_path}: is a {short_repr(name)}, expected of {known}")
        return classes[name].from_pretrained(pretrained_model_name_or_path, **options)

    @classmethod
    def load_config(cls, pretrained_model_name_or_path: str | Path, **hub: Any) -> dict[str, Any]:
        """Read `model_index.json`, of a hub repository fetching nothing else; hub: as for `hub.fetch`."""
        return load_index(pretrained_model_name_or_path, **hub)

    @abstractmethod
    def __call__(self, *arguments: Any, **named: Any) -> KolorsPipelineOutput:
        """Make images."""


DiffusionPipeline.register(ReferenceMethods)


class AutoPipeline:
    """Loader for a task. classes: its pipelines by what they have: "plain", "pag" or "controlnet"."""

    classes: ClassVar[Mapping[str, type[Any]]]

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path = checkpoint.EMBEDDED_NAME, *,
        enable_pag: bool = False, **options: Any,
    ) -> Any:  # fmt: skip
        """Load a checkpoint of Kolors for the task; options: as for the task's class.

        enable_pag: with perturbed-attention guidance; with a `controlnet`, under control images. ValueError
        for a checkpoint of another model.
        """
        name = class_name(pretrained_model_name_or_path, options)
        if not name.startswith("Kolors"):
            raise ValueError(f"{pretrained_model_name_or_path}: is a {short_repr(name)}, expected a Kolors")
        kind = cls._kind(enable_pag, options.get("controlnet"))
        return kind.from_pretrained(pretrained_model_name_or_path, **options)

    @classmethod
    def from_pipe(cls, pipeline: Components, *, enable_pag: bool | None = None, **changes: Any) -> Any:
        """Create the task of another pipeline's models; enable_pag: as that pipeline is if None."""
        has_pag = isinstance(pipeline, cls.classes.get("pag", ()))
        controlnet = changes.get("controlnet", getattr(pipeline, "controlnet", None))
        return cls._kind(has_pag if enable_pag is None else enable_pag, controlnet).from_pipe(
            pipeline, **changes
        )

    @classmethod
    def _kind(cls, has_pag: bool, controlnet: Any) -> type[Any]:
        variant = "pag" if has_pag else "plain" if controlnet is None else "controlnet"
        if has_pag and controlnet is not None:
            raise ValueError("enable_pag and controlnet: use guidance_rule=perturbed with control images")
        if variant not in cls.classes:
            raise ValueError("enable_pag is for text to image; for others use guidance_rule=perturbed")
        return cls.classes[variant]


class AutoPipelineForText2Image(AutoPipeline):
    """Loader for text to image."""

    classes = {
        "plain": pipelines.KolorsPipeline, "pag": pipelines.KolorsPAGPipeline,
        "controlnet": pipelines.KolorsControlNetPipeline,
    }  # fmt: skip


class AutoPipelineForImage2Image(AutoPipeline):
    """Loader for image to image."""

    classes = {
        "plain": pipelines.KolorsImg2ImgPipeline, "controlnet": pipelines.KolorsControlNetImg2ImgPipeline,
    }  # fmt: skip


class AutoPipelineForInpainting(AutoPipeline):
    """Loader for inpainting."""

    classes = {
        "plain": pipelines.KolorsInpaintPipeline, "controlnet": pipelines.KolorsControlNetInpaintPipeline,
    }  # fmt: skip


def class_name(name: str | Path, options: Mapping[str, Any]) -> str:
    """Read `_class_name` of a checkpoint folder or hub repository, of which only the index is fetched."""
    names = ("revision", "cache_dir", "local_files_only", "token", "force_download")
    hub = {option: options[option] for option in names if option in options}
    return str(load_index(name, **hub).get("_class_name"))

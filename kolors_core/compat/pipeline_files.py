"""Loading and saving of pipelines with the reference's arguments.

Source: `from_pretrained`, `from_pipe` and `save_pretrained` of diffusers' pipelines/pipeline_utils.py.
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import torch

from kolors_core.adapters.lora_files import LoRAReport
from kolors_core.checkpoint import EMBEDDED_NAME, local_name, read_json, resolve
from kolors_core.compat import schedulers
from kolors_core.compat.model_methods import parse_device, parse_dtype
from kolors_core.compat.models import MODEL_SPECS
from kolors_core.compat.neutral import LORA_ONLY, NEUTRAL, without_neutral
from kolors_core.compat.shared_methods import SharedMethods, push_folder
from kolors_core.compat.tokenizer import ChatGLMTokenizer
from kolors_core.devices import Dtypes, merge_dtype_arguments
from kolors_core.pipelines.base import Components
from kolors_core.pipelines.stages import Task
from kolors_core.schedule import Scheduler

logger = logging.getLogger("kolors_core")
AnyDtypes = Dtypes | str | Mapping[str, torch.dtype | str]
ADAPTERS = (
    "low_cpu_mem_usage", "resume_download", "force_download", "proxies", "mirror", "use_safetensors",
    *sorted(LORA_ONLY),
)  # fmt: skip


def parse_dtypes(name: str, dtypes: AnyDtypes) -> Dtypes:
    """Convert names such as "float16" to dtypes; "auto" is float32, as in the reference, with a warning."""
    if dtypes == "auto":
        logger.warning("%s='auto' is float32, give a dtype for another", name)
        return None
    if isinstance(dtypes, Mapping):
        return {component: parse_dtype(name, dtype) for component, dtype in dtypes.items()}  # pyright: ignore
    return parse_dtype(name, dtypes)


class ReferenceFiles(SharedMethods, Task):
    """Pipeline of the models, tokenizer and scheduler that answer as the reference's do."""

    model_specs: ClassVar = MODEL_SPECS
    tokenizer_class: ClassVar = ChatGLMTokenizer
    scheduler: schedulers.StatefulScheduler  # unless it is of a class of your own
    hf_device_map: str | None = None

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "scheduler" and isinstance(value, Scheduler):
            schedulers.check_unchanged(value := schedulers.of(value))
        super().__setattr__(name, value)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path = EMBEDDED_NAME, *, torch_dtype: AnyDtypes = None,
        dtype: AnyDtypes = None, device: torch.device | str = "cpu", device_map: Any = None,
        force_download: bool = False, **options: Any,
    ) -> Self:  # fmt: skip
        """Load a checkpoint folder or hub repository; the embedded tiny model if none is named.

        torch_dtype, dtype: also as a name, "float16". device_map: a device to load to, as `device`; or
        "balanced", with which the models take turns on the accelerator (`enable_model_cpu_offload`).
        options: as for `pipelines.base.Components.from_pretrained`, and what the reference takes too at the
        values in `NEUTRAL`. ValueError names an argument with another value.
        """
        options = without_neutral(options, NEUTRAL.keys() - LORA_ONLY - {"force_download"})
        is_balanced = device_map == "balanced"
        if device_map is not None:
            others = ", or 'balanced', with which models take turns on the accelerator"
            place = "cpu" if is_balanced else device_map
            device = parse_device(None if device == "cpu" else device, place, others)
        asked = merge_dtype_arguments(parse_dtypes("torch_dtype", torch_dtype), parse_dtypes("dtype", dtype))
        pipe = super().from_pretrained(
            pretrained_model_name_or_path, torch_dtype=asked, device=device, force_download=force_download,
            **options,
        )  # fmt: skip
        if is_balanced:
            pipe.enable_model_cpu_offload()
        pipe.hf_device_map = None if device_map is None else str(device_map)
        return pipe

    @classmethod
    def load_config(cls, pretrained_model_name_or_path: str | Path, **hub: Any) -> dict[str, Any]:
        """Read `model_index.json`, of a hub repository fetching nothing else; hub: as for `hub.fetch`."""
        return load_index(pretrained_model_name_or_path, **hub)

    @classmethod
    def download(cls, pretrained_model_name: str | Path, *, variant: str | None = None, **hub: Any) -> str:
        """Fetch what `from_pretrained` loads; return its folder. hub: as for `kolors_core.hub.fetch`."""
        components = ("tokenizer", "scheduler", *cls.model_specs)
        return str(resolve(pretrained_model_name, components, variant, **hub))

    @classmethod
    def from_pipe(
        cls, pipeline: Components, *, torch_dtype: torch.dtype | str | None = None,
        dtype: torch.dtype | str | None = None, **changes: Any,
    ) -> Self:  # fmt: skip
        """Create another task with the same models and adapters; changes: components to replace.

        torch_dtype, or by its newer name dtype: cast them all, also for the other pipeline; None casts none.
        """
        changes = without_neutral(changes, ("custom_pipeline",))
        pair = parse_dtype("torch_dtype", torch_dtype), parse_dtype("dtype", dtype)
        pipe, asked = super().from_pipe(pipeline, **changes), merge_dtype_arguments(*pair)
        return pipe if asked is None else pipe.to(dtype=asked)  # pyright: ignore[reportArgumentType]

    def save_pretrained(
        self, save_directory: str | Path, safe_serialization: bool = True, variant: str | None = None,
        max_shard_size: int | str | None = None, push_to_hub: bool = False, *, repo_id: str | None = None,
        commit_message: str | None = None, private: bool | None = None, token: str | bool | None = None,
        create_pr: bool = False,
    ) -> None:  # fmt: skip
        """Write a folder that the reference and `from_pretrained` load; see `Components.save_pretrained`.

        push_to_hub: then upload it to repo_id, the folder's name if None; the others are as for the hub.
        """
        super().save_pretrained(save_directory, safe_serialization, variant, max_shard_size)
        if push_to_hub:
            push_folder(
                save_directory, repo_id, commit_message=commit_message, private=private, token=token,
                create_pr=create_pr,
            )  # fmt: skip

    def load_lora_weights(
        self, pretrained_model_name_or_path_or_dict: Any, adapter_name: str | None = None,
        hotswap: bool = False, **options: Any,
    ) -> LoRAReport:  # fmt: skip
        """Attach a LoRA; options: as for `LoRAMethods.load_lora_weights`. hotswap: False alone."""
        options = without_neutral(options | {"hotswap": hotswap}, ADAPTERS)
        return super().load_lora_weights(pretrained_model_name_or_path_or_dict, adapter_name, **options)

    def load_ip_adapter(
        self, pretrained_model_name_or_path_or_dict: Any, subfolder: str | Sequence[str] = "",
        weight_name: str | Sequence[str] | None = None, image_encoder_folder: str | None = "image_encoder",
        **options: Any,
    ) -> None:  # fmt: skip
        """Load IP-Adapters; options: as for `IPAdapterMethods.load_ip_adapter`."""
        super().load_ip_adapter(
            pretrained_model_name_or_path_or_dict, subfolder, weight_name, image_encoder_folder,
            **without_neutral(options, ADAPTERS),
        )  # fmt: skip


def load_index(name: str | Path, **hub: Any) -> dict[str, Any]:
    """Read the `model_index.json` of a folder or hub repository, or of "tiny"."""
    folder = resolve(local_name(name), [], has_weights=False, **hub)
    return read_json(folder / "model_index.json")

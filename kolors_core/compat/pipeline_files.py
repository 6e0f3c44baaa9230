"""Loading and saving of pipelines with the reference's arguments.

Source: `from_pretrained`, `from_pipe` and `save_pretrained` of diffusers' pipelines/pipeline_utils.py.
"""

import logging
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import torch

from kolors_core import hub
from kolors_core.adapters.lora_files import LoRAReport
from kolors_core.checkpoint import EMBEDDED, EMBEDDED_NAME, read_json, resolve
from kolors_core.compat import schedulers
from kolors_core.compat.model_methods import parse_dtype
from kolors_core.compat.models import MODEL_SPECS
from kolors_core.compat.neutral import NEUTRAL, without_neutral
from kolors_core.compat.tokenizer import ChatGLMTokenizer
from kolors_core.devices import Dtypes, merge_dtype_arguments
from kolors_core.pipelines.base import Components
from kolors_core.pipelines.stages import Task
from kolors_core.schedule import Scheduler
from kolors_core.validation import as_path, short_repr

logger = logging.getLogger("kolors_core")
AnyDtypes = Dtypes | str | Mapping[str, torch.dtype | str]
ADAPTERS = (
    "low_cpu_mem_usage", "resume_download", "force_download", "proxies", "mirror", "use_safetensors",
    "hotswap",
)  # fmt: skip


def parse_dtypes(name: str, dtypes: AnyDtypes) -> Dtypes:
    """Convert names such as "float16" to dtypes; "auto" is float32, as in the reference, with a warning."""
    if dtypes == "auto":
        logger.warning("%s='auto' is float32, give a dtype for another", name)
        return None
    if isinstance(dtypes, Mapping):
        return {component: parse_dtype(name, dtype) for component, dtype in dtypes.items()}  # pyright: ignore
    return parse_dtype(name, dtypes)


class ReferenceFiles(Task):
    """Pipeline of the models, tokenizer and scheduler that answer as the reference's do."""

    model_specs: ClassVar = MODEL_SPECS
    tokenizer_class: ClassVar = ChatGLMTokenizer
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
        options = without_neutral(options, NEUTRAL.keys() - {"force_download", "hotswap"})
        is_balanced = device_map == "balanced"
        if device_map is not None and device != "cpu":
            raise ValueError("device and device_map are two names of one argument: give one")
        if device_map is not None and not is_balanced:
            device = _device_of(device_map)
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
        dtype: torch.dtype | str | None = None, custom_pipeline: None = None, **changes: Any,
    ) -> Self:  # fmt: skip
        """Create another task with the same models and adapters; changes: components to replace.

        torch_dtype, or by its newer name dtype: cast them all, also for the other pipeline; None casts none.
        """
        without_neutral({"custom_pipeline": custom_pipeline}, ("custom_pipeline",))
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
            folder = as_path("save_directory", save_directory)
            hub.push_folder(
                folder, folder.name if repo_id is None else repo_id, commit_message=commit_message,
                private=private, token=token, create_pr=create_pr,
            )  # fmt: skip

    def push_to_hub(
        self, repo_id: str, *, use_temp_dir: bool | None = None, commit_message: str | None = None,
        private: bool | None = None, token: str | bool | None = None, create_pr: bool = False,
        safe_serialization: bool = True, variant: str | None = None,
    ) -> str:  # fmt: skip
        """Save the pipeline to a hub repository, which is created if needed; return the commit's address."""
        with tempfile.TemporaryDirectory() as scratch:
            self.save_pretrained(folder := Path(scratch) / "pipeline", safe_serialization, variant)
            return hub.push_folder(
                folder, repo_id, commit_message=commit_message, private=private, token=token,
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
    folder = resolve(EMBEDDED if name == EMBEDDED_NAME else name, [], has_weights=False, **hub)
    return read_json(folder / "model_index.json")


def _device_of(device_map: Any) -> torch.device | str:
    """Return the device of a `device_map`; ValueError for a strategy or a device for each component."""
    if isinstance(device_map, int) and not isinstance(device_map, bool):
        return f"cuda:{device_map}"
    try:
        return torch.device(device_map)
    except (RuntimeError, TypeError):
        expected = "a device, such as 'cuda', or 'balanced', with which models take turns on the accelerator"
        raise ValueError(f"device_map must be {expected}, got {short_repr(device_map)}") from None

"""Loading and saving of pipelines with the reference's arguments.

Source: `from_pretrained`, `from_pipe` and `save_pretrained` of diffusers' pipelines/pipeline_utils.py.
"""

import logging
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import torch

from kolors_core.adapters.lora_files import LoRAReport
from kolors_core.checkpoint import EMBEDDED_NAME
from kolors_core.compat import schedulers
from kolors_core.compat.model_methods import parse_device, parse_dtype
from kolors_core.compat.models import MODEL_SPECS
from kolors_core.compat.shared_methods import SharedMethods, push_folder
from kolors_core.compat.tokenizer import ChatGLMTokenizer
from kolors_core.devices import Dtypes, merge_dtype_arguments
from kolors_core.pipelines.base import Components
from kolors_core.pipelines.stages import Task
from kolors_core.schedule import Scheduler
from kolors_core.validation import short_repr

logger = logging.getLogger("kolors_core")
AnyDtypes = Dtypes | str | Mapping[str, torch.dtype | str]
# Arguments of the reference's loaders that change nothing at these values; at others the hint is the error.
NEUTRAL: dict[str, tuple[tuple[Any, ...], str]] = {
    "low_cpu_mem_usage": ((None, False, True), "weights are always loaded once"),
    "resume_download": ((None, False, True), "downloads always resume"),
    "disable_mmap": ((None, False, True), "files are mapped where that is exact"),
    "force_download": ((None, False), "adapters are fetched once"),
    "proxies": ((None, {}), "set HTTPS_PROXY in the environment"),
    "mirror": ((None, ""), "set HF_ENDPOINT in the environment"),
    "custom_pipeline": ((None,), "a pipeline of your own is a subclass of KolorsPipeline"),
    "custom_revision": ((None,), "no code is fetched"),
    "trust_remote_code": ((None, False), "no code is fetched"),
    "load_connected_pipeline": ((None, False), "Kolors has none"),
    "max_memory": ((None, {}), "pipe.enable_model_cpu_offload() needs no plan"),
    "offload_folder": ((None, ""), "weights are offloaded to memory alone"),
    "offload_state_dict": ((None, False), "weights are offloaded to memory alone"),
    "quantization_config": ((None,), "use kolors_core.performance.quantize on a loaded model"),
    "use_onnx": ((None, False), "only safetensors are opened"),
    "use_flashpack": ((None, False), "only safetensors are opened"),
    "safety_checker": ((None,), "Kolors has none"),
    "requires_safety_checker": ((None, False), "Kolors has none"),
    "use_safetensors": ((None, True), "pickles can run code, only safetensors are opened"),
    "hotswap": ((None, False), "call delete_adapters(name), then load the other under that name"),
}
ADAPTERS = (
    "low_cpu_mem_usage", "resume_download", "force_download", "proxies", "mirror", "use_safetensors",
    "hotswap",
)  # fmt: skip


def without_neutral(options: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    """Return the options without those of the names, whose values must be in `NEUTRAL`; else ValueError."""
    for name in options.keys() & names:
        values, hint = NEUTRAL[name]
        if not any(options[name] is value or options[name] == value for value in values):
            raise ValueError(f"{name}={short_repr(options[name])} has no place here: {hint}")
    return {name: value for name, value in options.items() if name not in names}


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
        is_plain = name == "scheduler" and isinstance(value, Scheduler)
        super().__setattr__(name, schedulers.of(value) if is_plain else value)

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

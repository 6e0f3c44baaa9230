"""Methods that the reference's models have: loading, saving, memory and speed."""

import logging
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint as recompute

from kolors_core import attention, checkpoint, devices
from kolors_core.checkpoint import ModelSpec
from kolors_core.compat.configs import with_public_names
from kolors_core.compat.neutral import check_neutral
from kolors_core.compat.shared_methods import ATTENTION_HINT, SharedMethods, push_folder
from kolors_core.module import is_block
from kolors_core.performance import quantized_files
from kolors_core.performance.compile import compile_blocks
from kolors_core.performance.fuse_projections import fuse_projections, unfuse_projections
from kolors_core.validation import as_path, check_safe_serialization, short_repr
from weights_convert.atomic_write import atomic_folder

logger = logging.getLogger("kolors_core")
# The reference's names of kernels that are ours too.
ATTENTION_BACKENDS: dict[str, str | None] = {
    "native": None, "_native_flash": "flash", "_native_cudnn": "cudnn", "_native_efficient": "efficient",
}  # fmt: skip
PROCESSOR_HINT = (
    "there are no attention processors here: change an attention by a class in unet.py, read it by "
    "kolors_core.record_attention, and choose a kernel by set_attention_backend"
)


READ_WHEN_RUN = {"sample_size", "scaling_factor", "force_upcast"}  # fields that build no part of a model


def parse_dtype(name: str, dtype: torch.dtype | str | None) -> torch.dtype | None:
    """Convert a name such as "float16" or "torch.float16" to a dtype; others are returned as they are."""
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if isinstance(dtype, str) and not isinstance(found, torch.dtype):
        raise ValueError(f"{name} must be a dtype or its name, such as 'float16', got {short_repr(dtype)}")
    return found


def parse_device(device: torch.device | str | None, device_map: Any, others: str = "") -> torch.device | str:
    """Return the device of either argument, the CPU if both are None; ValueError names `others` too."""
    if device is not None and device_map is not None:
        raise ValueError("device and device_map are two names of one argument: give one")
    if device_map is None:
        return "cpu" if device is None else device
    one: Any = device_map[""] if isinstance(device_map, Mapping) and list(device_map) == [""] else device_map
    try:
        is_index = isinstance(one, int) and not isinstance(one, bool)
        return torch.device("cuda", one) if is_index else torch.device(one)
    except (RuntimeError, TypeError):
        expected = f"device_map must be a device, such as 'cuda'{others}"
        raise ValueError(f"{expected}, got {short_repr(device_map)}") from None


def _recomputed(forward: Callable[..., Any], *inputs: Any, **named: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*inputs, **named)
    return recompute(forward, *inputs, use_reentrant=False, **named)


def _is_recomputed(module: nn.Module) -> bool:
    forward = vars(module).get("forward")
    return isinstance(forward, partial) and forward.func is _recomputed


class ModelMethods(SharedMethods, nn.Module):
    """Methods of every model."""

    component: ClassVar[str]  # name in a checkpoint
    config_type: ClassVar[Any]
    name_or_path: str = ""

    def __init__(self, config: Any) -> None:
        super().__init__(with_public_names(config))

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, *, subfolder: str | None = None,
        torch_dtype: torch.dtype | str | None = None, dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None, device_map: Any = None, variant: str | None = None,
        revision: str | None = None, cache_dir: str | Path | None = None, local_files_only: bool = False,
        token: str | bool | None = None, force_download: bool = False, **neutral: Any,
    ) -> Self:  # fmt: skip
        """Load a folder or hub repository, or "tiny", strictly, fetching only this model's files.

        subfolder: such as "unet", of a whole Kolors. torch_dtype, or by its newer name dtype: float32 if
        None, and the VAE is never float16. device_map: a device, or {"": device}. neutral: see neutral.py.
        FileNotFoundError or ValueError names the file, field or tensor.
        """
        check_neutral(neutral)
        name, subfolder = cls._place(pretrained_model_name_or_path, subfolder)
        dtypes = (parse_dtype("torch_dtype", torch_dtype), parse_dtype("dtype", dtype))
        wanted = devices.merge_dtype_arguments(*dtypes)
        if (chosen := devices.dtype_of(cls.component, wanted)) != wanted and wanted is not None:
            logger.warning("torch_dtype: the VAE is loaded in %s, since in float16 it overflows", chosen)
        model = quantized_files.load_component(
            name, cls.component, subfolder=subfolder, variant=variant, dtype=chosen,
            device=parse_device(device, device_map), kind=ModelSpec(cls.config_type, cls), revision=revision,
            cache_dir=cache_dir, local_files_only=local_files_only, token=token,
            force_download=force_download,
        )  # fmt: skip
        model.name_or_path = str(pretrained_model_name_or_path)
        return model

    @classmethod
    def _place(cls, name: str | Path, subfolder: str | None) -> tuple[str | Path, str]:
        """Return where a model of this name is, and in which folder there; ValueError for a whole Kolors."""
        if name == checkpoint.EMBEDDED_NAME:
            return name, subfolder or cls.component
        if not subfolder and isinstance(name, str | Path) and (Path(name) / "model_index.json").is_file():
            raise ValueError(f"{name}: is a whole Kolors, expected a subfolder, such as {cls.component!r}")
        return name, subfolder or ""

    @classmethod
    def load_config(
        cls, pretrained_model_name_or_path: str | Path, *, subfolder: str | None = None, **hub: Any
    ) -> dict[str, Any]:
        """Read a saved model's `config.json`, for `from_config`; hub: as for `kolors_core.hub.fetch`."""
        name, subfolder = cls._place(pretrained_model_name_or_path, subfolder)
        folder = checkpoint.fetch_component(name, cls.component, subfolder, None, False, **hub)
        return checkpoint.read_json(folder / subfolder / "config.json")

    def register_to_config(self, **fields: Any) -> None:
        """Set fields of the config that are read when images are made, such as `scaling_factor`.

        ValueError for a field that the model was built by.
        """
        if built := sorted(fields.keys() - READ_WHEN_RUN):
            raise ValueError(f"the model was built by {built[0]}: {type(self).__name__}.from_config(config)")
        public = {**self.config, **fields}
        self.config = self.config_type.from_public(public, "config")

    def get_memory_footprint(self) -> int:
        """Count the bytes of all parameters and buffers."""
        return sum(tensor.nbytes for tensor in (*self.parameters(), *self.buffers()))

    @classmethod
    def from_config(cls, config: Any) -> Self:
        """Build a model with random weights from a config, or the content of a `config.json`."""
        if isinstance(config, Mapping) and not hasattr(config, "to_public"):
            config = cls.config_type.from_public(config, "config")
        return cls(config)

    def save_pretrained(
        self, save_directory: str | Path, *, is_main_process: bool = True, safe_serialization: bool = True,
        variant: str | None = None, max_shard_size: int | str = "10GB", push_to_hub: bool = False,
        repo_id: str | None = None, commit_message: str | None = None, private: bool | None = None,
        token: str | bool | None = None, create_pr: bool = False,
    ) -> None:  # fmt: skip
        """Write a folder that the reference and `from_pretrained` load, whole or not at all.

        It may be a saved model's own, which is replaced in one step. repo_id: where to push to; the folder's
        name if None. A quantized model is for this library alone. FileExistsError for a folder with
        other files.
        """
        check_safe_serialization(safe_serialization)
        if not is_main_process:
            return
        folder = as_path("save_directory", save_directory)
        with atomic_folder(folder, checkpoint.is_own_folder) as place:
            quantized_files.save_component(
                self, place, self.component, subfolder="", variant=variant, max_shard_size=max_shard_size
            )
        if push_to_hub:
            push_folder(
                folder, repo_id, commit_message=commit_message, private=private, token=token,
                create_pr=create_pr,
            )  # fmt: skip

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the first floating-point parameter."""
        return next(parameter.dtype for parameter in self.parameters() if parameter.is_floating_point())

    @property
    def device(self) -> torch.device:
        """The device of the first parameter."""
        return next(self.parameters()).device

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Count the numbers in all parameters."""
        layers = (m for m in self.modules() if isinstance(m, nn.Embedding) and exclude_embeddings)
        embeddings = {id(layer.weight) for layer in layers}
        return sum(
            parameter.numel() for parameter in self.parameters()
            if (parameter.requires_grad or not only_trainable) and id(parameter) not in embeddings
        )  # fmt: skip

    def enable_gradient_checkpointing(self) -> None:
        """Recompute each block's activations in the backward pass: less memory, more time."""
        self.disable_gradient_checkpointing()
        for block in filter(is_block, self.modules()):
            block.forward = partial(_recomputed, block.forward)

    def disable_gradient_checkpointing(self) -> None:
        """Keep activations for the backward pass again."""
        for block in filter(_is_recomputed, self.modules()):
            before = vars(block).pop("forward").args[0]
            if before != block.forward:  # it was set on the block itself
                block.forward = before

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether any block's activations are recomputed."""
        return any(map(_is_recomputed, self.modules()))

    def compile_repeated_blocks(
        self, *, fullgraph: bool = True, dynamic: bool | None = None, mode: str | None = None,
        backend: str = "inductor",
    ) -> None:  # fmt: skip
        """Compile each kind of block once, whole; a second image size compiles for all sizes."""
        if not fullgraph or dynamic is not None:
            logger.warning("fullgraph and dynamic have no effect: a block is compiled whole, for all sizes")
        compile_blocks(self, mode, backend)

    def fuse_qkv_projections(self) -> None:
        """Compute queries, keys and values of a UNet's or ControlNet's self-attention in one product."""
        fuse_projections(self)

    def unfuse_qkv_projections(self) -> None:
        """Compute queries, keys and values one by one again."""
        unfuse_projections(self)

    def set_attention_backend(self, backend: str) -> None:
        """Choose the attention kernel, of all models of this process: the reference's name or one of ours."""
        attention.force_kernel(ATTENTION_BACKENDS.get(backend, backend))

    def reset_attention_backend(self) -> None:
        """Let inputs and device choose the attention kernel again."""
        attention.force_kernel(None)

    def set_attention_slice(self, slice_size: Any = "auto") -> None:
        """Log that there is nothing to do."""
        logger.warning("set_attention_slice has no effect: %s, which need no slices", ATTENTION_HINT)

    def set_default_attn_processor(self) -> None:
        """Do nothing: there are no others."""

    @property
    def attn_processors(self) -> dict[str, Any]:
        """Raise NotImplementedError, which says what to use instead."""
        raise NotImplementedError(PROCESSOR_HINT)

    def set_attn_processor(self, processor: Any) -> None:
        """Raise NotImplementedError, which says what to use instead."""
        raise NotImplementedError(PROCESSOR_HINT)

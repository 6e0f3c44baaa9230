"""Attributes and methods of pipelines that only scripts written for the reference read and call.

Source: diffusers' pipelines/pipeline_utils.py, pipelines/kolors/pipeline_kolors.py and
pipeline_kolors_img2img.py.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor

from kolors_core.adapters import lora
from kolors_core.checkpoint import model_index
from kolors_core.compat.configs import ReadOnlyConfig
from kolors_core.compat.image_processor import VaeImageProcessor
from kolors_core.compat.neutral import without_neutral
from kolors_core.compat.pipeline_files import ADAPTERS, ReferenceFiles
from kolors_core.compat.shared_methods import ATTENTION_HINT
from kolors_core.devices import named_device
from kolors_core.image import Size
from kolors_core.pipelines.denoising_loop import NEGATIVE_TENSORS, POSITIVE_TENSORS
from kolors_core.pipelines.image_to_image import FromImage
from kolors_core.pipelines.lora_methods import find_lora
from kolors_core.pipelines.request import PipelineInputs
from kolors_core.pipelines.text_prompts import Prompt, check_prompts
from kolors_core.sampling import Generators, randn_latents
from kolors_core.validation import check_fraction, check_int, short_repr
from weights_convert.safetensors_files import Source

if TYPE_CHECKING:
    from kolors_core.compat.image_processor import VaeImageProcessor

logger = logging.getLogger("kolors_core")
# Methods for custom loops alone, and what changes a call in their place.
NOT_CALLED = {
    "encode_prompt": "give prompt_embeds, or a text_encoder of your own",
    "prepare_latents": "give latents", "_get_add_time_ids": "give original_size and target_size",
    "get_timesteps": "give strength or denoising_start",
    "prepare_extra_step_kwargs": "set pipe.sampler, a function like sampling.euler",
}  # fmt: skip
OFFLOAD_TYPES = ("block_level", "leaf_level")


class PipelineConfig(ReadOnlyConfig):
    """Config of a pipeline, read only."""

    hint = "pipe.register_to_config({}=...)"


class ReferenceMethods(ReferenceFiles):
    """Attributes and methods of every pipeline."""

    model_cpu_offload_seq: ClassVar[str] = "text_encoder->image_encoder->unet->vae"
    _optional_components: ClassVar[list[str]] = ["image_encoder", "feature_extractor"]
    _callback_tensor_inputs: ClassVar[list[str]] = ["latents", *POSITIVE_TENSORS, *NEGATIVE_TENSORS]

    def __init_subclass__(cls, **options: Any) -> None:
        """Raise TypeError for a subclass with a method that its inherited `__call__` would not call."""
        super().__init_subclass__(**options)
        calls = [kind for kind in cls.__mro__ if "__call__" in vars(kind)]
        if calls and cls not in calls and (unused := sorted(vars(cls).keys() & NOT_CALLED)):
            raise TypeError(f"{cls.__name__}.{unused[0]} is not called by __call__: {NOT_CALLED[unused[0]]}")

    def _init_state(self) -> None:
        super()._init_state()
        self._registered: dict[str, Any] = {}  # fields of the config that are no component

    @property
    def vae_scale_factor(self) -> int:
        """Pixels a latent, along each side."""
        return 8 if self.vae is None else self.vae.config.vae_scale_factor

    @property
    def default_sample_size(self) -> int:
        """The side in latents that images have if none is given."""
        return 128 if self.unet is None else self.unet.config.sample_size

    @property
    def image_processor(self) -> "VaeImageProcessor":
        """A new processor of images for the VAE, which calls do not use."""
        from kolors_core.compat.image_processor import VaeImageProcessor

        return VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)

    @property
    def _execution_device(self) -> torch.device:
        return self.device

    @property
    def config(self) -> PipelineConfig:
        """The content of `model_index.json`, with `_name_or_path`."""
        index = model_index(type(self).__name__, self.components)
        entries = {name: tuple(v) if isinstance(v, list) else v for name, v in index.items()}
        return PipelineConfig(entries | self._registered | {"_name_or_path": self.name_or_path})

    def register_to_config(self, **fields: Any) -> None:
        """Set fields of the config; of components `register_modules` does."""
        if components := sorted(fields.keys() & self.components.keys() - {"force_zeros_for_empty_prompt"}):
            raise ValueError(f"{components[0]} is a component: pipe.register_modules({components[0]}=...)")
        self.name_or_path = fields.pop("_name_or_path", self.name_or_path)
        zeros = "force_zeros_for_empty_prompt"
        self.force_zeros_for_empty_prompt = fields.pop(zeros, self.force_zeros_for_empty_prompt)
        self._registered |= fields

    def register_modules(self, **components: Any) -> None:
        """Set components. TypeError for a name that is none."""
        if strangers := sorted(components.keys() - self.components.keys()):
            raise TypeError(f"{strangers[0]!r} is no component; expected {', '.join(self.components)}")
        for name, component in components.items():
            setattr(self, name, component)

    def to(
        self, *targets: torch.device | str | torch.dtype, device: torch.device | str | None = None,
        dtype: torch.dtype | None = None, silence_dtype_warnings: bool = False,
    ) -> Self:  # fmt: skip
        """Move every model to a device, a dtype, or both; see `Components.to`, which has no such warnings."""
        return super().to(*targets, device=device, dtype=dtype)

    def progress_bar(self, iterable: Iterable[Any] | None = None, total: int | None = None) -> Any:
        """Return tqdm's bar of an iterable, or of a total to `update`, with the pipeline's options."""
        if iterable is None and total is None:
            raise ValueError("give either iterable or total")
        from tqdm.auto import tqdm

        return tqdm(iterable, total=total, **self._progress)

    @staticmethod
    def numpy_to_pil(images: Any) -> list[Any]:
        """Convert an array [H, W, 3] or [B, H, W, 3] in [0, 1] to PIL images."""
        from kolors_core.compat.image_processor import VaeImageProcessor

        return VaeImageProcessor.numpy_to_pil(images)

    def maybe_free_model_hooks(self) -> None:
        """Copy no model to the accelerator any more, under offload; the next call does again."""
        self._enter_stage()

    def reset_device_map(self) -> None:
        """End offload and move all models to the CPU."""
        self.to("cpu")
        self.hf_device_map = None

    def upcast_vae(self) -> None:
        """Cast the VAE to float32, which it has already unless you changed it."""
        self.vae.to(torch.float32)

    def fuse_qkv_projections(self, unet: bool = True, vae: bool = True) -> None:
        """Compute queries, keys and values in one product, in UNet and ControlNets; not in the VAE."""
        if unet:
            super().fuse_qkv_projections()

    def unfuse_qkv_projections(self, unet: bool = True, vae: bool = True) -> None:
        """Compute queries, keys and values one by one again."""
        if unet:
            super().unfuse_qkv_projections()

    def enable_attention_slicing(self, slice_size: str | int | None = "auto") -> None:
        """Log that there is nothing to do."""
        logger.warning("enable_attention_slicing has no effect: %s, which need no slices", ATTENTION_HINT)

    def disable_attention_slicing(self) -> None:
        """Do nothing."""

    def enable_group_offload(
        self, onload_device: torch.device | str, offload_device: torch.device | str = "cpu",
        offload_type: str = "block_level", num_blocks_per_group: int | None = None,
        non_blocking: bool = False, use_stream: bool = False, record_stream: bool = False,
        low_cpu_mem_usage: bool = False, offload_to_disk_path: None = None,
        exclude_modules: str | Sequence[str] | None = None,
    ) -> None:  # fmt: skip
        """Keep on the device only the block that runs and the next: `enable_sequential_cpu_offload`.

        Blocks are copied in a stream of their own in any case, which non_blocking, use_stream and
        record_stream ask for, and one by one. ValueError for another place than the CPU's memory.
        """
        if torch.device(offload_device).type != "cpu" or offload_to_disk_path is not None:
            got = f"{offload_device} and {short_repr(offload_to_disk_path)}"
            raise ValueError(f"offload_device must be the CPU, without offload_to_disk_path, got {got}")
        if offload_type not in OFFLOAD_TYPES:
            expected = " or ".join(OFFLOAD_TYPES)
            raise ValueError(f"offload_type must be {expected}, got {short_repr(offload_type)}")
        if exclude_modules:
            raise ValueError(f"exclude_modules must be None, got {short_repr(exclude_modules)}")
        if num_blocks_per_group not in (None, 1):
            logger.warning("num_blocks_per_group has no effect: one block is copied while another runs")
        self.enable_sequential_cpu_offload(device=onload_device)

    def set_lora_device(self, adapter_names: str | Sequence[str], device: torch.device | str | int) -> None:
        """Move adapters that are not active to another device, and back before they are active again."""
        names = self._known_names(adapter_names)
        place = named_device(f"cuda:{device}" if isinstance(device, int) else str(device))
        for model in self._lora_models().values():
            for adapter in (one for name, one in lora.adapters(model).items() if name in names):
                for part in adapter.parts().values():
                    part.to(place)

    @staticmethod
    def lora_state_dict(
        pretrained_model_name_or_path_or_dict: str | Path | Mapping[str, Tensor], *,
        weight_name: str | None = None, subfolder: str | None = None, **options: Any,
    ) -> tuple[dict[str, Tensor], None]:  # fmt: skip
        """Read a LoRA's tensors, by their names in the file and without alphas, for `load_lora_weights`."""
        source, options = pretrained_model_name_or_path_or_dict, without_neutral(options, ADAPTERS)
        if isinstance(source, Mapping):
            return dict(source), None
        tensors = Source([find_lora(source, weight_name, subfolder, **options)])
        return {name: tensors[name].clone() for name in tensors}, None

    def prepare_extra_step_kwargs(self, generator: Generators, eta: float) -> dict[str, Any]:
        """Return the arguments of the scheduler's `step` that a call passes on."""
        return {"generator": generator} | ({"eta": eta} if self.scheduler.takes_eta else {})

    def _get_add_time_ids(
        self, original_size: Size, crops_coords_top_left: Size, target_size: Size, dtype: torch.dtype,
        text_encoder_projection_dim: int | None = None,
    ) -> Tensor:  # fmt: skip
        """Return size conditions for `added_cond_kwargs`: [1, 6]."""
        return torch.tensor([[*original_size, *crops_coords_top_left, *target_size]], dtype=dtype)

    def prepare_latents(
        self, batch_size: int, num_channels_latents: int, height: int, width: int, dtype: torch.dtype,
        device: torch.device | str, generator: Generators, latents: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Return noise, drawn or given, times the scheduler's `init_noise_sigma`: [B, C, H/8, W/8]."""
        sides = int(height) // self.vae_scale_factor, int(width) // self.vae_scale_factor
        if latents is None:
            shape = batch_size, num_channels_latents, *sides
            latents = randn_latents(shape, generator, torch.device(device), dtype)
        return latents.to(device) * self.scheduler.init_noise_sigma

    def check_inputs(
        self, prompt: Prompt | None, num_inference_steps: int, height: int, width: int,
        negative_prompt: Prompt | None = None, prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None, negative_prompt_embeds: Tensor | None = None,
        negative_pooled_prompt_embeds: Tensor | None = None, ip_adapter_image: Any = None,
        ip_adapter_image_embeds: Any = None,
        callback_on_step_end_tensor_inputs: Sequence[str] | None = None,
        max_sequence_length: int | None = None,
    ) -> None:  # fmt: skip
        """Raise ValueError or TypeError for arguments that a call refuses."""
        check_int("num_inference_steps", num_inference_steps)
        for name, side in (("height", height), ("width", width)):
            self._size(name, side)
        PipelineInputs(callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs or ("latents",))
        check_prompts(
            self, prompt, negative_prompt, prompt_embeds, pooled_prompt_embeds, negative_prompt_embeds,
            negative_pooled_prompt_embeds,
        )  # fmt: skip
        if ip_adapter_image is not None and ip_adapter_image_embeds is not None:
            raise ValueError("give either ip_adapter_image or ip_adapter_image_embeds, not both")
        if max_sequence_length is not None:
            check_int("max_sequence_length", max_sequence_length, least=3, most=256)


class ReferenceImageMethods(ReferenceMethods, FromImage):
    """Methods of image to image, of which two have other arguments."""

    def get_timesteps(
        self, num_inference_steps: int, strength: float, device: Any, denoising_start: float | None = None
    ) -> tuple[Tensor, int]:
        """Return the timesteps after the start that strength or denoising_start sets, and their number."""
        timesteps, order = self.scheduler.timesteps, self.scheduler.order
        every_step = timesteps[::order]  # of its first evaluation
        if denoising_start is None:
            steps, whole = min(int(num_inference_steps * strength), num_inference_steps), num_inference_steps
        else:
            total = self.scheduler.num_train_timesteps
            steps = int((every_step < round(total - denoising_start * total)).sum())
            whole = len(every_step)
        start = (whole - steps) * order
        self.scheduler.set_begin_index(start)
        return timesteps[start:], steps

    def prepare_latents(  # pyright: ignore[reportIncompatibleMethodOverride] (the reference's own order)
        self, image: Tensor, timestep: Tensor, batch_size: int, num_images_per_prompt: int,
        dtype: torch.dtype, device: torch.device | str, generator: Generators = None, add_noise: bool = True,
    ) -> Tensor:  # fmt: skip
        """Return the latents of images [b, 3, H, W] in [-1, 1], or given ones, with noise of a timestep."""
        count = batch_size * num_images_per_prompt
        mean, std = self._mean_and_std(image.to(device))
        clean = self.sample_latents(mean, std, count, num_images_per_prompt, generator).to(device, dtype)
        if not add_noise:
            return clean
        noise = randn_latents(tuple(clean.shape), generator, torch.device(device), dtype)
        return self.scheduler.add_noise(clean, noise, timestep)

    def check_inputs(  # pyright: ignore[reportIncompatibleMethodOverride] (the reference's own order)
        self, prompt: Prompt | None, strength: float, num_inference_steps: int, height: int, width: int,
        *others: Any, **named: Any,
    ) -> None:  # fmt: skip
        """Raise ValueError or TypeError for arguments that a call refuses; others as for text to image."""
        check_fraction("strength", strength)
        super().check_inputs(prompt, num_inference_steps, height, width, *others, **named)


def retrieve_timesteps(
    scheduler: Any, num_inference_steps: int | None = None, device: torch.device | str | None = None,
    timesteps: Sequence[float] | None = None, sigmas: Sequence[float] | None = None, **options: Any,
) -> tuple[Tensor, int]:  # fmt: skip
    """Begin a loop of a scheduler; return its timesteps and their number. ValueError for both at once."""
    if timesteps is not None and sigmas is not None:
        raise ValueError("give either timesteps or sigmas, not both")
    is_custom = timesteps is not None or sigmas is not None
    steps = None if is_custom else num_inference_steps
    scheduler.set_timesteps(steps, device=device, timesteps=timesteps, sigmas=sigmas, **options)
    return scheduler.timesteps, len(scheduler.timesteps)


def retrieve_latents(
    encoder_output: Any, generator: Generators = None, sample_mode: str = "sample"
) -> Tensor:
    """Return a sample of what `vae.encode` returned, or by "argmax" the mean; not scaled."""
    if sample_mode not in ("sample", "argmax"):
        raise ValueError(f"sample_mode must be 'sample' or 'argmax', got {short_repr(sample_mode)}")
    latents = encoder_output.latent_dist
    return latents.mode() if sample_mode == "argmax" else latents.sample(generator)

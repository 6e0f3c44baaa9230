"""Methods of a pipeline for less time or memory: offload, compilation, tiles, row split, caches.

Source: the methods of these names in diffusers' pipelines/pipeline_utils.py.
"""

import logging
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar, Self

import torch

from kolors_core.chatglm import TextEmbedding
from kolors_core.checkpoint import UnloadedModel
from kolors_core.denoiser import require_unet
from kolors_core.devices import named_device, unwrap_compiled
from kolors_core.guidance import GuidanceRule, Interval
from kolors_core.module import WrapStep, find_blocks
from kolors_core.performance import quantized_files
from kolors_core.performance.available_memory import available_memory
from kolors_core.performance.compile import CUDA_GRAPH_MODES, compile_blocks
from kolors_core.performance.cuda_graphs import CUDAGraphCache
from kolors_core.performance.fuse_projections import fuse_projections, unfuse_projections
from kolors_core.performance.fused_kernels import fuse_kernels, unfuse_kernels
from kolors_core.performance.half_precision_vae import (
    HalfPrecisionDecoder,
    disable_half_precision,
    enable_half_precision,
)
from kolors_core.performance.offload import Offload, check_blocks, refuse_compiled
from kolors_core.performance.prompt_cache import Key, PromptCache
from kolors_core.performance.row_split import Ranks, RowSplit, set_coder
from kolors_core.performance.step_cache import StepCache
from kolors_core.performance.vae_tiling import disable_slicing, disable_tiling, enable_slicing, enable_tiling
from kolors_core.pipelines.base import Components
from kolors_core.tokenizer import TokenBatch
from kolors_core.unet import UNetEncoder

Device = torch.device | str | None
logger = logging.getLogger("kolors_core")
QUANTIZABLE = ("text_encoder", "unet")


class PerformanceMethods(Components):
    """A pipeline that can offload, compile, quantize, tile and split models, and cache prompts and steps."""

    _open_component: ClassVar[Callable[..., Any]] = staticmethod(quantized_files.open_component)
    _save_component: ClassVar[Callable[..., Any]] = staticmethod(quantized_files.save_component)
    _check_savable: ClassVar[Callable[..., Any]] = staticmethod(quantized_files.check_savable)
    _wrap_step: CUDAGraphCache | None = None
    step_cache: StepCache | None = None
    row_split: RowSplit | None = None

    @classmethod
    def _quantized_on_read(
        cls, parts: Mapping[str, Any], formats: Mapping[str, Any], progress: Callable[..., object] | None
    ) -> dict[str, Any]:
        if not isinstance(formats, Mapping):
            raise TypeError(f"quantization must be a mapping such as {{'unet': 8}}, got {formats!r}")
        if strangers := sorted(formats.keys() - {*QUANTIZABLE}):
            raise ValueError(f"quantization names {strangers[0]!r}; expected {' or '.join(QUANTIZABLE)}")
        if given := [name for name in formats if not isinstance(parts[name], UnloadedModel)]:
            raise ValueError(f"quantization has no effect on the {given[0]}: it is not read from files")
        return {
            name: quantized_files.quantized_on_read(parts[name], one, progress and partial(progress, name))
            for name, one in formats.items()
        }

    def _init_state(self) -> None:
        super()._init_state()
        self.offload, self.prompt_cache = Offload(), PromptCache()

    def __getstate__(self) -> dict[str, Any]:
        """Return the state of copies and pickles, without cached prompts, captured graphs and processes."""
        return self.__dict__ | {"prompt_cache": PromptCache(), "_wrap_step": None, "row_split": None}

    @classmethod
    def from_pipe(cls, pipeline: Components, **changes: Any) -> Self:
        """Create another task with the very same models, offload and cached prompts; see `Components`."""
        pipe = super().from_pipe(pipeline, **changes)
        for name in ("offload", "prompt_cache", "step_cache", "row_split", "_wrap_step"):
            setattr(pipe, name, getattr(pipeline, name))
        return pipe

    def compile(self, mode: str | None = None, backend: str = "inductor") -> None:
        """Compile the models' blocks when they first run, and again for each new kind of input.

        mode, backend: as for `torch.compile`; "reduce-overhead" and "max-autotune" also make each step one
        CUDA graph, in runs where the UNet stays on CUDA, so not under offload. Other image sizes, LoRAs and
        weights work as before. See kolors_core/performance/compile.py; ValueError for an unknown mode.
        """
        own = map(unwrap_compiled, self._own_models().values())
        models = list(dict.fromkeys((*own, *self._unets())))
        for model in models:
            find_blocks(model, "compile")  # all of them before one is compiled
        for model in models:
            compile_blocks(model, mode, backend)
        self._wrap_step = CUDAGraphCache() if mode in CUDA_GRAPH_MODES else None

    def enable_model_cpu_offload(self, gpu_id: int | None = None, device: Device = None) -> None:
        """Keep on the accelerator only the model that runs: text encoder, CLIP, UNet or VAE.

        The next one is copied meanwhile, if both together are no larger than the largest. All others are on
        the CPU, for CUDA in page-locked memory until this ends. `pipe.offload.peak_bytes` is the peak of
        weights. gpu_id: of CUDA; or device; the best there is if both are None; if that is the CPU nothing
        changes, and a warning says so. ValueError for a device that is not there.
        """
        self._start_offload(gpu_id, device, by_block=False)

    def enable_sequential_cpu_offload(self, gpu_id: int | None = None, device: Device = None) -> None:
        """Keep on the accelerator only the block that runs and the next one, which is copied meanwhile.

        The least memory, and every step waits for the UNet's weights. A module with parameters of its own is
        a block with its submodules. As `enable_model_cpu_offload`; ValueError also for a compiled model.
        """
        self._start_offload(gpu_id, device, by_block=True)

    def remove_all_hooks(self) -> None:
        """End offload, if it is on: the models are on the CPU then."""
        if self.offload.device is not None:
            self.to("cpu")

    def enable_vae_tiling(self, *, tile_sample_min_size: int | None = None) -> None:
        """Run the VAE in tiles: a fifth of the memory at 1024 x 1024, the same image.

        Holds for every pipeline with this VAE. Arguments and errors as in `vae_tiling.enable_tiling`.
        """
        enable_tiling(unwrap_compiled(self.vae), tile_sample_min_size=tile_sample_min_size)

    def disable_vae_tiling(self) -> None:
        """Run the VAE on whole images."""
        disable_tiling(unwrap_compiled(self.vae))

    def enable_vae_slicing(self) -> None:
        """Run the VAE on one image of a batch after another."""
        enable_slicing(unwrap_compiled(self.vae))

    def disable_vae_slicing(self) -> None:
        """Run the VAE on all images of a batch at once."""
        disable_slicing(unwrap_compiled(self.vae))

    def enable_vae_half_precision(self, limit: float = 1.0) -> HalfPrecisionDecoder:
        """Decode in float16 or bfloat16, if the first image stays within `limit` gray levels of float32's.

        Holds for every pipeline with this VAE. Result and errors as of
        `half_precision_vae.enable_half_precision`.
        """
        return enable_half_precision(unwrap_compiled(self.vae), limit)

    def disable_vae_half_precision(self) -> None:
        """Decode in the VAE's own precision."""
        disable_half_precision(unwrap_compiled(self.vae))

    def enable_fused_kernels(self) -> None:
        """Run GEGLU, LayerNorm and GroupNorm of UNet and ControlNets by fused kernels, channels-last.

        On CUDA with Triton, up to rounding; elsewhere, with gradients and under `compile`, torch's operators
        run. Holds for every pipeline with this UNet. See kolors_core/performance/fused_kernels.py.
        """
        self._change_unets(fuse_kernels, "running fused kernels")

    def disable_fused_kernels(self) -> None:
        """Run torch's operators again."""
        self._change_unets(unfuse_kernels)

    def fuse_qkv_projections(self) -> None:
        """Compute queries, keys and values of self-attention in one product, in UNet and ControlNets.

        The same up to rounding, in the same memory. Under offload and `compile`, with a LoRA or quantized
        weights the three are computed one by one. Holds for every pipeline with this UNet. ValueError for a
        UNet that is quantized already. See kolors_core/performance/fuse_projections.py.
        """
        self._change_unets(fuse_projections, "fusing projections")

    def unfuse_qkv_projections(self) -> None:
        """Compute queries, keys and values one by one again."""
        self._change_unets(unfuse_projections)

    def _change_unets(self, change: Callable[[UNetEncoder], object], feature: str | None = None) -> None:
        if feature is not None:
            require_unet(self.unet, feature)
        for net in self._unets():
            change(net)

    def _unets(self) -> list[UNetEncoder]:
        models = (unwrap_compiled(model) for model in (self.unet, *self._attached_models()))
        return [model for model in models if isinstance(model, UNetEncoder)]

    def enable_step_cache(
        self, interval: int | None = 3, *, branch: int | None = None, center: float | None = None,
        power: float = 1.4, threshold: float | None = None, gate: float | None = None,
        guidance_interval: Interval | None = None, guidance_similarity: float | None = None,
    ) -> None:  # fmt: skip
        """Reuse in each step what hardly changes: faster, for other images; see performance/README.md.

        interval: the whole UNet runs in every so many steps. Others and errors: see `step_cache.StepCache`;
        also ValueError for a branch that the UNet has not. Calls raise it for what cannot be cached.
        """
        cache = StepCache(
            interval=interval, branch=branch, center=center, power=power, threshold=threshold, gate=gate,
            guidance_interval=guidance_interval, guidance_similarity=guidance_similarity,
        )  # fmt: skip
        cache.branch_of(unwrap_compiled(self.unet))
        self.step_cache = cache

    def disable_step_cache(self) -> None:
        """Compute every step as a whole."""
        self.step_cache = None

    def enable_row_split(self, group: Any = None) -> None:
        """Draw each image on several processes, each with some rows of every feature map: the same image.

        Every process makes the same calls, with generators of the same seed, and gets the same images.
        group: of torch.distributed, whose processes split the UNet's and ControlNets' rows, where there are
        others that compute another half of guidance; None for all. All split the VAE's. Holds for every
        pipeline with this VAE. ValueError where torch.distributed is not initialized; TypeError, naming the
        VAE's `run_coder`, if it runs in tiles. Calls raise ValueError or TypeError for what cannot be split:
        see kolors_core/performance/row_split.py.
        """
        everyone = RowSplit(Ranks())
        set_coder(unwrap_compiled(self.vae), everyone)
        self.row_split = everyone if group is None else RowSplit(Ranks(group))

    def disable_row_split(self) -> None:
        """Draw images on this process alone."""
        set_coder(unwrap_compiled(self.vae), None)
        self.row_split = None

    def _wrap_rule(self, rule: GuidanceRule) -> GuidanceRule:
        if self.row_split is not None:
            require_unet(self.unet, "a row split")
        for wrapper in (self.row_split, self.step_cache):  # a step cache refuses split rows by name
            rule = rule if wrapper is None else wrapper.wrap_rule(rule)
        return rule

    def _start_offload(self, gpu_id: int | None, device: Device, by_block: bool) -> None:
        if gpu_id is not None and device is not None:
            raise ValueError("give either gpu_id or device, not both")
        name = device if gpu_id is None else f"cuda:{gpu_id}"
        place = named_device(None if name is None else str(name))
        if by_block and place.type != "cpu":
            refuse_compiled(self._models())
            check_blocks(self._models())
        self.to("cpu")
        if place.type == "cpu":
            logger.warning("offload has no effect on a CPU, where all weights are already")
            return
        self.offload.start(place, by_block)
        self._enter_stage()

    def _enter_stage(self, stage: str | None = None) -> None:
        super()._enter_stage(stage)
        self.offload.enter(stage, self._models())

    def _before_move(self, target: torch.device | torch.dtype) -> None:
        if isinstance(target, torch.device):
            self.offload.end()
        if self._wrap_step is not None:
            self._wrap_step.clear()
        self.offload.release()

    def _check_loaded(self) -> None:
        if self.offload.device is None:  # a plan offloads to the meta device
            super()._check_loaded()

    def _compute_device(self, weight: torch.Tensor) -> torch.device:
        return super()._compute_device(weight) if self.offload.device is None else self.offload.device

    def _available_memory(self) -> int | None:
        return available_memory(self.device)

    def _run_text_encoder(self, tokens: TokenBatch) -> TextEmbedding:
        """Return the cached embedding of these tokens, or encode and cache it."""
        savings, encoder = self.savings, unwrap_compiled(self.text_encoder)
        if not savings.cached_prompts and savings.prompt_folder is None:  # no key is made, for nothing
            self.prompt_cache.clear()
            return super()._run_text_encoder(tokens)
        key = Key.of(encoder, tokens)
        if (text := self.prompt_cache.get(key, savings.prompt_folder, encoder, tokens)) is None:
            text = super()._run_text_encoder(tokens)
        self.prompt_cache.put(key, text, savings.cached_prompts, savings.prompt_folder)
        return text

    def _needs_alone(self) -> str | None:
        if self.offload.device is not None:
            return "offload"
        if self.row_split is not None:
            return "a row split"
        has_graphs = self._wrap_step is not None and self._wrap_step.records_on(self.device)
        return "a CUDA graph" if has_graphs else super()._needs_alone()

    def _step_wrapper(self) -> WrapStep | None:
        # Offloaded weights are in other memory in every run: each would record its steps anew.
        return self._wrap_step if self.offload.device is None else None

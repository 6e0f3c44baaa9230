"""Methods of a pipeline for less time or memory: offload, compilation, tiled VAE, and the prompt cache.

Source: the methods of these names in diffusers' pipelines/pipeline_utils.py.
"""

from typing import Any, Self

import torch

from kolors_core.chatglm import TextEmbedding
from kolors_core.devices import named_device, unwrap_compiled
from kolors_core.performance.available_memory import available_memory
from kolors_core.performance.compile import CUDA_GRAPH_MODES, compile_blocks
from kolors_core.performance.cuda_graphs import CUDAGraphCache
from kolors_core.performance.fuse_projections import fuse_projections, keep_fused, unfuse_projections
from kolors_core.performance.fused_kernels import fuse_kernels, unfuse_kernels
from kolors_core.performance.half_precision_vae import (
    HalfPrecisionDecoder,
    disable_half_precision,
    enable_half_precision,
)
from kolors_core.performance.offload import Offload, refuse_compiled
from kolors_core.performance.prompt_cache import Key, PromptCache
from kolors_core.performance.vae_tiling import disable_slicing, disable_tiling, enable_slicing, enable_tiling
from kolors_core.pipelines.base import Components
from kolors_core.tokenizer import TokenBatch
from kolors_core.unet import UNetEncoder

Device = torch.device | str | None


class PerformanceMethods(Components):
    """A pipeline that can offload and compile its models, run its VAE in tiles, and cache prompts."""

    def _init_state(self) -> None:
        super()._init_state()
        self.offload, self.prompt_cache = Offload(), PromptCache()

    def __getstate__(self) -> dict[str, Any]:
        """Return the state of copies and pickles, without cached prompts and captured graphs."""
        return self.__dict__ | {"prompt_cache": PromptCache(), "_wrap_step": None}

    @classmethod
    def from_pipe(cls, pipeline: Components, **changes: Any) -> Self:
        """Create another task with the very same models, offload and cached prompts; see `Components`."""
        pipe = super().from_pipe(pipeline, **changes)
        for name in ("offload", "prompt_cache", "_wrap_step"):
            setattr(pipe, name, getattr(pipeline, name))
        return pipe

    def compile(self, mode: str | None = None, backend: str = "inductor") -> None:
        """Compile the models' blocks when they first run, and again for each new kind of input.

        mode, backend: as for `torch.compile`; "reduce-overhead" and "max-autotune" also make each step one
        CUDA graph, where the UNet is on CUDA. Other image sizes, LoRAs and weights work as before. See
        kolors_core/performance/compile.py; ValueError for an unknown mode.
        """
        nets = [net for net in self._unets() if net is not unwrap_compiled(self.unet)]
        for model in (*self._own_models().values(), *nets):
            compile_blocks(unwrap_compiled(model), mode, backend)
        has_graphs = mode in CUDA_GRAPH_MODES and self.device.type == "cuda"
        self._wrap_step = CUDAGraphCache() if has_graphs else None

    def enable_model_cpu_offload(self, gpu_id: int | None = None, device: Device = None) -> None:
        """Keep on the accelerator only the model that runs: text encoder, CLIP, UNet or VAE.

        The next one is copied meanwhile, if both together are no larger than the largest. All others are on
        the CPU, for CUDA in page-locked memory. `pipe.offload.peak_bytes` is the peak of weights.
        gpu_id: of CUDA; or device; the best there is if both are None; on a machine without an accelerator
        nothing changes. ValueError for a device that is not there.
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

    def enable_fused_kernels(self) -> None:
        """Run GEGLU, LayerNorm and GroupNorm of UNet and ControlNets by fused kernels, channels-last.

        On CUDA with Triton, up to rounding; elsewhere, with gradients and under `compile`, torch's operators
        run. Holds for every pipeline with this UNet. See kolors_core/performance/fused_kernels.py.
        """
        self._enter_stage()
        for net in self._unets():
            fuse_kernels(net)

    def disable_fused_kernels(self) -> None:
        """Run torch's operators again."""
        self._enter_stage()
        for net in self._unets():
            unfuse_kernels(net)

    def fuse_qkv_projections(self) -> None:
        """Compute queries, keys and values of self-attention in one product, in UNet and ControlNets.

        The same up to rounding, in the same memory. Under offload and `compile`, with a LoRA or quantized
        weights the three are computed one by one. See kolors_core/performance/fuse_projections.py.
        """
        self._enter_stage()
        for net in self._unets():
            fuse_projections(net)

    def unfuse_qkv_projections(self) -> None:
        """Compute queries, keys and values one by one again."""
        self._enter_stage()
        for net in self._unets():
            unfuse_projections(net)

    def enable_vae_half_precision(
        self, dtype: torch.dtype | None = None, limit: float = 1.0
    ) -> HalfPrecisionDecoder:
        """Decode in float16 or bfloat16, if the first image stays within `limit` gray levels of float32's.

        Arguments, result and errors as of `half_precision_vae.enable_half_precision`.
        """
        return enable_half_precision(unwrap_compiled(self.vae), dtype, limit)

    def disable_vae_half_precision(self) -> None:
        """Decode in the VAE's own precision."""
        disable_half_precision(unwrap_compiled(self.vae))

    def _unets(self) -> list[UNetEncoder]:
        """Return the UNet and the ControlNets beside it."""
        models = (unwrap_compiled(model) for model in (self.unet, *self._attached_models()))
        return [model for model in models if isinstance(model, UNetEncoder)]

    def _start_offload(self, gpu_id: int | None, device: Device, by_block: bool) -> None:
        if gpu_id is not None and device is not None:
            raise ValueError("give either gpu_id or device, not both")
        name = device if gpu_id is None else f"cuda:{gpu_id}"
        place = named_device(None if name is None else str(name))
        if by_block and place.type != "cpu":
            refuse_compiled(self._models())
        self.to("cpu")
        if place.type != "cpu":
            self.offload.start(place, by_block)
            self._enter_stage()

    def _enter_stage(self, stage: str | None = None) -> None:
        super()._enter_stage(stage)
        self.offload.enter(stage, self._models())
        if stage == "unet" and self.offload.device is None:
            for net in self._unets():
                keep_fused(net)

    def _before_move(self, target: torch.device | torch.dtype) -> None:
        if isinstance(target, torch.device):
            self.offload.end()
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
        key = Key.of(encoder, tokens)
        if (text := self.prompt_cache.get(key, savings.prompt_folder, encoder, tokens)) is None:
            text = super()._run_text_encoder(tokens)
        self.prompt_cache.put(key, text, savings.cached_prompts, savings.prompt_folder)
        return text

    def _needs_alone(self) -> str | None:
        if self.offload.device is not None:
            return "offload"
        return super()._needs_alone() if self._wrap_step is None else "a CUDA graph"

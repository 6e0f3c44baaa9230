"""What every task shares: its models, loaded, saved, shared with another task, and moved between devices."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from kolors_core.adapters.clip_vision import IMAGE_ENCODER, CLIPVision
from kolors_core.adapters.controlnet import ControlNet, as_list, check_fits
from kolors_core.adapters.ip_adapter import attached
from kolors_core.chatglm import ChatGLM
from kolors_core.checkpoint import (
    EMBEDDED_NAME,
    KINDS,
    Opened,
    check_savable,
    load_index,
    load_scheduler,
    open_component,
    resolve,
    save_component,
    save_frame,
)
from kolors_core.devices import (
    Dtypes,
    dtype_of,
    loading_device,
    move,
    named_device,
    one_dtype,
    plain,
    refuse_pickles,
    refuse_second_copy,
)
from kolors_core.guidance import guided
from kolors_core.module import WrapStep
from kolors_core.performance.compile import GRAPHED, compile_blocks
from kolors_core.performance.cuda_graphs import CUDAGraphCache
from kolors_core.performance.offload import Offload, refuse_compiled
from kolors_core.performance.prompt_cache import PromptCache
from kolors_core.pipelines.fitting import must_fit, refuse_stranger
from kolors_core.pipelines.running import RunState
from kolors_core.precompute import Savings
from kolors_core.sampling import Denoise, Sampler
from kolors_core.schedule import Scheduler
from kolors_core.tokenizer import Tokenizer
from kolors_core.unet import UNet
from kolors_core.vae import VAE
from kolors_core.validation import path_of
from weights_convert.atomic_write import new_folder

MODELS = KINDS | {"image_encoder": IMAGE_ENCODER}  # all models of a pipeline's checkpoint
_LOAD: Any = object()  # a component that is to be loaded from the checkpoint; None is a component left out


class Components(RunState):
    """The models of a pipeline. Each is a plain attribute and may be replaced."""

    repaints: ClassVar[bool] = False  # whether the UNet may read a mask and the masked picture's latents too

    def __init__(
        self,
        vae: VAE,
        text_encoder: ChatGLM | None,
        tokenizer: Tokenizer | None,
        unet: UNet,
        scheduler: Scheduler,
        image_encoder: CLIPVision | None = None,
        feature_extractor: Callable[..., Any] | None = None,
        force_zeros_for_empty_prompt: bool = False,
        controlnet: ControlNet | Sequence[ControlNet] | None = None,
    ) -> None:
        """image_encoder: only IP-Adapters need it. feature_extractor: None is CLIP's own preprocessing.
        controlnet: one or several, each of which then needs a control image.

        Raises TypeError or ValueError, naming the component, for what is of another kind or size.
        """
        super().__init__()
        self.controlnet = controlnet
        self.vae, self.text_encoder, self.tokenizer, self.unet = vae, text_encoder, tokenizer, unet
        self.scheduler, self.feature_extractor = scheduler, feature_extractor
        self.image_encoder = image_encoder
        must_fit(vae, text_encoder, tokenizer, unet, self.repaints)
        check_fits(controlnet, plain(unet), plain(vae).config.downscale)
        self.force_zeros_for_empty_prompt = force_zeros_for_empty_prompt
        self.offload = Offload()
        self.savings = Savings()
        self.guided: Callable[..., Denoise] = guided  # another rule of its signature may stand here
        self.sampler: Sampler | None = None  # another than the scheduler's, such as a function like `euler`
        self.pag_applied_layers = ["mid"]  # of `KolorsPAGPipeline`; another task keeps them for it
        self._wrap_step: WrapStep | None = None  # CUDA graphs, if `compile` was asked for them
        self.prompt_cache = PromptCache()

    def __setattr__(self, name: str, value: Any) -> None:
        """TypeError naming what came, for a component of another kind than the constructor takes."""
        refuse_stranger(name, value)
        super().__setattr__(name, value)

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: whose prompts and recorded graphs are not kept."""
        return self.__dict__ | {"prompt_cache": PromptCache(), "_wrap_step": None}

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path = EMBEDDED_NAME,
        *,
        torch_dtype: Dtypes = None,
        dtype: Dtypes = None,
        device: torch.device | str = "cpu",
        variant: str | None = None,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        token: str | bool | None = None,
        use_safetensors: bool | None = None,
        low_cpu_mem_usage: bool = True,
        text_encoder: ChatGLM | None = _LOAD,
        tokenizer: Tokenizer | None = _LOAD,
        unet: UNet = _LOAD,
        vae: VAE = _LOAD,
        scheduler: Scheduler = _LOAD,
        image_encoder: CLIPVision | None = _LOAD,
        feature_extractor: Callable[..., Any] | None = None,
        controlnet: ControlNet | Sequence[ControlNet] | None = None,
    ) -> Self:
        """Load a checkpoint folder or hub repository; the embedded tiny model if none is named.

        torch_dtype, or by its newer name dtype: one, or a mapping by component with a "default"; float32 if
        None, and the VAE is never float16. variant: such as "fp16"; None takes the only one there is. device:
        where each tensor goes straight from its file; "meta" reads and fetches no weights and no tokenizer,
        for a pipeline that can be planned (`plan`). A component passed in is used as it is and its files are
        not fetched. Raises FileNotFoundError or ValueError naming the file, field or tensor.
        """
        refuse_pickles(use_safetensors)
        refuse_second_copy(low_cpu_mem_usage)
        asked = one_dtype(torch_dtype, dtype)
        parts = {
            "text_encoder": text_encoder, "tokenizer": tokenizer, "unet": unet, "vae": vae,
            "scheduler": scheduler, "image_encoder": image_encoder,
        }  # fmt: skip
        dtypes = {component: dtype_of(component, asked) for component in MODELS}
        wanted = [component for component, value in parts.items() if value is _LOAD]
        device = loading_device(device)
        has_weights = device.type != "meta"
        folder = resolve(
            pretrained_model_name_or_path, wanted, variant, has_weights, revision=revision,
            cache_dir=cache_dir, local_files_only=local_files_only, token=token,
        )  # fmt: skip
        force_zeros, absent = load_index(folder)
        for component in wanted:
            if component in absent or (component == "tokenizer" and not has_weights):
                parts[component] = None
            elif component == "tokenizer":
                parts[component] = Tokenizer(folder / "tokenizer")
            elif component == "scheduler":
                parts[component] = load_scheduler(folder)
            else:
                parts[component] = open_component(
                    folder, component, variant=variant, has_weights=has_weights, kind=MODELS[component]
                )
        for component, part in parts.items():  # all fit: only now are weights read
            if isinstance(part, Opened):
                parts[component] = part.fill(dtypes[component], device)
        return cls(
            **parts, feature_extractor=feature_extractor, controlnet=controlnet,
            force_zeros_for_empty_prompt=force_zeros,
        )  # fmt: skip

    @classmethod
    def from_pipe(cls, pipeline: "Components", **changes: Any) -> Self:
        """Another task with the very same models, adapters included; changes: components to replace.

        Loading or unloading an adapter in one of them is seen by both, and so is offload.
        """
        if not isinstance(pipeline, Components):
            raise TypeError(f"wanted a pipeline of kolors_core, got {type(pipeline).__name__}")
        if strangers := sorted(changes.keys() - pipeline.components.keys()):
            raise TypeError(f"{strangers[0]!r} is no component; wanted {', '.join(pipeline.components)}")
        changes = {"image_encoder": pipeline._image_encoder} | changes  # not one that an IP-Adapter brought
        made = cls(**pipeline.components | changes)
        made.offload, made._progress = pipeline.offload, pipeline._progress
        made.savings, made.prompt_cache = pipeline.savings, pipeline.prompt_cache
        made.guided, made.sampler = pipeline.guided, pipeline.sampler
        made.pag_applied_layers, made._wrap_step = pipeline.pag_applied_layers, pipeline._wrap_step
        return made

    def save_pretrained(self, folder: str | Path, *, variant: str | None = None) -> None:
        """Write a new folder that the reference and `from_pretrained` load, whole or not at all.

        ControlNets and loaded IP-Adapters and LoRAs are not part of it; a fused LoRA is, in the weights.

        Raises FileExistsError if `folder` is there already and not empty, ValueError if a model is left out
        or quantised.
        """
        if self.text_encoder is None or self.tokenizer is None:
            raise ValueError("this pipeline has no text encoder or tokenizer and cannot be saved whole")
        models = {name: plain(model) for name, model in self._own_models().items()}
        for component, model in models.items():
            check_savable(model, component)
        with new_folder(path_of("folder", folder)) as place:
            for component, model in models.items():
                save_component(model, place, component, variant=variant)
            task = type(self).__name__.replace("ControlNet", "")  # which the reference has a name for
            save_frame(place, task, self.components)

    def to(
        self,
        *targets: torch.device | str | torch.dtype,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """Move every model to a device, a dtype, or both; a VAE asked for in float16 takes float32.

        A device ends offload. If there is no room, all models are where they were. Raises ValueError for a
        device that is not there, TypeError for what is no floating dtype; nothing is moved then.
        """
        asked: list[torch.device | torch.dtype] = []
        for target in (*targets, device, dtype):  # all are checked before anything is moved
            if isinstance(target, torch.dtype):
                dtype_of("unet", target)
                asked.append(target)
            elif target is not None:
                asked.append(named_device(str(target)))
        for target in asked:
            if isinstance(target, torch.device):
                self._need_weights()
                self.offload.end()
            self.offload.release()
            move(
                (model, dtype_of(name, target) if isinstance(target, torch.dtype) else target)
                for name, models in self._models().items()
                for model in models
            )
        return self

    def compile(self, mode: str | None = None, backend: str = "inductor") -> None:
        """Compile the models' blocks when they first run, and again where a new kind of input comes.

        mode, backend: as for `torch.compile`; "reduce-overhead" and "max-autotune" also make each step one
        CUDA graph, where the UNet is on CUDA. Other picture sizes, LoRAs and weights go on working. See
        kolors_core/performance/compile.py; ValueError for an unknown mode.
        """
        for model in (*self._own_models().values(), *as_list(self.controlnet)):
            compile_blocks(plain(model), mode, backend)
        self._wrap_step = CUDAGraphCache() if mode in GRAPHED and self.device.type == "cuda" else None

    def enable_model_cpu_offload(
        self, gpu_id: int | None = None, device: torch.device | str | None = None
    ) -> None:
        """Keep on the accelerator only the model that is at work: text encoder, CLIP, UNet or VAE.

        The next one is brought while it works, if both together are no larger than the largest. All others
        are on the CPU, on CUDA in page-locked memory. `pipe.offload.peak_bytes` tells what weights took.
        gpu_id: of CUDA; or device; the best there is if both are None. On a machine without an accelerator
        nothing changes. ValueError for a device that is not there.
        """
        self._start_offload(gpu_id, device, by_block=False)

    def enable_sequential_cpu_offload(
        self, gpu_id: int | None = None, device: torch.device | str | None = None
    ) -> None:
        """Keep on the accelerator only the block at work and the next one, which is brought meanwhile.

        The least memory, and every step waits for the UNet's weights. A module that has parameters of its own
        comes as one with all below it. Arguments and errors as in `enable_model_cpu_offload`; ValueError also
        for a compiled model.
        """
        self._start_offload(gpu_id, device, by_block=True)

    def remove_all_hooks(self) -> None:
        """End offload, if it is on: the models are on the CPU then."""
        if self.offload.device is not None:
            self.to("cpu")

    def enable_vae_tiling(self, *, tile_sample_min_size: int | None = None) -> None:
        """Let the VAE work on a picture in pieces: a fifth of the memory at 1024 x 1024, the same picture.

        Seen by every pipeline that has this VAE. Arguments and errors: see `Tiles.enable_tiling` in
        kolors_core/performance/vae_tiling.py.
        """
        plain(self.vae).enable_tiling(tile_sample_min_size=tile_sample_min_size)

    def disable_vae_tiling(self) -> None:
        """Let the VAE work on pictures whole."""
        plain(self.vae).disable_tiling()

    def enable_vae_slicing(self) -> None:
        """Let the VAE work on one picture of a batch after another."""
        plain(self.vae).enable_slicing()

    def disable_vae_slicing(self) -> None:
        """Let the VAE work on all pictures of a batch at once."""
        plain(self.vae).disable_slicing()

    def _start_offload(self, gpu_id: int | None, device: torch.device | str | None, by_block: bool) -> None:
        if gpu_id is not None and device is not None:
            raise ValueError("give either gpu_id or device, not both")
        name = device if gpu_id is None else f"cuda:{gpu_id}"
        place = named_device(None if name is None else str(name))
        if by_block and place.type != "cpu":
            refuse_compiled(self._models())
        self.to("cpu")
        if place.type != "cpu":
            self.offload.start(place, by_block)
            self._on_device()

    def _own_models(self) -> dict[str, Any]:
        """The models that there are, by component."""
        return {name: getattr(self, name) for name in MODELS if getattr(self, name) is not None}

    def _models(self) -> dict[str, list[nn.Module]]:
        """What moves together, by the component that it works for."""
        adapters = [handle.adapter for handle in attached(self.unet)]
        models = {name: [model] for name, model in self._own_models().items()}
        return models | {"unet": [self.unet, *adapters, *as_list(self.controlnet)]}

    def _on_device(self, stage: str | None = None) -> None:
        """Under offload, say which model works now, by its component; None when the run is over."""
        self._need_weights()
        self.offload.enter(stage, self._models())

    def _need_weights(self) -> None:
        """ValueError on the meta device, unless work is sent there (plan.py)."""
        if self.offload.device is None and self.unet.conv_in.weight.is_meta:
            raise ValueError("this pipeline's weights are not loaded (device='meta'): it can only be planned")

    def _works_on(self, weight: Tensor) -> torch.device:
        """Where the model works that has this weight: where that is, or under offload the accelerator."""
        return weight.device if self.offload.device is None else self.offload.device

    def _input_for(self, weight: Tensor, tensor: Tensor) -> Tensor:
        """A tensor where the model with this weight works, in its precision."""
        return tensor.to(self._works_on(weight), weight.dtype)

    @property
    def image_encoder(self) -> CLIPVision | None:
        """The pipeline's own, or else the one that came with an IP-Adapter and leaves with it."""
        brought = (handle.encoder for handle in attached(self.unet) if handle.encoder is not None)
        return next(brought, None) if self._image_encoder is None else self._image_encoder

    @image_encoder.setter
    def image_encoder(self, encoder: CLIPVision | None) -> None:
        self._image_encoder = encoder

    @property
    def device(self) -> torch.device:
        """Where the UNet works."""
        return self._works_on(self.unet.conv_in.weight)

    @property
    def dtype(self) -> torch.dtype:
        """What the UNet computes in."""
        return self.unet.conv_in.weight.dtype

    @property
    def components(self) -> dict[str, Any]:
        """What the constructor takes, to build another pipeline that shares it."""
        names = (*MODELS, "controlnet", "tokenizer", "scheduler", "feature_extractor")
        return {name: getattr(self, name) for name in (*names, "force_zeros_for_empty_prompt")}

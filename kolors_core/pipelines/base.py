"""What every task shares: its models, loaded, saved, shared with another task, and moved between devices."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from kolors_core.adapters.clip_vision import IMAGE_ENCODER, CLIPVision
from kolors_core.adapters.controlnet import ControlNet, check_fits, controlnets_of
from kolors_core.adapters.ip_adapter import attached
from kolors_core.chatglm import ChatGLM, TextEmbedding
from kolors_core.checkpoint import (
    EMBEDDED_NAME,
    MODEL_SPECS,
    UnloadedModel,
    check_savable,
    load_index,
    load_scheduler,
    open_component,
    resolve,
    save_component,
    save_metadata,
)
from kolors_core.devices import (
    Dtypes,
    check_low_cpu_mem_usage,
    dtype_of,
    loading_device,
    merge_dtype_arguments,
    move,
    named_device,
    plain,
    refuse_pickles,
)
from kolors_core.guidance import guided
from kolors_core.pipelines.component_checks import check_component_type, check_dimensions
from kolors_core.pipelines.runs import Interrupt, Runs
from kolors_core.precompute import Savings
from kolors_core.sampling import Denoise, Sampler
from kolors_core.schedule import Scheduler
from kolors_core.tokenizer import TokenBatch, Tokenizer
from kolors_core.unet import UNet
from kolors_core.vae import VAE
from kolors_core.validation import as_path
from weights_convert.atomic_write import atomic_folder

MODELS = MODEL_SPECS | {"image_encoder": IMAGE_ENCODER}  # all models of a pipeline's checkpoint
_LOAD: Any = object()  # a component that is to be loaded from the checkpoint; None is a component left out


class Components:
    """The models of a pipeline. Each is a plain attribute and may be replaced."""

    accepts_mask_channels: ClassVar[bool] = False  # whether the UNet may read a mask and masked latents too

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
        self.runs, self._progress = Runs(), dict[str, Any]()
        self.controlnet = controlnet
        self.vae, self.text_encoder, self.tokenizer, self.unet = vae, text_encoder, tokenizer, unet
        self.scheduler, self.feature_extractor = scheduler, feature_extractor
        self.image_encoder = image_encoder
        check_dimensions(vae, text_encoder, tokenizer, unet, self.accepts_mask_channels)
        check_fits(controlnet, plain(unet), plain(vae).config.vae_scale_factor)
        self.force_zeros_for_empty_prompt = force_zeros_for_empty_prompt
        self.savings = Savings()
        self.guided: Callable[..., Denoise] = guided  # another rule of its signature may stand here
        self.sampler: Sampler | None = None  # another than the scheduler's, such as a function like `euler`
        self.pag_applied_layers = ["mid"]  # of `KolorsPAGPipeline`; another task keeps them for it
        self._init_state()

    def _init_state(self) -> None:
        """Set the attributes of methods in other files, such as performance_methods.py; none here."""

    def __setattr__(self, name: str, value: Any) -> None:
        """TypeError naming what came, for a component of another kind than the constructor takes."""
        check_component_type(name, value)
        super().__setattr__(name, value)

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
        for a pipeline that can be planned (memory_plan.py). A component passed in is used as it is and its
        files are not fetched. Raises FileNotFoundError or ValueError naming the file, field or tensor.
        """
        refuse_pickles(use_safetensors)
        check_low_cpu_mem_usage(low_cpu_mem_usage)
        asked = merge_dtype_arguments(torch_dtype, dtype)
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
            if isinstance(part, UnloadedModel):
                parts[component] = part.fill(dtypes[component], device)
        return cls(
            **parts, feature_extractor=feature_extractor, controlnet=controlnet,
            force_zeros_for_empty_prompt=force_zeros,
        )  # fmt: skip

    @classmethod
    def from_pipe(cls, pipeline: "Components", **changes: Any) -> Self:
        """Another task with the very same models, adapters included; changes: components to replace.

        Loading or unloading an adapter in one of them is seen by both.
        """
        if not isinstance(pipeline, Components):
            raise TypeError(f"expected a pipeline of kolors_core, got {type(pipeline).__name__}")
        if strangers := sorted(changes.keys() - pipeline.components.keys()):
            raise TypeError(f"{strangers[0]!r} is no component; expected {', '.join(pipeline.components)}")
        changes = {"image_encoder": pipeline._image_encoder} | changes  # not one that an IP-Adapter brought
        made = cls(**pipeline.components | changes)
        made.runs, made._progress, made.savings = pipeline.runs, pipeline._progress, pipeline.savings
        made.guided, made.sampler = pipeline.guided, pipeline.sampler
        made.pag_applied_layers = pipeline.pag_applied_layers
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
        with atomic_folder(as_path("folder", folder)) as place:
            for component, model in models.items():
                save_component(model, place, component, variant=variant)
            task = type(self).__name__.replace("ControlNet", "")  # which the reference has a name for
            save_metadata(place, task, self.components)

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
                self._check_loaded()
            self._before_move(target)
            move(
                (model, dtype_of(name, target) if isinstance(target, torch.dtype) else target)
                for name, models in self._models().items()
                for model in models
            )
        return self

    def _own_models(self) -> dict[str, Any]:
        """The models that there are, by component."""
        return {name: getattr(self, name) for name in MODELS if getattr(self, name) is not None}

    def _models(self) -> dict[str, list[nn.Module]]:
        """What moves together, by the component that it works for."""
        adapters = [handle.adapter for handle in attached(self.unet)]
        models = {name: [model] for name, model in self._own_models().items()}
        return models | {"unet": [self.unet, *adapters, *controlnets_of(self.controlnet)]}

    def _enter_stage(self, stage: str | None = None) -> None:
        """Prepare the models of the stage that runs now, by its component; None at the end of a run.

        Here all models stay where they are; under offload (performance_methods.py) they come and go.
        """
        self._check_loaded()

    def _before_move(self, target: torch.device | torch.dtype) -> None:
        """Prepare for models that move to a device or dtype; nothing to do here."""

    def _check_loaded(self) -> None:
        """Raise ValueError on the meta device."""
        if self.unet.conv_in.weight.is_meta:
            raise ValueError("this pipeline's weights are not loaded (device='meta'): it can only be planned")

    def _compute_device(self, weight: Tensor) -> torch.device:
        """Return the device on which the model with this weight runs."""
        return weight.device

    def _run_text_encoder(self, tokens: TokenBatch) -> TextEmbedding:
        """Encode tokens where the text encoder runs."""
        encoder: Any = self.text_encoder
        self._enter_stage("text_encoder")
        return encoder(tokens.to(self._compute_device(plain(encoder).embedding.weight)))

    def _to_model(self, weight: Tensor, tensor: Tensor) -> Tensor:
        """A tensor where the model with this weight works, in its precision."""
        return tensor.to(self._compute_device(weight), weight.dtype)

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
        return self._compute_device(self.unet.conv_in.weight)

    @property
    def dtype(self) -> torch.dtype:
        """What the UNet computes in."""
        return self.unet.conv_in.weight.dtype

    @property
    def components(self) -> dict[str, Any]:
        """What the constructor takes, to build another pipeline that shares it."""
        names = (*MODELS, "controlnet", "tokenizer", "scheduler", "feature_extractor")
        return {name: getattr(self, name) for name in (*names, "force_zeros_for_empty_prompt")}

    @property
    def guidance_scale(self) -> float:
        """Guidance scale of this thread's call, or else of the last one."""
        return self.runs.current().guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether that call computes the negative half."""
        return self.guidance_scale > 1

    @property
    def num_timesteps(self) -> int:
        """Steps of that call."""
        return self.runs.current().num_timesteps

    @property
    def interrupt(self) -> Interrupt:
        """Call it to end a call after its step, from a callback or another thread: the images are decoded as
        they are by then. As a truth value, whether that was asked for since the call began.
        """
        return Interrupt(self.runs)

    @property
    def _interrupt(self) -> bool:
        return bool(self.interrupt)

    @_interrupt.setter
    def _interrupt(self, is_asked: bool) -> None:  # as the reference's callbacks do
        self.runs.interrupt(is_asked)

    @property
    def _guidance_scale(self) -> float:
        return self.guidance_scale

    @_guidance_scale.setter
    def _guidance_scale(self, scale: float) -> None:  # as the reference's callbacks do
        self.runs.current().guidance_scale = scale

    def set_progress_bar_config(self, **options: Any) -> None:
        """Set options of tqdm's bar, such as `disable=True`."""
        self._progress = options

    def _progress_bar(self, total: int) -> Any:
        from tqdm.auto import tqdm

        return tqdm(total=total, **self._progress)

    def _needs_alone(self) -> str | None:
        """Return what a call uses that calls in other threads must not use meanwhile; None if nothing."""
        return None

"""Components of a pipeline: its models, loaded, saved, shared with another task, and moved between devices.

Private methods that do nothing here are extended in adapter_methods.py and performance_methods.py.
"""

import logging
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self, cast

import torch
from torch import Tensor, nn

from kolors_core import checkpoint, devices
from kolors_core.chatglm import ChatGLM, TextEmbedding
from kolors_core.checkpoint import EMBEDDED_NAME, MODEL_SPECS, ModelSpec
from kolors_core.conditioning import Residuals, encode
from kolors_core.context import ImagePrompt
from kolors_core.devices import Dtypes, dtype_of, unwrap_compiled
from kolors_core.guidance import GuidanceRule, guided
from kolors_core.hub import hub_commit
from kolors_core.image import Size
from kolors_core.module import WrapStep, first_weight
from kolors_core.pipelines.component_checks import check_component_type, check_dimensions, check_target
from kolors_core.pipelines.pipeline_repr import describe, describe_html
from kolors_core.pipelines.runs import Interrupt, Runs
from kolors_core.precompute import Savings
from kolors_core.readable import check_describable
from kolors_core.registry import SELF_DESCRIBED
from kolors_core.sampling import Denoiser, Sampler
from kolors_core.schedule import Scheduler
from kolors_core.tokenizer import TokenBatch, Tokenizer
from kolors_core.unet import UNet
from kolors_core.vae import VAE
from kolors_core.validation import as_path, check_safe_serialization
from weights_convert.atomic_write import atomic_folder

logger = logging.getLogger("kolors_core")
_LOAD: Any = object()  # a component that is to be loaded from the checkpoint; None is a component left out


class AdapterInputs(NamedTuple):
    """Inputs of the UNet that adapters make of a call's arguments: for positive and negative rows."""

    image_prompts: tuple[ImagePrompt, ...] = ()
    negative_image_prompts: tuple[ImagePrompt, ...] = ()
    residuals: Residuals | None = None


class Components:
    """Models of a pipeline. Each is a plain attribute and may be replaced."""

    model_specs: ClassVar[Mapping[str, ModelSpec]] = MODEL_SPECS  # of the models that a checkpoint may have
    tokenizer_class: ClassVar[type[Tokenizer]] = Tokenizer
    accepts_mask_channels: ClassVar[bool] = False  # whether the UNet may read a mask and masked latents too
    _repr_html_ = describe_html  # in notebooks
    # How models and files become each other; with performance/, quantized ones too.
    _open_component: ClassVar[Callable[..., Any]] = staticmethod(checkpoint.open_component)
    _save_component: ClassVar[Callable[..., Any]] = staticmethod(checkpoint.save_component)
    _check_savable: ClassVar[Callable[..., Any]] = staticmethod(checkpoint.check_savable)

    def __init__(
        self, vae: VAE | None, text_encoder: ChatGLM | None, tokenizer: Tokenizer | None, unet: UNet | None,
        scheduler: Scheduler | None, image_encoder: Any = None,
        feature_extractor: Callable[..., Any] | None = None, force_zeros_for_empty_prompt: bool = False,
        controlnet: Any = None,
    ) -> None:  # fmt: skip
        """vae, unet, scheduler: None for a pipeline that only encodes prompts. image_encoder: a `CLIPVision`,
        which only IP-Adapters need. feature_extractor: CLIP's own preprocessing if None. controlnet: a
        `ControlNet` or a list; each needs a control image in every call.

        Raises TypeError or ValueError, naming the component, for a component of another type or size.
        """
        self.runs, self.savings, self._progress = Runs(), Savings(), dict[str, Any]()
        self.text_encoder, self.tokenizer, self.feature_extractor = text_encoder, tokenizer, feature_extractor
        self.vae, self.unet, self.scheduler = cast(VAE, vae), cast(UNet, unet), cast(Scheduler, scheduler)
        self.image_encoder, self.controlnet = image_encoder, controlnet
        self.name_or_path = ""  # of the checkpoint that it was loaded from
        self.revision: str | None = None  # the hub's commit of it
        self.variant: str | None = None  # of its weight files, where one was named
        self._check_dimensions()
        self.force_zeros_for_empty_prompt = force_zeros_for_empty_prompt
        self.guided: Callable[..., Denoiser] = guided  # another rule of its signature may stand here
        self.sampler: Sampler | None = None  # another than the scheduler's, such as a function like `euler`
        self.pag_applied_layers = ["mid"]  # of `KolorsPAGPipeline`; another task keeps them for it
        self._init_state()

    def _init_state(self) -> None:
        """Set attributes that other files' methods need."""

    def _check_dimensions(self) -> None:
        check_dimensions(self.vae, self.text_encoder, self.tokenizer, self.unet, self.accepts_mask_channels)

    def __repr__(self) -> str:
        return describe(self)

    def __setattr__(self, name: str, value: Any) -> None:
        check_component_type(name, value)
        super().__setattr__(name, value)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path = EMBEDDED_NAME, *, torch_dtype: Dtypes = None,
        dtype: Dtypes = None, device: torch.device | str = "cpu", variant: str | None = None,
        revision: str | None = None, cache_dir: str | Path | None = None, local_files_only: bool = False,
        token: str | bool | None = None, force_download: bool = False, text_encoder: ChatGLM | None = _LOAD,
        tokenizer: Tokenizer | None = _LOAD, unet: UNet | None = _LOAD, vae: VAE | None = _LOAD,
        scheduler: Scheduler | None = _LOAD, image_encoder: Any = _LOAD,
        feature_extractor: Callable[..., Any] | None = None, controlnet: Any = None,
        quantization: Mapping[str, Any] | None = None, progress: Callable[..., object] | None = None,
    ) -> Self:  # fmt: skip
        """Load a checkpoint folder or hub repository; the embedded tiny model if none is named.

        torch_dtype, or by its newer name dtype: one, or a mapping by component with a "default"; float32 if
        None, and the VAE is never float16. variant: such as "fp16"; None takes the only one there is. device:
        the device that tensors are read to; "meta" fetches and reads no weights and no tokenizer, for a
        pipeline whose memory is planned (memory_plan.py). The files of a component that is passed in, or is
        None, are not fetched. force_download: fetch again what the cache has. quantization: the formats of
        performance/quantize.py in which models are quantized while they are read, such as
        {"text_encoder": 8, "unet": "fp8"}. progress: called as progress(component, layers done, all) after
        each quantized layer. Raises FileNotFoundError or ValueError naming the file, field or tensor.
        """
        asked = devices.merge_dtype_arguments(torch_dtype, dtype)
        parts: dict[str, Any] = {
            "text_encoder": text_encoder, "tokenizer": tokenizer, "unet": unet, "vae": vae,
            "scheduler": scheduler, "image_encoder": image_encoder,
        }  # fmt: skip
        if "image_encoder" not in cls.model_specs and image_encoder is _LOAD:
            parts["image_encoder"] = None
        dtypes = {component: dtype_of(component, asked) for component in cls.model_specs}
        wanted = [component for component, value in parts.items() if value is _LOAD]
        device = devices.loading_device(device)
        has_weights = device.type != "meta"
        folder = checkpoint.resolve(
            pretrained_model_name_or_path, wanted, variant, has_weights, revision=revision,
            cache_dir=cache_dir, local_files_only=local_files_only, token=token,
            force_download=force_download,
        )  # fmt: skip
        force_zeros, absent = checkpoint.load_index(folder)
        for component in wanted:
            if component in absent or (component == "tokenizer" and not has_weights):
                parts[component] = None
            elif component == "tokenizer":
                parts[component] = checkpoint.load_tokenizer(folder, cls.tokenizer_class)
            elif component == "scheduler":
                parts[component] = checkpoint.load_scheduler(folder)
            else:
                named = checkpoint.spec_named_in(folder / component, component)
                spec = cls.model_specs[component] if named is None else named
                parts[component] = cls._open_component(
                    folder, component, variant=variant, has_weights=has_weights, kind=spec
                )
        parts |= cls._quantized_on_read(parts, quantization or {}, progress)
        for component, part in parts.items():  # all fit: only now are weights read
            if isinstance(part, checkpoint.UnloadedModel):
                parts[component] = part.fill(dtypes[component], device)
        pipe = cls(
            **parts, feature_extractor=feature_extractor, controlnet=controlnet,
            force_zeros_for_empty_prompt=force_zeros,
        )  # fmt: skip
        pipe.name_or_path = str(pretrained_model_name_or_path)
        pipe.revision, pipe.variant = hub_commit(folder), variant
        return pipe

    @classmethod
    def from_pipe(cls, pipeline: "Components", **changes: Any) -> Self:
        """Create another task with the same models and adapters; changes: components to replace."""
        if not isinstance(pipeline, Components):
            raise TypeError(f"expected a pipeline of kolors_core, got {type(pipeline).__name__}")
        if strangers := sorted(changes.keys() - pipeline.components.keys()):
            raise TypeError(f"{strangers[0]!r} is no component; expected {', '.join(pipeline.components)}")
        changes = {"image_encoder": pipeline._image_encoder} | changes  # not one that an IP-Adapter brought
        pipe = cls(**pipeline.components | changes)
        names = ("runs", "_progress", "savings", "guided", "sampler", "pag_applied_layers")
        for name in (*names, "name_or_path", "revision", "variant"):
            setattr(pipe, name, getattr(pipeline, name))
        return pipe

    def save_pretrained(
        self, save_directory: str | Path, safe_serialization: bool = True, variant: str | None = None,
        max_shard_size: int | str | None = None,
    ) -> None:  # fmt: skip
        """Write a folder that the reference and `from_pretrained` load, whole or not at all.

        Quantized models are for this library alone. Of adapters only a fused LoRA is saved, in the weights.
        max_shard_size: such as "5GB", of each file of weights; one file for each model if None. A folder of a
        saved pipeline and nothing else is replaced. Raises FileExistsError for another folder, ValueError if
        a model is missing.
        """
        check_safe_serialization(safe_serialization)
        folder, needed = as_path("save_directory", save_directory), ("tokenizer", *MODEL_SPECS, "scheduler")
        if absent := next((name for name in needed if getattr(self, name) is None), None):
            raise ValueError(f"this pipeline has no {absent} and cannot be saved whole")
        models = {name: unwrap_compiled(model) for name, model in self._own_models().items()}
        for component, model in models.items():
            self._check_savable(model, component)
        check_target(self.unet, self.scheduler)
        for name, own in {"guided": guided, "sampler": None}.items():
            if getattr(self, name) is not own:
                logger.warning("pipe.%s is a function, and is not saved: set it again after loading", name)
        for component in SELF_DESCRIBED:
            check_describable(component, getattr(self, component))
        with atomic_folder(folder, checkpoint.is_own_folder) as place:
            for component, model in models.items():
                self._save_component(model, place, component, variant=variant, max_shard_size=max_shard_size)
            task = type(self).__name__.replace("ControlNet", "")  # the reference has no such class for Kolors
            checkpoint.save_metadata(place, task, self.components)

    def to(
        self, *targets: torch.device | str | torch.dtype, device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Self:  # fmt: skip
        """Move every model to a device, a dtype, or both; the VAE takes float32 in place of float16.

        A device ends offload. If memory runs out, all models stay where they were. Raises ValueError for a
        device that does not exist, TypeError for a dtype that is not floating; nothing is moved then.
        """
        checked = [  # all of them before anything is moved
            dtype_of("unet", target) if isinstance(target, torch.dtype) else devices.named_device(str(target))
            for target in (*targets, device, dtype)
            if target is not None
        ]
        for target in checked:
            if isinstance(target, torch.device):
                self._check_loaded()
            self._before_move(target)
            devices.move_models(
                (model, dtype_of(name, target) if isinstance(target, torch.dtype) else target)
                for name, models in self._models().items()
                for model in models
            )
        return self

    @classmethod
    def _quantized_on_read(
        cls, parts: Mapping[str, Any], formats: Mapping[str, Any], progress: Callable[..., object] | None
    ) -> dict[str, Any]:
        """Return the models of these formats, by component, quantized when they are filled."""
        if formats:
            raise ValueError("quantization is a feature of kolors_core/performance, which is not here")
        return {}

    def _own_models(self) -> dict[str, Any]:
        """Return the models that are not None, by component."""
        return {name: getattr(self, name) for name in self.model_specs if getattr(self, name) is not None}

    def _models(self) -> dict[str, list[nn.Module]]:
        """Return the models that are moved together, by stage."""
        models = {name: [model] for name, model in self._own_models().items()}
        return models | ({"unet": [self.unet, *self._attached_models()]} if "unet" in models else {})

    def _attached_models(self) -> list[nn.Module]:
        """Return the models that run in the UNet's stage beside it, such as ControlNets."""
        return []

    def _enter_stage(self, stage: str | None = None) -> None:
        """Prepare the models of the stage that runs now, by its component; None at the end of a run."""
        self._check_loaded()

    def _before_move(self, target: torch.device | torch.dtype) -> None:
        """Prepare for moving all models to a device or dtype."""

    def _check_loaded(self) -> None:
        """Raise ValueError on the meta device."""
        if self._weight.is_meta:
            raise ValueError("this pipeline's weights are not loaded (device='meta'): it can only be planned")

    def _check_can_draw(self) -> None:
        """Raise ValueError for a pipeline without UNet, VAE or scheduler."""
        needed = ("unet", "vae", "scheduler")
        if absent := next((name for name in needed if getattr(self, name) is None), None):
            raise ValueError(f"this pipeline has no {absent}: it encodes prompts, and cannot make images")

    @property
    def _weight(self) -> Tensor:
        """A weight of the UNet, whose device and dtype are the pipeline's; without one, of another model."""
        if self.unet is not None:
            return first_weight(self.unet)
        return next((first_weight(model) for model in self._own_models().values()), torch.empty(0))

    def _compute_device(self, weight: Tensor) -> torch.device:
        """Return the device on which the model with this weight runs."""
        return weight.device

    def _run_text_encoder(self, tokens: TokenBatch) -> TextEmbedding:
        encoder: Any = self.text_encoder
        self._enter_stage("text_encoder")
        return encode(encoder, tokens.to(self._compute_device(first_weight(encoder))))

    def _step_wrapper(self) -> WrapStep | None:
        """Return what wraps the steps of a run that begins now, such as CUDA graphs; None for nothing."""
        return None

    def _available_memory(self) -> int | None:
        """Return the bytes that can still be allocated where the models run; None if that is not known."""
        return None

    def _to_model(self, weight: Tensor, tensor: Tensor) -> Tensor:
        """Move a tensor to the device and dtype in which the model with this weight runs."""
        return tensor.to(self._compute_device(weight), weight.dtype)

    def _adapter_inputs(self, inputs: Any, size: Size, batch: int, images_per_prompt: int) -> AdapterInputs:
        """Make the adapters' inputs from a call's `PipelineInputs`, for images of (height, width)."""
        return AdapterInputs()

    def _lora_factor(self, inputs: Any) -> AbstractContextManager[None]:
        """Return a context in which every LoRA is scaled by `cross_attention_kwargs`."""
        return nullcontext()

    def _adapter_metadata(self, residuals: Residuals | None) -> dict[str, Any]:
        """Return the adapters' part of the PNG metadata."""
        return {}

    def _placeholder_words(self) -> dict[str, Any]:
        """Return arguments of the tokenizer for words with learned embeddings."""
        return {}

    @property
    def image_encoder(self) -> Any:
        """The pipeline's own CLIP image encoder, or else that of an IP-Adapter."""
        return self._adapter_image_encoder() if self._image_encoder is None else self._image_encoder

    @image_encoder.setter
    def image_encoder(self, encoder: Any) -> None:
        self._image_encoder = encoder

    def _adapter_image_encoder(self) -> Any:
        """Return the image encoder that was loaded with an IP-Adapter, if there is one."""
        return None

    @property
    def device(self) -> torch.device:
        """The device that the UNet runs on."""
        return self._compute_device(self._weight)

    @property
    def dtype(self) -> torch.dtype:
        """The UNet's dtype."""
        return self._weight.dtype

    @property
    def components(self) -> dict[str, Any]:
        """The constructor's arguments, by name, to build another pipeline that shares them."""
        models = ("text_encoder", "unet", "vae", "image_encoder", "controlnet")
        others = ("tokenizer", "scheduler", "feature_extractor", "force_zeros_for_empty_prompt")
        return {name: getattr(self, name) for name in (*models, *others)}

    @property
    def guidance_scale(self) -> float:
        """The guidance scale of this thread's call, or else of the last one."""
        return self.runs.current().guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether that call computes a negative half."""
        return self.guidance_scale > 1

    @property
    def num_timesteps(self) -> int:
        """The number of steps of that call."""
        return self.runs.current().num_timesteps

    @property
    def interrupt(self) -> Interrupt:
        """A function that ends a call after its step and decodes the images as they are; see `Interrupt`."""
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

    def _wrap_rule(self, rule: GuidanceRule) -> GuidanceRule:
        """Return the rule that a call uses in place of this one."""
        return rule

    def _needs_alone(self) -> str | None:
        """Name what a call uses that two threads cannot share; None if nothing."""
        return None

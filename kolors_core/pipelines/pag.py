"""Text to image with perturbed-attention guidance, under the reference's names.

Other tasks take it as a rule: `pipe.guided = functools.partial(perturbed, pag_scale=3.0)`.
Source: diffusers' pipelines/pag/pipeline_pag_kolors.py.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Self, Unpack

from torch import Tensor

from kolors_core.checkpoint import EMBEDDED_NAME
from kolors_core.guidance import guided
from kolors_core.image import Size
from kolors_core.pipelines.base import Components
from kolors_core.pipelines.denoising_loop import StepCallback
from kolors_core.pipelines.perturbed import Layers, perturbed, perturbed_layers
from kolors_core.pipelines.stages import Extras, KolorsPipelineOutput
from kolors_core.pipelines.text_prompts import MAX_TOKENS, Prompt
from kolors_core.pipelines.text_to_image import KolorsPipeline
from kolors_core.sampling import Generators
from kolors_core.validation import finite_number

_OWN = ("self", "extras", "pag_scale", "pag_adaptive_scale", "__class__")  # locals, but not KolorsPipeline's


class KolorsPAGPipeline(KolorsPipeline):
    """Text to image, away from what the UNet would do without the self-attentions of the layers named."""

    def __init__(self, *parts: Any, pag_applied_layers: Layers = "mid", **named: Any) -> None:
        """parts, named: as for `KolorsPipeline`. pag_applied_layers: as for `set_pag_applied_layers`."""
        super().__init__(*parts, **named)
        self.set_pag_applied_layers(pag_applied_layers)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path = EMBEDDED_NAME,
        *,
        pag_applied_layers: Layers = "mid",
        **options: Any,
    ) -> Self:
        """As `KolorsPipeline.from_pretrained`, and layers as for `set_pag_applied_layers`."""
        made = super().from_pretrained(pretrained_model_name_or_path, **options)
        made.set_pag_applied_layers(pag_applied_layers)
        return made

    @classmethod
    def from_pipe(
        cls, pipeline: Components, *, pag_applied_layers: Layers | None = None, **changes: Any
    ) -> Self:
        """As `KolorsPipeline.from_pipe`; layers None: the other's, or of what that was made from."""
        made = super().from_pipe(pipeline, **changes)
        own = pipeline.pag_applied_layers
        made.set_pag_applied_layers(own if pag_applied_layers is None else pag_applied_layers)
        return made

    def set_pag_applied_layers(self, pag_applied_layers: Layers) -> None:
        """Choose the layers whose self-attention is perturbed; names and errors: see `perturbed_layers`."""
        perturbed_layers(self.unet, pag_applied_layers)
        is_one = isinstance(pag_applied_layers, str)
        self.pag_applied_layers = [pag_applied_layers] if is_one else list(pag_applied_layers)

    def __call__(
        self,
        prompt: Prompt | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        denoising_end: float | None = None,
        guidance_scale: float = 5.0,
        negative_prompt: Prompt | None = None,
        num_images_per_prompt: int = 1,
        eta: float = 0.0,
        generator: Generators = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        negative_pooled_prompt_embeds: Tensor | None = None,
        ip_adapter_image: Any = None,
        ip_adapter_image_embeds: list[Tensor] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        cross_attention_kwargs: Mapping[str, Any] | None = None,
        original_size: Size | None = None,
        crops_coords_top_left: Size = (0, 0),
        target_size: Size | None = None,
        negative_original_size: Size | None = None,
        negative_crops_coords_top_left: Size = (0, 0),
        negative_target_size: Size | None = None,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        pag_scale: float = 3.0,
        pag_adaptive_scale: float = 0.0,
        max_sequence_length: int = MAX_TOKENS,
        **extras: Unpack[Extras],
    ) -> KolorsPipelineOutput | tuple[Any]:
        """Make pictures from prompts.

        pag_scale: how strongly; 0 is `KolorsPipeline`. pag_adaptive_scale: see `perturbed.perturbed`.
        All others are as for `KolorsPipeline`. A callback sees the rows that it sees there.
        Raises ValueError or TypeError as there; also for another rule at `pipe.guided`: only one can be.
        """
        given = {name: value for name, value in locals().items() if name not in _OWN}
        with self._perturbing(pag_scale, pag_adaptive_scale):
            return super().__call__(**given, **extras)

    @contextmanager
    def _perturbing(self, pag_scale: float, pag_adaptive_scale: float) -> Iterator[None]:
        """Within it `perturbed` is the rule, unless pag_scale is 0."""
        if finite_number("pag_scale", pag_scale) == 0:
            if pag_adaptive_scale != 0:
                got = f"got {pag_adaptive_scale}"
                raise ValueError(f"pag_adaptive_scale has no effect with pag_scale 0, {got}")
            yield
            return
        if self.guided is not guided:
            wanted = "a KolorsPipeline with functools.partial(perturbed, ...) at its `guided`"
            raise ValueError(f"pipe.guided is another rule already: for both, take {wanted}")
        self.guided = partial(
            perturbed, pag_scale=pag_scale, pag_adaptive_scale=pag_adaptive_scale,
            pag_applied_layers=self.pag_applied_layers,
        )  # fmt: skip
        try:
            yield
        finally:
            self.guided = guided

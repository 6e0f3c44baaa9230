"""Provenance: an image's metadata, which say all that makes the image again, or that it cannot be known.

Values are printable text: a word, a number, or JSON. `cli/from_png.py` reads them. Given images, tensors and
functions are not kept: an image by its file's name and a hash of its pixels, the others by what they are.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kolors_core.conditioning import Conditioning, is_default_crop
from kolors_core.config import VERSION
from kolors_core.devices import unwrap_compiled
from kolors_core.image import flatten_alpha, to_8_bits
from kolors_core.pipelines.base import Components
from kolors_core.pipelines.fingerprint import fingerprint
from kolors_core.pipelines.png_metadata import as_json, attach_metadata
from kolors_core.pipelines.request import PipelineInputs
from kolors_core.pipelines.seeds import numbers_drawn
from kolors_core.pipelines.text_prompts import MAX_TOKENS

UNKNOWN = "given, and cannot be known from here"
CLIP_IMAGES = ("ip_adapter_image", "face_image")  # whose transparency is white, and ignored elsewhere
IMAGES = (*CLIP_IMAGES, "control_image")
TENSORS = (
    "prompt_embeds", "pooled_prompt_embeds", "negative_prompt_embeds", "negative_pooled_prompt_embeds",
    "prompt_attention_mask", "negative_prompt_attention_mask", "ip_adapter_image_embeds", "face_embeds",
)  # fmt: skip
SIZES = ("original_size", "target_size", "negative_original_size", "negative_target_size")
CROPS = ("crops_coords_top_left", "negative_crops_coords_top_left")


def describe_call(inputs: PipelineInputs, **given: Any) -> dict[str, Any]:
    """Describe a call's arguments, before any noise is drawn; empty unless its images are to be PIL's.

    given: the task's own arguments; None is left out.
    """
    if inputs.output_type != "pil":
        return {}
    values = {name: getattr(inputs, name) for name in (*IMAGES, *TENSORS)} | given
    if given.get("denoising_start") is not None:
        del values["strength"]  # which has no effect then
    facts = {
        name: _describe(value, name in CLIP_IMAGES) for name, value in values.items() if value is not None
    }
    for name in ("timesteps", "sigmas"):
        if (numbers := getattr(inputs, name)) is not None:
            facts[name] = as_json([float(number) for number in numbers])
    given_sizes = {name: size for name in SIZES if (size := getattr(inputs, name)) is not None}
    given_sizes |= {name: crop for name in CROPS if not is_default_crop(crop := getattr(inputs, name))}
    sizes = {name: [_as_number(side) for side in size] for name, size in given_sizes.items()}
    if sizes:
        facts["size_conditions"] = as_json(sizes)
    if inputs.eta:
        facts["eta"] = str(float(inputs.eta))
    if inputs.max_sequence_length != MAX_TOKENS:
        facts["max_sequence_length"] = str(inputs.max_sequence_length)
    if (masks := (inputs.cross_attention_kwargs or {}).get("ip_adapter_masks")) is not None:
        facts["ip_adapter_masks"] = _describe(masks)
    if inputs.callback_on_step_end is not None:
        facts["callback_on_step_end"] = f"{call_text(inputs.callback_on_step_end)}: {UNKNOWN}"
    return facts | {"generators": describe_generators(inputs.generator)}


def describe_generators(generators: Any) -> dict[str, Any] | list[dict[str, Any]] | None:
    """Describe one generator, or each of a list: its seed, and how many numbers were drawn from it before.

    drawn: left out if none were; None if it cannot be known. None for torch's global generator.
    """
    if generators is None:
        return None
    if isinstance(generators, torch.Generator):
        drawn, device = numbers_drawn(generators), generators.device.type
        facts: dict[str, Any] = {"seed": generators.initial_seed()} | ({} if drawn == 0 else {"drawn": drawn})
        return facts | ({} if device == "cpu" else {"device": device})
    if not isinstance(generators, Sequence) or not all(isinstance(g, torch.Generator) for g in generators):
        return None  # an error, which the drawing of noise describes
    listed = [describe_generators(generator) for generator in generators]
    twice = len(set(map(id, generators))) < len(generators)  # each row but the first finds it in use
    return [one | {"drawn": None} if twice else one for one in listed if isinstance(one, dict)]


def describe_images(
    pipe: Components, images: Sequence[Any], inputs: PipelineInputs, facts: Mapping[str, Any],
    positive: Conditioning,
) -> None:  # fmt: skip
    """Attach to each image of a call the metadata that make it again. facts: of `describe_call`."""
    sampler = "" if pipe.sampler is None else f"{call_text(pipe.sampler)} with "
    shared = dict(facts, sampler=f"{sampler}{pipe.scheduler.describe()}", task=type(pipe).__name__)
    generators = shared.pop("generators")
    shared["scheduler"] = as_json(pipe.scheduler.to_public())
    shared["guidance_scale"] = inputs.guidance_scale
    rule = call_text(pipe.guided if inputs.guidance_rule is None else inputs.guidance_rule)
    if rule != "guided":
        shared["guidance"] = rule
    if (cache := getattr(pipe, "step_cache", None)) is not None:
        shared["step_cache"] = cache.describe()
    shared |= pipe._adapter_metadata(positive.residuals)
    factor = (inputs.cross_attention_kwargs or {}).get("scale")
    if factor is not None and "lora" in shared:
        shared["lora_scale"] = float(factor)
    shared |= describe_pipeline(pipe)
    for i, image in enumerate(images):
        own = _texts(inputs, i, len(images)) | _noise(inputs, generators, i, len(images))
        attach_metadata(image, own | {"size": f"{image.width}x{image.height}"} | shared)


def describe_pipeline(pipe: Components) -> dict[str, str]:
    """Describe models and machine: names, fingerprints, dtypes, device, versions."""
    models = {name: unwrap_compiled(model) for name, model in pipe._own_models().items()}
    models.pop("image_encoder", None)  # which only adapters need
    dtypes = {name: _dtype(model) for name, model in models.items()}
    bits = {name: n for name, model in models.items() if (n := _bits(model)) is not None}
    found = {
        "model": pipe.name_or_path or "unknown: no folder or repository was named",
        "revision": pipe.revision,
        "variant": pipe.variant,
        "fingerprint": as_json({name: fingerprint(model) for name, model in models.items()}),
        "bits": as_json(bits) if bits else None,
        "vae_tiling": "on" if getattr(models["vae"].run_coder, "use_tiling", False) else None,
        "dtype": dtypes["unet"] if len(set(dtypes.values())) == 1 else as_json(dtypes),
        "device": pipe.device.type,
        "threads": str(torch.get_num_threads()) if pipe.device.type == "cpu" else None,
        "torch": torch.__version__,
        "software": f"kolors_core {VERSION}",
    }
    return {name: value for name, value in found.items() if value is not None}


def call_text(function: Callable[..., Any]) -> str:
    """Return a function's name, and the arguments that `partial` has bound to it."""
    if not isinstance(function, partial):
        return getattr(function, "__name__", type(function).__name__)
    bound = ", ".join(f"{name}={value!r}" for name, value in function.keywords.items())
    return f"{call_text(function.func)}({bound})"


def pixel_hash(image: Any) -> str:
    """Hash the pixels of a PIL image as RGB, or the numbers of an array or tensor, and their size."""
    if isinstance(image, Tensor):
        image = image.detach().cpu().double().numpy() if image.is_floating_point() else image.cpu().numpy()
    pixels = image if isinstance(image, np.ndarray) else np.asarray(to_8_bits(image).convert("RGB"))
    content = f"{pixels.shape} {pixels.dtype} ".encode() + np.ascontiguousarray(pixels).tobytes()
    return hashlib.sha256(content).hexdigest()[:32]


def _describe(value: Any, is_flattened: bool = False) -> str:
    value = _as_number(value)
    if isinstance(value, bool | int | float | str):
        return str(value)
    if isinstance(value, Real):
        return str(float(value))
    return as_json(_content(value, is_flattened))


def _as_number(value: Any) -> Any:
    """Convert a number of numpy or torch to Python's; return what is none as it is."""
    return value.item() if getattr(value, "ndim", None) == 0 else value


def _content(value: Any, is_flattened: bool) -> Any:
    if isinstance(value, list | tuple):
        return [_content(part, is_flattened) for part in value]
    if isinstance(value, Tensor | np.ndarray):
        kind = "tensor" if isinstance(value, Tensor) else "array"
        return {kind: list(value.shape), "sha256": pixel_hash(value)}
    if hasattr(value, "convert"):  # a PIL image
        file = {"file": str(value.filename)} if getattr(value, "filename", "") else {}
        seen = flatten_alpha(value) if is_flattened else value
        return file | {"size": f"{value.width}x{value.height}", "sha256": pixel_hash(seen)}
    return None if value is None else UNKNOWN


def _texts(inputs: PipelineInputs, i: int, count: int) -> dict[str, str]:
    found = {}
    for name in ("prompt", "negative_prompt"):
        if (texts := getattr(inputs, name)) is not None:
            found[name] = texts if isinstance(texts, str) else texts[i * len(texts) // count]
    return found


def _noise(inputs: PipelineInputs, generators: Any, i: int, count: int) -> dict[str, Any]:
    """Describe an image's noise: its seed, where the seed alone makes it, and the batch that it is one of."""
    is_shared = not isinstance(generators, list)
    own = generators if is_shared else generators[i]
    if own is None:
        return {"noise": "of torch's global generator, whose state cannot be known"}
    found: dict[str, Any] = {"noise_device": own["device"]} if "device" in own else {}
    if is_new := own.get("drawn", 0) == 0:
        found["batch_seed" if is_shared and count > 1 else "seed"] = own["seed"]
    else:
        drawn = "some" if own["drawn"] is None else own["drawn"]
        found["noise"] = f"of a generator in use: {drawn} numbers had been drawn since its seed {own['seed']}"
    if count > 1 or not is_new:
        batch: dict[str, Any] = {"image": i + 1, "generators": generators}
        for name in ("prompt", "negative_prompt"):
            if isinstance(texts := getattr(inputs, name), list | tuple):
                batch[name] = list(texts)
        found |= {"image": f"{i + 1} of {count}"} if count > 1 else {}
        found["batch"] = as_json(batch | {"num_images_per_prompt": inputs.num_images_per_prompt})
    return found


def _dtype(model: torch.nn.Module) -> str:
    tensor = next((p for p in model.parameters() if p.is_floating_point()), None)
    return "unknown" if tensor is None else str(tensor.dtype).removeprefix("torch.")


def _bits(model: torch.nn.Module) -> int | str | None:
    """Return the format of a quantized model's layers, or "mixed", of performance/quantize.py."""
    found = {getattr(layer, "weight_format", None) for layer in model.modules()} - {None}
    return found.pop() if len(found) == 1 else "mixed" if found else None

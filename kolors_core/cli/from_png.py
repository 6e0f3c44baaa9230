"""Drawing an image again by its metadata: `--from PNG`, which is `arguments_of` and the flag `--exactly`.

What flags can say becomes flags; the rest (a scheduler's fields, the batch that the image is one of, scales
by block) `--exactly PNG` reads from the image. Metadata are text from a file: paths in them are opened as
checkpoints, LoRAs or images only, as if typed, and no address is fetched.
"""

import argparse
import ast
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from kolors_core.adapters.controlnet import controlnets_of
from kolors_core.checkpoint import logger
from kolors_core.cli.parsers import DTYPES, FORMATS
from kolors_core.devices import unwrap_compiled
from kolors_core.image import load_image, to_8_bits
from kolors_core.pipelines.fingerprint import fingerprint
from kolors_core.pipelines.png_metadata import read_metadata
from kolors_core.pipelines.provenance import TENSORS, describe_pipeline, pixel_hash
from kolors_core.pipelines.seeds import MAX_DRAWN, seeded_generator
from kolors_core.pipelines.stages import Task
from kolors_core.schedulers import SCHEDULERS
from kolors_core.validation import LARGEST_SEED, check_int
from weights_convert.untrusted_files import one_line, printable

Facts = Mapping[str, str]
# Images by their fact: the flag of their file, and what they are for a sentence.
IMAGES = {
    "start_image": ("image", "the image to start from"), "mask_image": ("mask", "the mask"),
    "strength_map": ("strength-map", "the strength map"), "face_image": ("face-image", "the face"),
    "ip_adapter_image": ("ip-image", "the image prompt"),
    "control_image": ("control-image", "the control image"),
}  # fmt: skip
PLAIN = {  # facts whose text is a flag's
    "negative_prompt": "negative", "seed": "seed", "guidance_scale": "guidance", "variant": "variant",
    "strength": "strength", "padding_mask_crop": "padding-mask-crop", "denoising_end": "denoising-end",
    "max_sequence_length": "max-tokens", "face_adapter": "face-adapter", "face_embeds_file": "face-embeds",
    "unet_file": "unet", "text_encoder_file": "text-encoder", "vae_file": "vae", "eta": "eta",
}  # fmt: skip
SIZES = {
    "original_size": "original-size", "target_size": "target-size", "crops_coords_top_left": "crop",
    "negative_original_size": "negative-original-size", "negative_target_size": "negative-target-size",
    "negative_crops_coords_top_left": "negative-crop",
}  # fmt: skip
RULES = {
    "pag_scale": "pag", "pag_adaptive_scale": "pag-adaptive", "pag_applied_layers": "pag-layers",
    "rescale": "guidance-rescale", "interval": "guidance-interval",
}  # fmt: skip
GIVEN = {  # tensors and functions of a call, which an image cannot hold
    *TENSORS, "latents", "masked_image_latents", "ip_adapter_masks", "denoising_start",
    "callback_on_step_end",
}  # fmt: skip


def arguments_of(file: Path) -> tuple[list[str], list[str]]:
    """Return the arguments of the command line that draw a PNG again, and sentences on what is not known.

    The prompt is the last argument, after "--". Raises FileNotFoundError, or ValueError for a file that is no
    PNG, or that does not say how it was made.
    """
    facts = read_metadata(file)
    if "scheduler" not in facts or "software" not in facts:
        raise ValueError(f"{file}: does not say how it was made, or was made by an older version")
    with _damage_named(file):
        _check(facts)
        found = _Arguments(file, facts)
    return found.flags, [printable(sentence) for sentence in found.unknown]


@contextmanager
def _damage_named(file: Path) -> Iterator[None]:
    faults = ValueError, LookupError, TypeError, AttributeError, SyntaxError, ArithmeticError, RuntimeError
    try:
        yield
    except (*faults, MemoryError) as error:  # of text that is no JSON, is another than expected, or too deep
        raise ValueError(f"{file}: its metadata are damaged: {one_line(error)}") from None


def _check(facts: Facts) -> None:
    """Raise an error for metadata that the functions of this file cannot read."""
    scheduler = json.loads(facts["scheduler"])
    SCHEDULERS[scheduler["_class_name"]].from_config(scheduler)
    json.loads(facts["fingerprint"]).items()
    for name in ("ip_adapter_scale", "face_scale"):
        json.loads(facts.get(name, "{}"))
    for one in json.loads(facts.get("lora", "[]")):
        if missing := {"name", "weight", "from", "fingerprint"} - one.keys():
            raise ValueError(f"a LoRA has no {min(missing)}")
    if "batch" in facts:
        batch = json.loads(facts["batch"])
        count = check_int("num_images_per_prompt", batch["num_images_per_prompt"])
        prompts = batch.get("prompt", [""])
        check_int("image", batch["image"], most=count * len(prompts))
        for each in _generators(facts):
            check_int("seed", each["seed"], least=0, most=LARGEST_SEED)
            check_int("drawn", each.get("drawn") or 0, least=0, most=2 * MAX_DRAWN)
    call_arguments(facts, has_seed=True)


class _Arguments:
    """Flags and sentences of one image, collected."""

    def __init__(self, file: Path, facts: Facts) -> None:
        self.facts, self.flags, self.unknown = facts, [f"--exactly={file}"], list[str]()
        self._model()
        self._adapters()
        for name, flag in PLAIN.items():
            if name in facts and not (name == "seed" and "batch" in facts):
                self._add(flag, facts[name])
        for name, (flag, what) in IMAGES.items():
            if name in facts:
                self._images(flag, what, _flat(json.loads(facts[name])))
        self._sampling()
        for name in sorted(facts.keys() & GIVEN - {"face_embeds"}):
            self.unknown.append(f"{name} was given, and is not in the image")
        if "noise" in facts and "batch" not in facts:
            self.unknown.append(f"the noise is {facts['noise']}")
        if "noise_device" in facts:
            self.unknown.append(f"the noise was drawn on {facts['noise_device']}, here it is the CPU's")
        if facts.get("batch") and any(one.get("drawn", 0) is None for one in _generators(facts)):
            self.unknown.append(f"the noise is {facts.get('noise', 'of a generator in use')}")
        if "prompt" in facts:
            self.flags += ["--", facts["prompt"]]
        else:
            self.unknown.append("the prompt is not known")

    def _add(self, flag: str, value: Any) -> None:
        self.flags.append(f"--{flag}={value}")

    def _add_several(self, flag: str, values: Iterable[Any]) -> None:
        """Add a flag of several values, none of which may be a flag of its own, such as --force."""
        texts = [str(value) for value in values]
        if flags := [text for text in texts if text.startswith("-")]:
            raise ValueError(f"{flags[0][:100]!r} is no value of {flag}")
        self.flags += [f"--{flag}", *texts]

    def _model(self) -> None:
        facts = self.facts
        if facts["model"].startswith("unknown"):
            self.unknown.append("no name of the model is known: give --weights")
        else:
            self._add("weights", facts["model"])
        if "revision" in facts and not Path(facts["model"]).exists():
            self._add("revision", facts["revision"])
        for component, bits in json.loads(facts.get("bits", "{}")).items():
            if str(bits) in FORMATS:
                self._add(f"{component.replace('_', '-')}-bits", bits)
            else:  # chosen for each layer
                self.unknown.append(f"the {component}'s layers were quantized to several formats")
        self.flags += ["--vae-tiling"] if "vae_tiling" in facts else []
        dtype = facts["dtype"]
        if dtype.startswith("{"):
            dtypes = json.loads(dtype)
            dtype = dtypes["unet"]
            if dtypes != dict.fromkeys(dtypes, dtype) | ({"vae": "float32"} if dtype == "float16" else {}):
                self.unknown.append(f"the models were in several dtypes, {facts['dtype']}; here in {dtype}")
        if dtype in DTYPES:
            self._add("dtype", dtype)
        else:
            self.unknown.append(f"it was drawn in {dtype}, expected one of {', '.join(DTYPES)}")
        device = facts["device"]
        if device == "cpu" or (device == "cuda" and torch.cuda.is_available()):
            self._add("device", device)
        else:
            self.unknown.append(f"it was drawn on {device}, which rounds otherwise")

    def _adapters(self) -> None:
        facts = self.facts
        for one in json.loads(facts.get("lora", "[]")):
            if one["from"] is None or one.get("fused"):
                why = "was fused into the weights" if one.get("fused") else "was given as tensors"
                self.unknown.append(f"the LoRA {one['name']} {why}, and its file is not known: give --lora")
            else:
                weight = one["weight"]
                self._add("lora", f"{one['from']}:{weight if isinstance(weight, int | float) else 1.0}")
        if any(flag.startswith("--lora=") for flag in self.flags):
            self.flags.append("--lora-partial")  # what was left out is so again: fingerprints are compared
        words = json.loads(facts.get("textual_inversion", "{}"))
        for word, source in words.items():
            if source is None:
                self.unknown.append(f"the vectors of the word {word} were given, and are not in the image")
        for source in dict.fromkeys(source for source in words.values() if source is not None):
            own = [word for word, other in words.items() if other == source]
            self._add("textual-inversion", f"{source}:{own[0]}" if len(own) == 1 else source)
        if "ip_adapter" in facts:
            if facts["ip_adapter"].startswith("[") or facts["ip_adapter"] == "null":
                self.unknown.append("there were several IP-Adapters, or one given as tensors")
            else:
                self._add("ip-adapter", facts["ip_adapter"])
        sources = json.loads(facts.get("control", "[]"))
        for source, scale in zip(sources, facts.get("control_scale", "").split(", "), strict=False):
            if source is None:
                self.unknown.append("a ControlNet was given, and its folder is not known: give --control")
            else:
                self._add("control", f"{source}:{scale}")

    def _images(self, flag: str, what: str, images: Iterable[Any]) -> None:
        images = list(images)
        if flag == "control-image" and "canny" in self.facts:
            images = images[:-1]
            if _is_address(self.facts["canny"]):
                self.unknown.append("the image of --canny is at an address, which is not fetched")
            else:
                self._add("canny", self.facts["canny"])
        for image in images:
            name = image.get("file") if isinstance(image, dict) else None
            if name is None or _is_address(name):
                self.unknown.append(f"{what} is known by its pixels' hash only: give --{flag}")
                continue
            self._add(flag, name)
            if not Path(name).is_file():
                self.unknown.append(f"{what}, {name}, is not there")
            elif image["sha256"] not in _file_hashes(name, flag):
                or_else = ", or was given with transparency" if flag in ("ip-image", "face-image") else ""
                self.unknown.append(f"{what}, {name}, has changed{or_else}")

    def _sampling(self) -> None:
        facts = self.facts
        own = [f"--{name}={','.join(map(str, json.loads(facts[name])))}" for name in ("timesteps", "sigmas")
               if name in facts]  # fmt: skip
        self.flags += own or [f"--steps={facts['steps']}"]
        self.flags.append("--sampler=own")  # `prepare` sets the image's
        is_from_image = "start_image" in facts
        width, height = facts["size"].split("x")
        for side, pixels in (("height", height), ("width", width)):
            if not is_from_image or side in facts:
                self._add(side, facts[side] if is_from_image else pixels)
        for name, numbers in json.loads(facts.get("size_conditions", "{}")).items():
            self._add(SIZES[name], ",".join(map(str, numbers)))
        if facts.get("paste_back") == "False":
            self.flags.append("--no-paste-back")
        if "freeu" in facts:
            self._add_several("freeu", (part.partition("=")[2] for part in facts["freeu"].split(", ")))
        if " with " in facts["sampler"]:
            self.unknown.append(f"the sampler was an own function, {facts['sampler'].partition(' with ')[0]}")
        if "step_cache" in facts:
            self.unknown.append(f"steps were cached, enable_step_cache({facts['step_cache']})")
        self._rule(facts.get("guidance", "guided"))

    def _rule(self, text: str) -> None:
        call = ast.parse(text, mode="eval").body
        name = call.func if isinstance(call, ast.Call) else call
        keywords = call.keywords if isinstance(call, ast.Call) else []
        if not isinstance(name, ast.Name) or name.id not in ("guided", "perturbed"):
            self.unknown.append(f"the guidance rule was an own function, {text}")
            return
        for keyword in keywords:
            value = ast.literal_eval(keyword.value)
            listed = [value] if not isinstance(value, list | tuple) else value
            if value is not None and value != 0.0:
                self._add_several(RULES[str(keyword.arg)], listed)


def read_facts(options: argparse.Namespace) -> Facts:
    """Read the metadata of the image of `--exactly`, empty without one.

    Raises ValueError for an image, LoRA or adapter of them that the flags lack.
    """
    if options.exactly is None:
        return {}
    facts = read_metadata(options.exactly)
    with _damage_named(options.exactly):
        _check(facts)
    flags = {name: flag for name, (flag, _) in IMAGES.items()} | {"lora": "lora", "control": "control"}
    for name, flag in (flags | {"ip_adapter": "ip-adapter", "face_adapter": "face-adapter"}).items():
        has_canny = flag == "control-image" and options.canny is not None
        if name in facts and not getattr(options, flag.replace("-", "_")) and not has_canny:
            raise ValueError(
                f"{options.exactly} was made with an input that is not known here: give --{flag}"
            )
    return facts


def call_arguments(facts: Facts, has_seed: bool) -> dict[str, Any]:
    """Return the arguments of a call that no flag has: the batch, a LoRA scale, when ControlNets act.

    has_seed: whether a seed is given instead of the image's batch.
    """
    found: dict[str, Any] = {}
    if "batch" in facts and not has_seed:
        batch = json.loads(facts["batch"])
        one = [seeded_generator(each["seed"], each.get("drawn") or 0) for each in _generators(facts)]
        found["generator"] = one if isinstance(batch["generators"], list) else one[0]
        names = ("prompt", "negative_prompt", "num_images_per_prompt")
        found |= {name: batch[name] for name in names if name in batch}
    if "lora_scale" in facts:
        found["cross_attention_kwargs"] = {"scale": float(facts["lora_scale"])}
    if "control_steps" in facts:
        parts = [part.split(" to ") for part in facts["control_steps"].split(", ")]
        found["control_guidance_start"] = [float(start) for start, _ in parts]
        found["control_guidance_end"] = [float(end) for _, end in parts]
    return found


def select_image(images: Sequence[Any], facts: Facts, has_seed: bool) -> list[Any]:
    """Select the image that the metadata are of from its batch; all images without one."""
    index = json.loads(facts["batch"])["image"] - 1 if "batch" in facts and not has_seed else None
    return list(images) if index is None else [images[index]]


def prepare(pipe: Task, facts: Facts) -> None:
    """Set what no flag says: the scheduler and scales by block; log what differs from the image's making."""
    if not facts:
        return
    if "scheduler" in facts:  # else it is overridden
        scheduler = json.loads(facts["scheduler"])
        pipe.scheduler = SCHEDULERS[scheduler["_class_name"]].from_config(scheduler)
    weights = [one["weight"] for one in json.loads(facts.get("lora", "[]"))]
    if any(isinstance(weight, dict) for weight in weights):
        pipe.set_adapters(pipe.get_active_adapters(), weights)
    if "ip_adapter_scale" in facts:
        pipe.set_ip_adapter_scale(json.loads(facts["ip_adapter_scale"]))
    if "face_scale" in facts:
        pipe.set_ip_adapter_face_id_scale(json.loads(facts["face_scale"]))
    for sentence in differences(pipe, facts):
        logger.warning("%s", sentence)


def differences(pipe: Task, facts: Facts) -> list[str]:
    """Return sentences on what of a pipeline differs from an image's metadata: weights, dtypes, versions."""
    own = describe_pipeline(pipe) | pipe._adapter_metadata(None)
    nets = map(unwrap_compiled, controlnets_of(pipe.controlnet))
    own["control_fingerprint"] = " ".join(map(fingerprint, nets))
    expected, got = (json.loads(each["fingerprint"]) for each in (facts, own))
    found = [f"the {name} is another than the image's: {got.get(name)}, expected {digest}"
             for name, digest in expected.items() if got.get(name) != digest]  # fmt: skip
    loras, have = (
        [one["fingerprint"] for one in json.loads(each.get("lora", "[]"))] for each in (facts, own)
    )
    if loras != have:
        found.append(f"the LoRAs are others than the image's: {have}, expected {loras}")
    for kind in ("ip_adapter", "face_adapter", "textual_inversion", "control"):
        key = f"{kind}_fingerprint"
        if key in facts and facts[key] != own.get(key):
            found.append(f"{kind} is another than the image's: {own.get(key)}, expected {facts[key]}")
    for name in ("torch", "software", "device", "threads", "dtype", "bits"):
        if facts.get(name) != own.get(name):
            found.append(f"{name} is {own.get(name)}, and was {facts.get(name)}: pixels may differ a little")
    return found


def _generators(facts: Facts) -> list[dict[str, Any]]:
    given = json.loads(facts["batch"])["generators"]
    return given if isinstance(given, list) else [given]


def _is_address(name: str) -> bool:
    return re.match(r"\w+://", name) is not None


def _flat(content: Any) -> list[Any]:
    return [one for part in content for one in _flat(part)] if isinstance(content, list) else [content]


def _file_hashes(name: str, flag: str) -> list[str]:
    """Hash an image's file as the command line reads it, masks also in color; empty for what is no image."""
    try:
        readings = [load_image(name)]
        if flag in ("mask", "strength-map"):
            readings.append(load_image(name, lambda image: to_8_bits(image, name).convert("L")))
    except (OSError, ValueError):
        return []
    return [pixel_hash(image) for image in readings]

"""Arguments that the reference's loaders take, and that have nothing to do here."""

from collections.abc import Collection, Mapping
from typing import Any

from kolors_core.validation import short_repr

# Arguments of the reference's loaders that change nothing at these values; at others the hint is the error.
NEUTRAL: dict[str, tuple[tuple[Any, ...], str]] = {
    "low_cpu_mem_usage": ((None, False, True), "weights are always loaded once"),
    "resume_download": ((None, False, True), "downloads always resume"),
    "disable_mmap": ((None, False, True), "files are mapped where that is exact"),
    "force_download": ((None, False), "adapters are fetched once"),
    "proxies": ((None, {}), "set HTTPS_PROXY in the environment"),
    "mirror": ((None, ""), "set HF_ENDPOINT in the environment"),
    "custom_pipeline": ((None,), "a pipeline of your own is a subclass of KolorsPipeline"),
    "custom_revision": ((None,), "no code is fetched"),
    "trust_remote_code": ((None, False), "no code is fetched"),
    "load_connected_pipeline": ((None, False), "Kolors has none"),
    "max_memory": ((None, {}), "pipe.enable_model_cpu_offload() needs no plan"),
    "offload_folder": ((None, ""), "weights are offloaded to memory alone"),
    "offload_state_dict": ((None, False), "weights are offloaded to memory alone"),
    "quantization_config": ((None,), "a pipeline takes quantization={'unet': 'fp8'}"),
    "use_onnx": ((None, False), "only safetensors are opened"),
    "use_flashpack": ((None, False), "only safetensors are opened"),
    "safety_checker": ((None,), "Kolors has none"),
    "requires_safety_checker": ((None, False), "Kolors has none"),
    "use_safetensors": ((None, True), "pickles can run code, only safetensors are opened"),
    "ignore_mismatched_sizes": ((None, False), "use kolors_core.checkpoint.load_modified"),
    "output_loading_info": ((None, False), "every tensor is loaded, or an error names it"),
    "return_lora_metadata": ((None, False), "kolors_core.adapters.lora_files.configs_of reads them"),
    "hotswap": ((None, False), "call delete_adapters(name), then load the other under that name"),
}

LORA_ONLY = {"hotswap", "return_lora_metadata"}


def without_neutral(options: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    """Return the options without those of the names, whose values must be in `NEUTRAL`; else ValueError."""
    for name in options.keys() & names:
        values, hint = NEUTRAL[name]
        if not any(options[name] is value or options[name] == value for value in values):
            raise ValueError(f"{name}={short_repr(options[name])} has no place here: {hint}")
    return {name: value for name, value in options.items() if name not in names}


def check_neutral(options: Mapping[str, Any]) -> None:
    """Raise ValueError or TypeError for an option of `from_pretrained` that is not neutral."""
    if others := without_neutral(options, NEUTRAL.keys() - LORA_ONLY):
        raise TypeError(f"from_pretrained has no argument {next(iter(others))!r}")

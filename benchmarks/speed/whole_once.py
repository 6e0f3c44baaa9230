"""One process of `whole`: `python -m benchmarks.speed.whole_once ...` prints JSON of what its stages took.

`draw LIBRARY FOLDER PNG PIXELS STEPS`: a user's script, from the import to the image's file.
`lora LIBRARY FOLDER FILE`: a LoRA loaded into the UNet, fused and unfused, and how many of the weights that
it acts on differ from before. LIBRARY is kolors_core or diffusers: the lines are the same for both.
"""

import json
import sys
import time
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

PROMPT = "一张瓢虫的照片，微距，变焦，高质量，电影"
GUIDANCE, SEED = 5.0, 7


def draw(library: str, folder: str, out: str, pixels: str, steps: str) -> dict[str, float]:
    """Seconds of each stage; reading the prompt and the first step are one, the PNG is part of the last."""
    times = [time.perf_counter()]
    pipe = _load(library, folder, times)
    import torch

    def take_time(_pipe: Any, _step: int, _timestep: Any, _tensors: Mapping[str, Any]) -> dict[str, Any]:
        times.append(time.perf_counter())
        return {}

    pipe.set_progress_bar_config(disable=True)
    image = pipe(
        PROMPT, height=int(pixels), width=int(pixels), num_inference_steps=int(steps),
        guidance_scale=GUIDANCE, generator=torch.Generator().manual_seed(SEED),
        callback_on_step_end=take_time,
    ).images[0]  # fmt: skip
    image.save(out)
    times.append(time.perf_counter())
    importing, loading, first, *others, last = (b - a for a, b in zip(times, times[1:], strict=False))
    return {
        "importing": importing, "loading": loading, "prompt_and_first_step": first,
        "other_steps": sum(others), "decoding": last,
    }  # fmt: skip


def lora(library: str, folder: str, file: str) -> dict[str, float]:
    """Seconds of loading, fusing and unfusing; tensors that fusing changed, and that differ in the end."""
    pipe = _load(library, folder, [], text_encoder=None, tokenizer=None)
    # A copy of them all has also read them, so that no stage waits for the disk.
    before = {name: weight.detach().clone() for name, weight in pipe.unet.named_parameters() if "to_" in name}
    stages = {
        "load": lambda: pipe.load_lora_weights(file), "fuse": pipe.fuse_lora, "unfuse": pipe.unfuse_lora,
    }  # fmt: skip
    found = dict[str, float]()
    for name, stage in stages.items():
        start = time.perf_counter()
        stage()
        found[name] = time.perf_counter() - start
        if name != "load":
            found[f"changed_by_{name}"] = _differing(pipe.unet, before)
    return found | {"total": sum(found[name] for name in stages)}


def _load(library: str, folder: str, times: list[float], **parts: None) -> Any:
    """Load the pipeline in bfloat16; add the times after the import and after loading."""
    pipeline: Any = import_module(library).KolorsPipeline
    import torch

    times.append(time.perf_counter())
    variant = next(Path(folder, "unet").glob("*.safetensors")).name.split(".")[1]
    pipe = pipeline.from_pretrained(folder, dtype=torch.bfloat16, variant=variant, **parts)
    times.append(time.perf_counter())
    return pipe


def _differing(unet: Any, before: Mapping[str, Any]) -> int:
    """Count the tensors that are not what they were, bit for bit. PEFT renames those that it wraps."""
    now = {name.replace(".base_layer", ""): weight for name, weight in unet.named_parameters()}
    return sum(not now[name].equal(weight) for name, weight in before.items())


if __name__ == "__main__":
    task, *arguments = sys.argv[1:]
    print(json.dumps({"draw": draw, "lora": lora}[task](*arguments)))

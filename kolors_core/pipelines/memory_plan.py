"""Memory plans: a pipeline runs without values, and what each stage would allocate is counted.

    plan(pipe, 1024, 1024, device="cuda")  # a device that this machine need not have

A copy of the pipeline whose models are on the meta device runs a few steps. Nothing is computed, no weight is
read or copied, and a changed architecture is planned as it stands: performance/memory_tracker.py counts.
"""

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from kolors_core.adapters.controlnet import controlnets_of
from kolors_core.adapters.ip_adapter import attached
from kolors_core.chatglm import TextEmbedding
from kolors_core.devices import planned_device, unwrap_compiled
from kolors_core.guidance import GuidanceRule
from kolors_core.module import reads_counts
from kolors_core.notebook import table_html
from kolors_core.performance.memory_tracker import META, MemoryTracker, TrackedOffload, copy_to_meta
from kolors_core.performance.offload import Models, Offload, as_unit, bytes_of
from kolors_core.pipelines.pag import KolorsPAGPipeline
from kolors_core.pipelines.request import PipelineInputs
from kolors_core.pipelines.runs import Runs
from kolors_core.pipelines.stages import Task, encode_prompts
from kolors_core.pipelines.text_prompts import MAX_TOKENS
from kolors_core.tokenizer import TokenBatch
from kolors_core.vae import call, run_channels_last
from kolors_core.validation import check_int

STEPS = 2  # of the denoiser: in the second the next block is known, and the sampler has a past
GIB = 2**30
OFFLOADS = {"by_model": "enable_model_cpu_offload", "by_block": "enable_sequential_cpu_offload"}
MODES = {"resident": "all resident", "by_model": "model by model", "by_block": "block by block"}


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Memory of one stage in GiB: weights, peak activations, and peak total under block offload."""

    weights: float
    work: float
    by_block: float

    @property
    def total(self) -> float:
        """Weights and activations, without other stages' weights."""
        return self.weights + self.work


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Memory of a run on its device in GiB (2^30 bytes): by stage, in the run's order, and in three modes.

    resident: all models are on the device. by_model: as after `enable_model_cpu_offload`. by_block: as after
    `enable_sequential_cpu_offload`. mode: the name of the one on now; None for weights that are not loaded.
    """

    stages: Mapping[str, Stage]
    resident: float
    by_model: float
    by_block: float
    mode: str | None
    run: str

    def __str__(self) -> str:
        lines = [f"GiB for {self.run}", f"{'':<16}{'weights':>9}{'work':>9}{'both':>9}{'by block':>10}"]
        for name, s in self.stages.items():
            lines.append(f"{name:<16}{s.weights:>9.3f}{s.work:>9.3f}{s.total:>9.3f}{s.by_block:>10.3f}")
        for name, words in MODES.items():
            remark = "  as it is now" if name == self.mode else ""
            lines.append(f"{words:<34}{getattr(self, name):>9.3f}{remark}")
        return "\n".join(lines)

    def __repr__(self) -> str:
        """Return the three totals."""
        totals = ", ".join(f"{getattr(self, name):.3f} {words}" for name, words in MODES.items())
        return f"<{type(self).__name__}: GiB for {self.run}: {totals}>"

    def _repr_html_(self) -> str:  # in notebooks
        numbers = {name: (s.weights, s.work, s.total, s.by_block) for name, s in self.stages.items()}
        rows = [(name, *(f"{number:.3f}" for number in row)) for name, row in numbers.items()]
        for name, words in MODES.items():
            rows.append((words, "as it is now" * (name == self.mode), "", f"{getattr(self, name):.3f}", ""))
        return table_html(f"GiB for {self.run}", ("", "weights", "work", "both", "by block"), rows)


@torch.no_grad()
def plan(
    pipe: Task, height: int | None = None, width: int | None = None, batch: int = 1, *,
    num_images_per_prompt: int = 1, guidance_scale: float = 5.0, max_sequence_length: int = MAX_TOKENS,
    pag_scale: float | None = None, device: torch.device | str | None = None, is_printed: bool = True,
) -> Plan:  # fmt: skip
    """Print and return what each stage of a pipeline needs on its device, before anything is computed.

    batch: the number of prompts. max_sequence_length: tokens of the longest. Others and errors: as for the
    pipeline. device: whose kernels are meant, such as "cuda", which this machine need not have; if None the
    pipeline's own, or on the meta device the best there is.
    Quantized models, adapters (with one image each) and offloading count as they are now. Not counted: what
    the device's own libraries and a step cache keep, and the workspaces of an accelerator's convolutions.
    Compiled models may need less, as do processes that split rows. Encoding an image to start from needs less
    than decoding. is_printed: whether it is printed.
    """
    size = pipe._size("height", height), pipe._size("width", width)
    prompts, copies = check_int("batch", batch), check_int("num_images_per_prompt", num_images_per_prompt)
    length = check_int("max_sequence_length", max_sequence_length, least=3, most=MAX_TOKENS)
    inputs = PipelineInputs(
        guidance_scale=guidance_scale, num_images_per_prompt=copies, output_type="pt",
        generator=torch.Generator(), callback_on_step_end=_stop, guidance_rule=_rule(pipe, pag_scale),
    )  # fmt: skip
    target = planned_device(pipe.device if device is None and pipe.device.type != "meta" else device)
    tracker = MemoryTracker(target.type)
    twin = _meta_copy(pipe, TrackedOffload(tracker, by_block=True))
    if target.type == "cpu" and twin._vae_weight.dtype.itemsize == 2:  # as a VAE on a CPU does
        twin.vae.run_coder = partial(run_channels_last, twin.vae.run_coder)
    with tracker:
        _run(twin, inputs, size, prompts, length)
    twin.offload.end()
    by_model = _peak_weights_by_stage(twin._models(), tracker)
    models, work, peak = pipe._models(), tracker.activations, tracker.peak
    weights = {stage: bytes_of(as_unit(listed)) for stage, listed in models.items()}
    images = "1 image" if prompts * copies == 1 else f"{prompts * copies} images"
    guidance = f"{'with' if inputs.is_guided else 'without'} guidance"
    mode = None if pipe.device.type == "meta" else "resident"
    if pipe.offload.device is not None:
        mode = "by_block" if pipe.offload.by_block else "by_model"
    result = Plan(
        stages={
            stage: Stage(weights=weights[stage] / GIB, work=work[stage] / GIB, by_block=peak[stage] / GIB)
            for stage in work
            if stage is not None
        },
        resident=(bytes_of(as_unit(chain(*models.values()))) + max(work.values())) / GIB,
        by_model=max(by_model[stage] + work[stage] for stage in work) / GIB,
        by_block=max(peak.values()) / GIB,
        mode=mode,
        run=f"{images} of {size[1]}x{size[0]} {guidance} on {target.type}",
    )
    if is_printed:
        print(result)
    return result


def check_fits(
    pipe: Task, height: int | None = None, width: int | None = None, *, num_images_per_prompt: int = 1,
    guidance_scale: float = 5.0, max_sequence_length: int = MAX_TOKENS,
) -> Plan:  # fmt: skip
    """Plan a call with one prompt on a pipeline with weights; ValueError if it cannot fit in memory now.

    It names what the call needs beside the weights that are on the device, what is available, and what would
    make it fit. Arguments: as for `plan`, whose result is returned.
    """
    pipe._check_loaded()
    needed = plan(
        pipe, height, width, num_images_per_prompt=num_images_per_prompt, guidance_scale=guidance_scale,
        max_sequence_length=max_sequence_length, is_printed=False,
    )  # fmt: skip
    free, mode = pipe._available_memory(), needed.mode or "resident"
    present = pipe.offload.bytes_on_device
    if pipe.offload.device is None:  # a CPU's may be a file's pages, which are available as well
        present = bytes_of(as_unit(chain(*pipe._models().values())))
    if free is None or (need := getattr(needed, mode)) <= (have := (free + present) / GIB):
        return needed
    stage, work = max(((name, one.work) for name, one in needed.stages.items()), key=lambda pair: pair[1])
    hints = ["smaller images and quantized models take less"]
    fewer = num_images_per_prompt - math.ceil((need - have) * num_images_per_prompt / work)
    if fewer > 0:
        hints.append(f"{fewer} in a call {'fit' if fewer > 1 else 'fits'}")
    if stage == "vae" and pipe.vae.run_coder is call:
        hints.append("enable_vae_tiling() takes a part of it")
    for other, method in OFFLOADS.items():
        if pipe.device.type != "cpu" and (least := getattr(needed, other)) <= have:
            hints.append(f"{method}() needs {least:.2f} GiB")
    what = f"{needed.run} needs {need:.2f} GiB ({MODES[mode]}), {work:.2f} for the work of the {stage}"
    got = f"{have:.2f} GiB can be had"
    raise ValueError(f"{what}, and {got}: {'; '.join(reversed(hints))}")


def _rule(pipe: Task, pag_scale: float | None) -> GuidanceRule:
    """Return the rule of a call without its interval: every step then needs what the costliest one needs."""
    rule = pipe.guided
    if isinstance(pipe, KolorsPAGPipeline):
        rule = pipe.pag_rule(3.0 if pag_scale is None else pag_scale) or rule
    elif pag_scale is not None:
        raise TypeError(f"pag_scale is for a KolorsPAGPipeline, got a {type(pipe).__name__}")
    if not isinstance(rule, partial):
        return rule
    kept = {name: value for name, value in rule.keywords.items() if name != "interval"}
    return partial(rule.func, *rule.args, **kept)


def _meta_copy(pipe: Task, offload: Offload) -> Task:
    """Copy a pipeline and its models, without values or hooks and not compiled."""
    models = {name: unwrap_compiled(model) for name, model in pipe._own_models().items()}
    nets = [unwrap_compiled(net) for net in controlnets_of(pipe.controlnet)]
    parts = [*models.values(), *(handle.adapter for handle in attached(models["unet"])), *nets]
    modules = chain.from_iterable(part.modules() for part in parts)
    copies = copy_to_meta(models | {"controlnet": nets or None}, modules)
    if pipe._image_encoder is None:
        copies.pop("image_encoder", None)  # it came with an IP-Adapter, and so does its copy
    twin = copy.copy(pipe)
    for name, part in copies.items():
        setattr(twin, name, part)
    twin.offload, twin._progress, twin.runs = offload, {"disable": True}, Runs()
    twin.step_cache = twin.row_split = None
    return twin


def _run(twin: Task, inputs: PipelineInputs, size: tuple[int, int], prompts: int, length: int) -> None:
    text = _encoded(twin, prompts, length)
    given: dict[str, Any] = {"prompt_embeds": text.tokens, "pooled_prompt_embeds": text.pooled}
    if inputs.is_guided:
        negative = _encoded(twin, 1, length)
        given |= {"negative_prompt_embeds": negative.tokens, "negative_pooled_prompt_embeds": negative.pooled}
    given |= twin.placeholder_inputs(META, inputs.is_guided)
    if nets := controlnets_of(twin.controlnet):
        given["control_image"] = [torch.empty(1, 3, *size, device=META)] * len(nets)
    inputs = PipelineInputs(**vars(inputs) | given)
    halves = twin._condition(inputs, size, *encode_prompts(twin, None, inputs))
    shape, channels = twin._latent_shape(len(halves[0].size_ids), size), twin.unet.config.in_channels
    positive, negative = (half and half.with_zero_extra_channels(channels, shape) for half in halves)
    assert positive is not None
    x = torch.empty(shape, device=META, dtype=twin.precision)
    with twin.runs.begin():
        latents = twin._denoise(inputs, twin.scheduler.schedule(50), x, positive, negative)
        del x  # as in a pipeline's call
        twin._output(inputs, latents, positive, {})
        twin._enter_stage()


def _encoded(twin: Task, prompts: int, length: int) -> TextEmbedding:
    """Encode prompts of `length` tokens, or return empty embeddings where there is no text encoder."""
    shape = prompts, length
    if twin.text_encoder is None:
        width, place = twin.unet.config.text_dim, {"device": META, "dtype": twin.dtype}
        return TextEmbedding(torch.empty(*shape, width, **place), torch.empty(prompts, width, **place))
    ids, mask = (torch.empty(shape, dtype=dtype, device=META) for dtype in (torch.long, torch.bool))
    is_merged = twin.savings.merge_padding and reads_counts(twin.text_encoder)
    counts = torch.empty(shape, device=META) if is_merged else None
    twin._enter_stage("text_encoder")
    return twin.text_encoder(TokenBatch(ids, mask, ids, counts))


def _stop(pipe: Any, step: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    pipe._interrupt = step + 1 >= STEPS
    return {}


def _peak_weights_by_stage(models: Models, tracker: MemoryTracker) -> dict[str | None, int]:
    """Return the most bytes of weights on the device in each stage under model offload."""
    offload, peak = TrackedOffload(tracker, by_block=False), dict.fromkeys(tracker.activations, 0)
    for stage in (*peak, None, *peak, None):  # the second run prefetches in the order of the first
        offload.enter(stage, models)
        peak[stage] = max(peak.get(stage, 0), offload.bytes_on_device)
    offload.end()
    return peak

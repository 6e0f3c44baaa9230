"""The models at full size against the reference, on the CPU, with random weights.

    python -m benchmarks.full_size [--only unet|chatglm] [--rounds 5] [--out FILE]

UNet: all 2.58 B parameters, one forward of 32x32 latents (256x256 pixels) and one of 25x38. ChatGLM: two of
its 28 layers at full width, two left-padded prompts of 256 tokens. Both sides read the same memory, so the
float32 UNet is held once (10.3 GB). Takes 6 to 8 minutes on two free cores and 12 GB of memory; needs the
`test` extra. Prints two tables, writes JSON, and exits with 1 if an error exceeds its bound or the control,
a planted mistake, does not.

Errors: max |a - b| / max |b| and mean |a - b| / mean |b|, where b is the reference.
"""

import argparse
import json
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.pairs import WeightsAs, make_pair, share
from benchmarks.side_by_side import environment
from kolors_core.config import KOLORS
from kolors_core.tokenizer import TokenBatch

SEED = 20240706
LAYERS = 2
TOKENS = 256
# float64 is the proof: so deep a UNet moves by only 5e-7 if every transformer's GroupNorm has a wrong eps, no
# more than float32 rounds (the reference in float32 is 6e-7 from itself in float64), and by 5e-9 if one has.
# float32 checks the precision that users run, at about ten times its rounding.
BOUNDS = {"float64": 1e-10, "float32": 5e-6}
GMASK, SOP = 64790, 64792

Tensors = dict[str, Tensor]
Run = Callable[[nn.Module, Tensors], Tensors]


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two models that share their weights, how to call each, and what to call them on.

    control: our name of the norm whose eps is spoiled to show that the comparison can fail.
    """

    component: str
    reference: nn.Module
    ours: nn.Module
    run_reference: Run
    run_ours: Run
    cases: Mapping[str, Tensors]
    control: str


@dataclass(frozen=True, kw_only=True)
class Error:
    """One output's errors. `max` and `mean`: ours from the reference in the same dtype. The others: the
    largest error of each from the reference in float64. A control's error must exceed the bound."""

    model: str
    case: str
    output: str
    dtype: str
    max: float
    mean: float
    ours_from_float64: float
    reference_from_float64: float
    is_control: bool = False


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Median seconds of a forward, and all of them in the order they were taken. cpu_share: how much of the
    threads' time was spent computing; well below 1, another program had the cores: measure again."""

    model: str
    case: str
    dtype: str
    reference: float
    ours: float
    reference_over_ours: float
    fastest_reference_over_ours: float
    cpu_share: float
    reference_all: list[float]
    ours_all: list[float]


def unet_pair() -> Pair:
    reference, ours = make_pair("unet", KOLORS.unet, SEED)
    cases = {f"{h}x{w} latents": unet_inputs(h, w) for h, w in ((32, 32), (25, 38))}
    return Pair(
        component="unet", reference=reference, ours=ours, run_reference=run_unet_reference, run_ours=run_unet,
        cases=cases, control="mid.attentions.0.norm",
    )  # fmt: skip


def unet_inputs(height: int, width: int) -> Tensors:
    generator = torch.Generator().manual_seed(SEED + height)
    text_dim = KOLORS.unet.text_dim
    return {
        "latents": torch.randn(1, KOLORS.unet.in_channels, height, width, generator=generator),
        "text_tokens": torch.randn(1, TOKENS, text_dim, generator=generator),
        "pooled_text": torch.randn(1, text_dim, generator=generator),
        "timestep": torch.tensor(401),
        # Crops differ from each other and from 0, so that a wrong order of the six would show.
        "size_ids": torch.tensor([[8 * height, 8 * width, 8, 16, 8 * height, 8 * width]]),
    }


def run_unet_reference(model: nn.Module, inputs: Tensors) -> Tensors:
    added = {"text_embeds": inputs["pooled_text"], "time_ids": inputs["size_ids"]}
    text = inputs["text_tokens"]
    out = model(inputs["latents"], inputs["timestep"], encoder_hidden_states=text, added_cond_kwargs=added)
    return {"noise": out.sample}


def run_unet(model: nn.Module, inputs: Tensors) -> Tensors:
    return {"noise": model(**inputs)}


def chatglm_pair() -> Pair:
    config = replace(KOLORS.text_encoder, layers=LAYERS)
    reference, ours = make_pair("text_encoder", config, SEED)
    return Pair(
        component="text_encoder", reference=reference, ours=ours,
        cases={"prompts of 17 and 23 tokens": chatglm_inputs((17, 23))},
        run_reference=run_chatglm_reference, run_ours=run_chatglm, control="layers.0.attention_norm",
    )  # fmt: skip


def chatglm_inputs(lengths: Sequence[int]) -> Tensors:
    """Prompts of random pieces, as the tokenizer would pad them."""
    generator = torch.Generator().manual_seed(SEED)
    ids, positions = torch.zeros(2, len(lengths), TOKENS, dtype=torch.int64)
    for row, length in enumerate(lengths):
        ids[row, -length:] = torch.randint(3, GMASK, (length,), generator=generator)
        ids[row, -length : 2 - length] = torch.tensor([GMASK, SOP])
        positions[row, -length:] = torch.arange(length)
    mask = torch.arange(TOKENS) >= TOKENS - torch.tensor(lengths)[:, None]
    return {"ids": ids, "mask": mask, "positions": positions}


def run_chatglm_reference(model: nn.Module, inputs: Tensors) -> Tensors:
    """The call and the reading of the states in diffusers' pipelines/kolors/pipeline_kolors.py."""
    states = model(
        input_ids=inputs["ids"],
        attention_mask=inputs["mask"].long(),
        position_ids=inputs["positions"],
        output_hidden_states=True,
    ).hidden_states
    return {"tokens": states[-2].permute(1, 0, 2), "pooled": states[-1][-1]}


def run_chatglm(model: nn.Module, inputs: Tensors) -> Tensors:
    text = model(TokenBatch(**inputs))
    return {"tokens": text.tokens, "pooled": text.pooled}


PAIRS: dict[str, Callable[[], Pair]] = {"unet": unet_pair, "chatglm": chatglm_pair}


def measure(name: str, pair: Pair, rounds: int) -> tuple[list[Error], list[Timing]]:
    """Errors of every case in float64, float32 and bfloat16; times of the first case in the last two."""
    errors: list[Error] = []
    timings: list[Timing] = []
    truths: dict[str, Tensors] = {}
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        kind = str(dtype).removeprefix("torch.")
        if dtype == torch.bfloat16:
            pair.ours.to("meta")  # lets go of the float32 weights, which are then halved one by one
            pair.reference.to(dtype)
            share(pair.reference, pair.ours, pair.component)
        for index, (case, inputs) in enumerate(pair.cases.items()):
            inputs = cast(inputs, dtype)
            with WeightsAs(dtype) if dtype == torch.float64 else nullcontext():
                reference = pair.run_reference(pair.reference, inputs)
                ours = pair.run_ours(pair.ours, inputs)
            truth = truths.setdefault(case, reference)
            errors += compare_outputs(name, case, kind, reference, ours, truth)
            print(f"{name}, {case}, {kind}: {errors[-1].max:.1e}", file=sys.stderr, flush=True)
            if index == 0 and dtype == torch.float64:
                errors += spoil(name, pair, inputs, truth)
            elif index == 0:
                timings.append(alternate(name, case, kind, pair, inputs, rounds))
    return errors, timings


def spoil(model: str, pair: Pair, inputs: Tensors, truth: Tensors) -> list[Error]:
    """The control: the eps of one norm of ours ten times too large, in float64."""
    norm: Any = pair.ours.get_submodule(pair.control)
    eps, norm.eps = norm.eps, norm.eps * 10
    with WeightsAs(torch.float64):
        ours = pair.run_ours(pair.ours, inputs)
    norm.eps = eps
    errors = compare_outputs(model, f"control: {pair.control}.eps x 10", "float64", truth, ours, truth)
    return [replace(error, is_control=True) for error in errors]


def cast(inputs: Tensors, dtype: torch.dtype) -> Tensors:
    """The inputs with all floats in `dtype`; ids, masks and sizes as they are."""
    return {name: x.to(dtype) if x.is_floating_point() else x for name, x in inputs.items()}


def compare_outputs(
    model: str, case: str, dtype: str, reference: Tensors, ours: Tensors, truth: Tensors
) -> list[Error]:
    errors = []
    for output, wanted in reference.items():
        got, wanted, exact = ours[output], wanted.double(), truth[output]
        if got.shape != wanted.shape or got.dtype != reference[output].dtype:
            raise ValueError(f"{model}, {output}: {got.dtype} {list(got.shape)} is not as the reference's")
        got = got.double()
        error = Error(
            model=model, case=case, output=output, dtype=dtype, max=relative(got, wanted),
            mean=float((got - wanted).abs().mean() / wanted.abs().mean()),
            ours_from_float64=relative(got, exact), reference_from_float64=relative(wanted, exact),
        )  # fmt: skip
        errors.append(error)
    return errors


def relative(got: Tensor, wanted: Tensor) -> float:
    return float((got - wanted).abs().max() / wanted.abs().max())


def alternate(model: str, case: str, dtype: str, pair: Pair, inputs: Tensors, rounds: int) -> Timing:
    """Reference, ours, ours, reference in each round: a drift of the machine's speed falls on both alike."""
    seconds: dict[str, list[float]] = {"reference": [], "ours": []}
    cpu_start, wall_start = time.process_time(), time.perf_counter()
    for _ in range(rounds):
        for side in ("reference", "ours", "ours", "reference"):
            start = time.perf_counter()
            if side == "ours":
                pair.run_ours(pair.ours, inputs)
            else:
                pair.run_reference(pair.reference, inputs)
            seconds[side].append(round(time.perf_counter() - start, 4))
    wall = time.perf_counter() - wall_start
    medians = {side: statistics.median(values) for side, values in seconds.items()}
    return Timing(
        model=model, case=case, dtype=dtype, reference=medians["reference"], ours=medians["ours"],
        reference_over_ours=round(medians["reference"] / medians["ours"], 4),
        fastest_reference_over_ours=round(min(seconds["reference"]) / min(seconds["ours"]), 4),
        cpu_share=round((time.process_time() - cpu_start) / (wall * torch.get_num_threads()), 2),
        reference_all=seconds["reference"], ours_all=seconds["ours"],
    )  # fmt: skip


def markdown(errors: Sequence[Error], timings: Sequence[Timing]) -> str:
    lines = [
        "| model | case | output | dtype | ours - reference, max | mean | ours - float64, max "
        "| reference - float64, max |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for e in errors:
        numbers = (e.max, e.mean, e.ours_from_float64, e.reference_from_float64)
        cells = [e.model, e.case, e.output, e.dtype, *(f"{x:.1e}" for x in numbers)]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "| model | case | dtype | reference, s | ours, s | reference / ours | of the fastest | CPU share |",
    ]
    lines.append("|---|---|---|---|---|---|---|---|")
    for t in timings:
        numbers = (t.reference, t.ours, t.reference_over_ours, t.fastest_reference_over_ours, t.cpu_share)
        cells = [t.model, t.case, t.dtype, *(f"{x:.2f}" for x in numbers)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def is_failure(error: Error) -> bool:
    """Written so that a NaN fails, in a control too."""
    if error.is_control:
        return not error.max > BOUNDS[error.dtype]
    return error.dtype in BOUNDS and not error.max <= BOUNDS[error.dtype]


def main() -> int:
    about = "The models at full size against the reference, on the CPU, with random weights."
    parser = argparse.ArgumentParser(prog="python -m benchmarks.full_size", description=about)
    parser.add_argument("--only", choices=sorted(PAIRS), help="one model instead of both")
    parser.add_argument("--rounds", type=int, default=5, help="timing rounds of four forwards")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "full_size.json")
    args = parser.parse_args()
    if args.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {args.rounds}")

    start, where = time.perf_counter(), environment()
    names = [args.only] if args.only else list(PAIRS)
    with torch.inference_mode():
        measured = [measure(name, PAIRS[name](), args.rounds) for name in names]
    errors = [error for pair in measured for error in pair[0]]
    timings = [timing for pair in measured for timing in pair[1]]
    result = {
        "environment": where,
        "seed": SEED,
        "bounds": BOUNDS,
        "seconds": round(time.perf_counter() - start, 1),
        "peak_memory_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 1),
        "errors": [asdict(error) for error in errors],
        "timings": [asdict(timing) for timing in timings],
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(markdown(errors, timings))
    failed = [error for error in errors if is_failure(error)]
    for e in failed:
        print(f"FAILED: {e.model}, {e.case}, {e.output}, {e.dtype}: {e.max:.1e}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

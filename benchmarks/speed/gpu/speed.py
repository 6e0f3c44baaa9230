"""Prompt to image beside the reference: eager, compiled, in float8, with a step cache, and variants."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from benchmarks.side_by_side import Contestant, Race, race, timed
from benchmarks.speed.gpu.place import Place, distance, drawing, our_pipeline, pipelines
from benchmarks.speed.gpu.variants import VARIANTS
from kolors_core.performance.cuda_graphs import CUDAGraphCache
from kolors_core.performance.quantize import quantize

MODE = "reduce-overhead"  # inductor's default, with CUDA graphs
FLOAT8 = "w8a8-fp8-fast"
INTERVAL = 3  # of the step cache
Runs = Mapping[str, Callable[[], object] | None]


def compete(where: Place, runs: Runs, warm_ups: int = 1) -> Race:
    """Race those that there are."""
    contestants = {name: timed(run, where.wait) for name, run in runs.items() if run is not None}
    return race(contestants, where.rounds, warm_ups)


def ratio(found: Race, name: str = "ours") -> float | None:
    """A contestant's time by the reference's, None without it."""
    return found.ratio(name, "reference") if "reference" in found.contestants else None


@contextmanager
def graphs(pipe: Any, cache: CUDAGraphCache | None) -> Iterator[None]:
    """Steps recorded and replayed within, or with None not recorded."""
    before, pipe._wrap_step = pipe._wrap_step, cache
    try:
        yield
    finally:
        pipe._wrap_step = before


def within(context: Callable[[], Any], run: Callable[[], object]) -> Callable[[], None]:
    """A run within a context of its own."""

    def inside() -> None:
        with context():
            run()

    return inside


def settled(context: Callable[[], Any], run: Callable[[], object], where: Place) -> Contestant:
    """The second run within a context: the first may fuse weights, plan or decide."""

    def measure() -> Mapping[str, float]:
        with context():
            run()
            return timed(run, where.wait)()

    return measure


def eager(where: Place) -> None:
    """Both as they are loaded, at both sizes; at the smaller one ours with CUDA graphs too."""
    reference, pipe, why = pipelines(where, where.half, torch.float32)
    cache = CUDAGraphCache()

    def runs(pixels: int) -> dict[str, Callable[[], object] | None]:
        theirs = None if reference is None else drawing(reference, where, pixels)
        return {"reference": theirs, "ours": drawing(pipe, where, pixels)}

    found = compete(where, runs(where.pixels), warm_ups=2)
    where.write("eager", ratio(found), why, seconds_of(found), found)
    few = runs(where.few_pixels)
    assert few["ours"] is not None
    few["graphs"] = within(lambda: graphs(pipe, cache), few["ours"])
    found = compete(where, few, warm_ups=2)
    details = seconds_of(found) | {"size": f"{where.few_pixels}x{where.few_pixels}, {where.steps} steps"}
    where.write("eager_512", ratio(found), why, details, found)
    where.write("graphs_512", ratio(found, "graphs"), why, details, found)


def seconds_of(found: Race) -> dict[str, Any]:
    """Medians by contestant, for rows without a ratio."""
    return {"seconds": {name: round(found.median(name), 4) for name in found.contestants}}


def compiled(where: Place) -> None:
    """Both compiled in inductor's default mode: by repeated blocks; the reference whole, and CUDA graphs.

    Ours is compiled by blocks, and steps are CUDA graphs. max-autotune of the reference's whole UNet would
    take 10 to 25 minutes.
    """
    reference, pipe, why = pipelines(where, where.bfloat16, where.bfloat16)
    ours = drawing(pipe, where, where.pixels)
    plain = latents(pipe, where)
    details = compile_ours(pipe, where)
    where.write("seconds", *absolute(where, ours, details | error_from(plain, pipe, where)))
    cached(where, pipe, "cached", plain, details)
    if reference is None:
        for name in ("compiled_blocks", "compiled"):
            where.write(name, None, why)
        return
    theirs = drawing(reference, where, where.pixels)
    reference.fuse_qkv_projections()
    for model in (reference.unet, reference.vae):
        model.to(memory_format=torch.channels_last)
    options = {"fullgraph": True, "backend": where.backend}
    if where.backend is not None:
        reference.unet.compile_repeated_blocks(**options)
        reference.vae.decode = torch.compile(reference.vae.decode, **options)
    blocks = {"reference": theirs, "ours": within(lambda: graphs(pipe, None), ours)}
    found = compete(where, blocks)
    where.write("compiled_blocks", ratio(found), "without CUDA graphs", details | seconds_of(found), found)
    for module in reference.unet.modules():
        module._compiled_call_impl = None
    if where.backend is not None:
        mode = {"mode": MODE} if where.backend == "inductor" else {}
        reference.unet = torch.compile(reference.unet, **options, **mode)
    began = time.perf_counter()
    theirs()
    details["reference_compile_seconds"] = round(time.perf_counter() - began, 1)
    found = compete(where, {"reference": theirs, "ours": ours})
    note = "the reference compiled whole, fused QKV, channels-last; inductor's default mode on both sides"
    where.write("compiled", ratio(found), note, details | seconds_of(found), found)


def compile_ours(pipe: Any, where: Place, mode: str = MODE) -> dict[str, Any]:
    """Compile, draw once, and return how long that took."""
    began = time.perf_counter()
    if where.backend is not None:
        pipe.compile(mode=mode, backend=where.backend)
    drawing(pipe, where, where.pixels)()
    where.wait()
    return {"compile_seconds": round(time.perf_counter() - began, 1), "mode": mode}


def absolute(
    where: Place, run: Callable[[], object], details: Mapping[str, Any]
) -> tuple[float, str, dict[str, Any], Race]:
    """What a row of seconds is written with: value, note, details and race."""
    found = compete(where, {"ours": run})
    error = details.get("error")
    note = "" if error is None else f"latents {error:.2g} from plain, {details['psnr']:.1f} dB"
    return found.median("ours"), note, dict(details), found


def latents(pipe: Any, where: Place) -> tuple[torch.Tensor, torch.Tensor]:
    """A run's latents, and its image with values from 0 to 1."""
    found = drawing(pipe, where, where.pixels, output_type="latent")().images
    with torch.no_grad():
        return found, drawing(pipe, where, where.pixels, output_type="pt")().images


def error_from(plain: tuple[torch.Tensor, torch.Tensor], pipe: Any, where: Place) -> dict[str, float]:
    """Error of latents, relative, and PSNR of the image."""
    got = latents(pipe, where)
    square = (got[1].double() - plain[1].double()).square().mean().clamp(min=1e-12)
    return {"error": distance(got[0], plain[0]), "psnr": -10 * square.log10().item()}


def cached(where: Place, pipe: Any, name: str, plain: tuple[Any, Any], details: Mapping[str, Any]) -> None:
    """Write the row of the pipeline as it is with a step cache."""
    pipe.enable_step_cache(INTERVAL)
    run = drawing(pipe, where, where.pixels)
    run()  # records each kind of step
    error = error_from(plain, pipe, where)
    where.write(name, *absolute(where, run, {**details, **error}))
    pipe.disable_step_cache()


def fp8(where: Place) -> None:
    """Ours with the UNet's linear layers in float8: eager with graphs, compiled, and with a step cache."""
    pipe = our_pipeline(where, where.config, where.bfloat16, where.bfloat16)
    plain = latents(pipe, where)
    quantize(pipe.unet, FLOAT8)
    run = drawing(pipe, where, where.pixels)
    error = error_from(plain, pipe, where)
    with graphs(pipe, CUDAGraphCache()):  # the compiler may fail: this row is there then
        where.write("fp8", *absolute(where, run, error | {"mode": "eager with CUDA graphs"}))
    details = compile_ours(pipe, where) | {"format": FLOAT8}
    where.write("fp8", *absolute(where, run, details | error_from(plain, pipe, where)))
    cached(where, pipe, "fp8_cached", plain, details)


def variants(where: Place) -> None:
    """Ours eager beside each opt-in variant."""
    pipe = our_pipeline(where, where.config, where.half, torch.float32)
    plain = latents(pipe, where)
    for name, (_, _, context) in VARIANTS.items():
        shares, races = dict[int, float](), list[Race]()
        for pixels in (where.pixels, where.few_pixels):
            run = drawing(pipe, where, pixels)
            runs = {"plain": timed(run, where.wait), "ours": settled(partial(context, pipe), run, where)}
            races.append(race(runs, rounds=1))
            shares[pixels] = races[-1].ratio("ours", "plain")
        with context(pipe):
            error = error_from(plain, pipe, where)
        note = (
            f"{shares[where.few_pixels]:.2f} at {where.few_pixels}; latents {error['error']:.2g} from plain"
        )
        where.write(name, shares[where.pixels], note, {"shares": shares, **error}, races[0])


def autotuned(where: Place) -> None:
    """Ours alone with max-autotune: seconds, no ratio."""
    pipe = our_pipeline(where, where.config, where.bfloat16, where.bfloat16)
    details = compile_ours(pipe, where, "max-autotune")
    where.write("autotuned", *absolute(where, drawing(pipe, where, where.pixels), details))

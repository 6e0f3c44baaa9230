"""What quantising a pipeline reports, and that nothing else of it changes."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kolors_core import KolorsPipeline
from kolors_core.adapters.ip_adapter import ImageCrossAttention
from kolors_core.cli.generate import main
from kolors_core.performance.quantize import is_quantized, model_bytes
from kolors_core.performance.quantize import quantize as quantize_model
from kolors_core.pipelines.png_metadata import read_metadata
from kolors_core.pipelines.quantization_report import quantize
from tests.support.ip_adapters import Both, guided_steps, load_both
from tests.support.offloads import offloaded

PROMPTS = ["一张瓢虫的照片", "a photo of a panda"]


def fresh(dtype: torch.dtype = torch.float32) -> KolorsPipeline:
    pipe = KolorsPipeline.from_pretrained(dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: KolorsPipeline) -> Tensor:
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    return pipe(PROMPTS, num_inference_steps=10, generator=generators, output_type="pt").images


@pytest.mark.parametrize("bits", [8, 4])
def test_the_report_and_the_picture(bits: int) -> None:
    """Of the embedded model: as near as measured, and its state is what it was."""
    pipe = fresh()
    before = draw(pipe)
    cached, global_state = dict(pipe.prompt_cache.kept), torch.random.get_rng_state()
    report = quantize(pipe, text_encoder=bits, unet=bits)
    assert torch.equal(torch.random.get_rng_state(), global_state)
    assert dict(pipe.prompt_cache.kept) == cached and pipe.num_timesteps == 10
    found = report.tokens, report.pooled, report.noise, report.latents
    floors = {8: (0.9999, 0.9999, 0.99999, 0.9999), 4: (0.98, 0.985, 0.9995, 0.98)}[bits]
    roofs = {8: (0.01, 0.02, 0.002, 0.016), 4: (0.12, 0.2, 0.03, 0.25)}[bits]
    for deviation, floor, roof in zip(found, floors, roofs, strict=True):
        assert floor < deviation.cosine < 1 + 1e-6, str(report)
        assert roof / 20 < deviation.error < roof, str(report)
    after = draw(pipe)
    assert len(pipe.prompt_cache.kept) == 2 * len(cached), "embeddings from before are not served"
    ratio = -10 * (after - before).square().mean().log10().item()
    if bits == 8:  # at 4 bits a scene is composed anew: 14 dB, as near as another seed's
        assert 42 < ratio < 80, f"PSNR {ratio:.1f} dB"
    part = report.text_encoder
    assert part is not None and part.format == bits and part.bytes_after == model_bytes(pipe.text_encoder)
    assert part.bytes_after < {8: 0.5, 4: 0.42}[bits] * part.bytes_before
    assert str(report).startswith(f"text_encoder int{bits}, 5.2 -> ")
    assert f"unet int{bits}, 29.6 -> " in str(report) and "latents after 4 steps: cosine 0.9" in str(report)


def test_what_is_left_as_it_is_has_no_error_of_its_own() -> None:
    pipe = fresh(torch.bfloat16)
    report = quantize(pipe, unet=8)
    assert report.text_encoder is None and report.tokens.error == report.pooled.error == 0
    assert 0 < report.noise.error < 0.01 and str(report).startswith("unet int8, 14.8 -> 12.0 MiB, noise: ")
    assert pipe.dtype == torch.bfloat16 and draw(pipe).isfinite().all()
    report = quantize(pipe, text_encoder=4)
    assert report.unet is None and report.noise.error == 0 < report.latents.error < 0.1


def test_arguments_are_checked_before_anything_changes() -> None:
    pipe = fresh()
    assert pipe.text_encoder is not None
    with pytest.raises(ValueError, match="nothing to quantize: give text_encoder=8, unet=8 or another"):
        quantize(pipe)
    with pytest.raises(ValueError, match="a weight's format is 4, 8, .* got 5"):
        quantize(pipe, text_encoder=8, unet=5)
    assert not is_quantized(pipe.text_encoder) and not is_quantized(pipe.unet)
    quantize(pipe, unet=8)
    with pytest.raises(ValueError, match="this UNet2DConditionModel is quantized: cannot quantize it again"):
        quantize(pipe, text_encoder=8, unet=8)
    assert not is_quantized(pipe.text_encoder)
    pipe.text_encoder = None
    with pytest.raises(ValueError, match="no text encoder or tokenizer to measure quantizing with"):
        quantize(pipe, unet=8)


def test_with_an_ip_adapter_before_or_after(both: Both, adapters: list[Path]) -> None:
    """Its branches stay whole, and the images are the same; the adapter leaves again."""
    ours = [KolorsPipeline.from_pipe(both[0], unet=copy.deepcopy(both[0].unet)) for _ in range(2)]
    quantize_model(ours[0].unet, 8)
    load_both((ours[0],), adapters[0])
    load_both((ours[1],), adapters[0])
    report = quantize(ours[1], unet=8)
    assert 0 < report.noise.error < 0.05
    first, second = (guided_steps(pipe) for pipe in ours)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    branches = [module for module in ours[1].unet.modules() if isinstance(module, ImageCrossAttention)]
    assert branches and not any(is_quantized(branch) for branch in branches)
    ours[1].unload_ip_adapter()
    assert not any(isinstance(module, ImageCrossAttention) for module in ours[1].unet.modules())


def test_under_offload_one_model_is_at_work(both: Both, adapters: list[Path]) -> None:
    """Where models run, and back; the numbers are those without offload."""
    pipes = []
    for _ in range(2):
        parts = {"unet": copy.deepcopy(both[0].unet), "text_encoder": copy.deepcopy(both[0].text_encoder)}
        pipes.append(KolorsPipeline.from_pipe(both[0], image_encoder=both[0].image_encoder, **parts))
    plain = quantize(pipes[0], text_encoder=8, unet=4)
    largest = max(model_bytes(model) for (model,) in pipes[1]._models().values())
    with offloaded(pipes[1]) as offload:
        assert quantize(pipes[1], text_encoder=8, unet=4) == plain
        assert (offload.bytes_on_device, offload.peak_bytes) == (0, largest)


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "cat.png"
    command = ["瓢虫", "-o", str(out), "--steps", "2", "--seed", "1", "--device", "cpu", "--unet-bits", "4"]
    command.append("--report")
    assert main([*command, "--text-encoder-bits", "8"]) == 0
    told = read_metadata(out)["quantized"]
    assert told.startswith("text_encoder int8, ") and "; unet int4, " in told
    assert f"quantized: {told}\n" in capsys.readouterr().err
    assert main([*command, "--force", "-q"]) == 0
    assert capsys.readouterr() == (f"{out}\n", "")
    assert read_metadata(out)["quantized"].startswith("unet int4")
    with pytest.raises(SystemExit):
        main([*command, "--unet-bits", "3"])

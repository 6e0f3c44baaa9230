"""The examples of the change map: each is README's path with one change of at most 30 lines, and it holds."""

import ast
import difflib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor

from kolors_core import KolorsImg2ImgPipeline, KolorsPipeline
from kolors_core.attention import KERNELS
from kolors_core.checkpoint import EMBEDDED, load_component, load_modified, save_component
from kolors_core.conditioning import Conditioning
from kolors_core.guidance import guided
from kolors_core.loading import load, zeros
from kolors_core.sampling import euler
from kolors_core.schedulers import DPMSolverMultistepScheduler
from tests.support.parity import assert_parity
from tests.support.small import FLOAT32, relative_error
from tests.test_readme import block_after
from weights_convert import TABLES
from weights_convert.__main__ import convert
from weights_convert.atomic_write import copy_file
from weights_convert.safetensors_files import Source, Tensors

FOLDER = Path(__file__).parent / "examples"
NAMES = sorted(file.stem for file in FOLDER.glob("*.py"))
MOST_LINES = 30  # of a diff, added and removed, blank ones too
PROMPT = "一张瓢虫的照片"


class Examples:
    """Runs each script once, as it is, in a folder of its own."""

    def __init__(self, place: Path) -> None:
        self.place, self.names, self.pictures = place, dict[str, dict[str, Any]](), dict[str, np.ndarray]()

    def __call__(self, name: str) -> dict[str, Any]:
        """What stands at the script's top level when it is over."""
        if name not in self.names:
            names: dict[str, Any] = {}
            with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng():
                patch.chdir(self.place)
                exec(compile((FOLDER / f"{name}.py").read_text(), f"{name}.py", "exec"), names)
            self.names[name] = names
            self.pictures[name] = np.asarray(Image.open(self.place / "ladybug.png")).astype(int)
            (self.place / "ladybug.png").unlink()
        return self.names[name]

    def picture(self, name: str) -> np.ndarray:
        self(name)
        return self.pictures[name]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Examples]:
    kernels, tables = set(KERNELS), set(TABLES)
    yield Examples(tmp_path_factory.mktemp("examples"))
    for registry, before in ((KERNELS, kernels), (TABLES, tables)):
        for name in set(registry) - before:
            del registry[name]


def pipeline(names: dict[str, Any]) -> KolorsPipeline:
    """One of a script's models."""
    scheduler = DPMSolverMultistepScheduler(use_karras_sigmas=True)
    pipe = KolorsPipeline(names["vae"], names["chatglm"], names["tokenizer"], names["unet"], scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def drawn(pipe: KolorsPipeline, kind: str, steps: int = 8, **arguments: Any) -> Any:
    """What a pipeline makes with the noise of the scripts: latents, or an image."""
    seed = torch.Generator().manual_seed(7)
    made = pipe(num_inference_steps=steps, generator=seed, output_type=kind, **arguments).images
    return made if kind == "latent" else made[0]


def loss_of(names: dict[str, Any], added: Tensor | None = None) -> Tensor:
    """DDPM's training loss (eq. 14) of a script's UNet on what the script made, at four times."""
    at, draw = torch.arange(100, 900, 200), torch.Generator().manual_seed(0)
    sigma = names["schedule"].training_sigmas[at][:, None, None, None]
    noise = torch.randn(4, 4, 16, 16, generator=draw)
    latents = (names["latents"] + sigma * noise) / (1 + sigma**2).sqrt()
    told = (names["text"].tokens[:1].detach(), names["text"].pooled[:1].detach(), names["sizes"])
    every = (each.expand(4, *each.shape[1:]) for each in told)
    return (names["unet"](latents, at.float(), *every, added=added) - noise).square().mean()


def learns(loss: Callable[[], Tensor], parameters: list[torch.nn.Parameter]) -> None:
    """One step down the gradient lowers the loss, and every parameter is moved by it."""
    before = loss()
    steps = torch.autograd.grad(before, parameters)
    assert all(step.any() for step in steps)
    length = 1e-2 / torch.cat([step.flatten() for step in steps]).norm()
    with torch.no_grad():
        for parameter, step in zip(parameters, steps, strict=True):
            parameter -= length * step
        assert loss() < before


def code(name: str) -> list[str]:
    """A script's lines after its docstring."""
    text = (FOLDER / f"{name}.py").read_text()
    return text.splitlines()[ast.parse(text).body[0].end_lineno :]


def test_plain_is_the_path_that_the_readme_writes_out() -> None:
    written = block_after("## The whole path", "python").replace("schedule(25)", "schedule(8)")
    assert [line for line in code("plain") if line] == [line for line in written.splitlines() if line]


@pytest.mark.parametrize("name", [name for name in NAMES if name != "plain"])
def test_each_is_a_small_change_and_says_what_to_look_at(name: str) -> None:
    lines = difflib.unified_diff(code("plain"), code(name), n=0, lineterm="")
    changed = [line for line in lines if line[0] in "+-" and line[:3] not in ("+++", "---")]
    assert 0 < len(changed) <= MOST_LINES
    said = ast.get_docstring(ast.parse((FOLDER / f"{name}.py").read_text())) or ""
    assert "\nIn the library: " in said and "\nLook at: " in said
    assert "https://arxiv.org/abs/" in said or name == "checkpoint_format"


def test_the_kernel_is_exact_and_draws_the_same(run: Examples) -> None:
    names, draw = run("attention_kernel"), torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, n, 8, generator=draw, dtype=torch.float64) for n in (9, 70, 70))
    seen = torch.rand(2, 1, 9, 70, generator=draw) > 0.5
    seen[0, :, :, :40] = False  # a whole block of keys, and more
    for bias in (None, seen, 5 * torch.randn(2, 1, 1, 70, generator=draw, dtype=torch.float64)):
        assert relative_error(names["online"](q, k, v, bias), KERNELS["sdpa"](q, k, v, bias)) < 1e-14
    # Eight guided steps magnify the rounding of another order of sums.
    assert_parity(names["latents"], run("plain")["latents"], 4 * FLOAT32)
    assert abs(run.picture("attention_kernel") - run.picture("plain")).max() <= 1


def test_the_sampler_is_of_second_order(run: Examples) -> None:
    """On images that are normal with variance 4, of which the solution is known."""
    heun, x = run("sampler")["heun"], torch.ones(1, 4, 2, 2, dtype=torch.float64)
    wanted = x * ((4 + 0.1**2) / (4 + 10.0**2)) ** 0.5
    errors = {}
    for sampler in (heun, euler):
        for steps in (16, 32):
            sigmas = torch.logspace(1, -1, steps + 1, dtype=torch.float64)
            made = sampler(lambda x, sigma: x * 4 / (4 + sigma**2), x, sigmas)
            errors[sampler, steps] = relative_error(made, wanted)
    assert 3.5 < errors[heun, 16] / errors[heun, 32] < 4.5
    assert 1.8 < errors[euler, 16] / errors[euler, 32] < 2.2


def test_a_pipeline_takes_the_sampler(run: Examples) -> None:
    names = run("sampler")
    pipe = pipeline(names)
    pipe.sampler = names["heun"]
    assert_parity(drawn(pipe, "latent", prompt=PROMPT), names["latents"], FLOAT32)
    assert KolorsImg2ImgPipeline.from_pipe(pipe).sampler is names["heun"]
    made = drawn(pipe, "pil", steps=1, prompt=PROMPT)
    assert made.info["sampler"] == "heun with DPMSolverMultistepScheduler(use_karras_sigmas=True)"
    with pytest.raises(TypeError, match=r"sampler must be a function like sampling.euler or None, got str"):
        pipe.sampler = "heun"


@torch.no_grad()
def test_the_guidance_rule_is_its_papers_equation(run: Examples) -> None:
    names = run("guidance_rule")
    unet, schedule, halves = names["unet"], names["schedule"], (names["negative"], names["positive"])
    x, sigma = names["noise"] * schedule.init_noise_sigma, schedule.sigmas[0].item()
    uncond, cond = ((x - guided(unet, schedule, half)(x, sigma)) / sigma for half in halves)
    fit = torch.vdot(cond.flatten(), uncond.flatten()) / uncond.norm() ** 2
    noise = (1 - 10) * fit * uncond + 10 * cond
    assert_parity((x - names["denoise"](x, sigma)) / sigma, noise, 1e-5)
    plain = guided(unet, schedule, *halves[::-1], scale=10.0)
    other = names["dpmpp_2m"](plain, x, schedule.sigmas)
    assert names["latents"].std() < 0.99 * other.std()  # which is what looks calmer


def test_a_pipeline_takes_the_guidance_rule(run: Examples) -> None:
    names = run("guidance_rule")
    pipe = pipeline(names)
    pipe.guided = names["fitted"]
    made = drawn(pipe, "latent", steps=12, guidance_scale=10.0, prompt=PROMPT)
    assert_parity(made, names["latents"], 1e-4)  # guidance of 10 amplifies what is rounded
    assert drawn(pipe, "pil", steps=1, guidance_scale=1.0, prompt=PROMPT).info["guidance"] == "fitted"


def test_the_block_keeps_the_old_weights_and_learns_and_is_saved(run: Examples, tmp_path: Path) -> None:
    names, plain = run("block"), run("plain")
    unet, report, old = names["unet"], names["report"], plain["unet"].state_dict()
    assert len(report.missing) == 14 and not report.misshapen and not report.unexpected
    assert all(name.endswith(("feed_forward.gamma", "feed_forward.beta")) for name in report.missing)
    assert set(report.loaded) == set(old) == set(unet.state_dict()) - set(report.missing)
    assert all(torch.equal(unet.state_dict()[name], old[name]) for name in old)
    assert (run.picture("block") == run.picture("plain")).all()
    learns(lambda: loss_of(names), [unet.get_parameter(name) for name in report.missing])
    save_component(unet, tmp_path, "unet")
    again, all_there = load_modified(tmp_path, "unet", names["build"], {})
    assert not all_there.missing and again.state_dict()["mid.attentions.0.blocks.0.feed_forward.gamma"].any()
    with pytest.raises(ValueError, match=r"unexpected: .*feed_forward\.beta"):
        load_component(tmp_path, "unet")
    with pytest.raises(ValueError, match=r"blocks.0.feed_forward.beta is missing.* give an initializer"):
        load_modified(EMBEDDED, "unet", names["build"], {"*.gamma": zeros})
    with pytest.raises(FileNotFoundError, match="no such folder, expected the unet .*`resolve` fetches"):
        load_modified(tmp_path / "none", "unet", names["build"], {})


def test_the_width_changes_nothing_at_first_and_learns(run: Examples) -> None:
    names, plain = run("width"), run("plain")
    unet, report = names["unet"], names["report"]
    reading = [f"{name}.weight" for name, _ in unet.named_modules() if name.endswith((".to_k", ".to_v"))]
    reading = [name for name in reading if ".cross_attention." in name]
    assert sorted(report.misshapen) == sorted([*reading, "text_proj.bias", "text_proj.weight"])
    assert_parity(names["latents"], plain["latents"], FLOAT32)
    assert abs(run.picture("width") - run.picture("plain")).max() <= 1
    columns = [unet.get_parameter(name) for name in reading]
    learns(lambda: loss_of(names), columns)
    assert all(column[:, 192:].any() for column in columns)
    with torch.no_grad():  # as if both had started at zero
        for tensor in (*columns, unet.text_proj.weight.T, unet.text_proj.bias[None]):
            tensor[:, 192:] = 0
    assert not any(step[:, 192:].any() for step in torch.autograd.grad(loss_of(names), columns))


def test_the_condition_changes_nothing_at_first_and_learns(run: Examples) -> None:
    names = run("condition")
    assert (run.picture("condition") == run.picture("plain")).all()
    last, scored = names["score_embedding"].linear_2, names["scored"]
    learns(lambda: loss_of(names, scored(8.0, 8.0, 8.0, 8.0)), list(last.parameters()))
    with torch.no_grad():
        for parameter in last.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(0))
        high, low = (replace(names["positive"], added=scored(score)) for score in (8.0, 2.0))
        x, how = names["noise"], (names["unet"], names["schedule"])
        sigma = names["schedule"].sigmas[3].item()
        once, always = (guided(*how, high, low, 5.0, precompute=way)(x, sigma) for way in (True, False))
        assert_parity(once, always, FLOAT32)
        assert relative_error(guided(*how, high)(x, sigma), guided(*how, low)(x, sigma)) > 1e-2
    with pytest.raises(ValueError, match="1 of 2 conditions have `added`, expected all or none"):
        Conditioning.cat(high, run("plain")["negative"])


def test_the_text_encoder_has_learned_and_a_pipeline_reads_it(run: Examples) -> None:
    names, plain = run("text_encoder"), run.picture("plain")
    assert abs(run.picture("text_encoder") - plain).mean() < 20  # of 255; other things and seeds: 29 to 49
    assert all(parameter.grad.any() for parameter in names["encoder"].parameters())
    (tokens, negative), (pooled, negative_pooled) = (
        names["text"].tokens.split(1), names["text"].pooled.split(1),
    )  # fmt: skip
    made = drawn(
        pipeline(names), "latent", prompt_embeds=tokens, negative_prompt_embeds=negative,
        pooled_prompt_embeds=pooled, negative_pooled_prompt_embeds=negative_pooled,
    )  # fmt: skip
    assert_parity(made, names["latents"], FLOAT32)


def test_the_format_is_the_references_and_closed_both_ways(run: Examples, tmp_path: Path) -> None:
    names = run("checkpoint_format")
    table, source = names["OLD_VAE"], Source([run.place / names["file"]])
    assert (run.picture("checkpoint_format") == run.picture("plain")).all()
    assert sum(".proj_attn." in name for name in source) == 4 and not any(".to_q." in name for name in source)
    assert all(table.to_public(table.to_ours(name)) == name for name in source)
    assert not table.faults({name: source.shape(name) for name in source})
    copy_file(EMBEDDED / "vae" / "config.json", tmp_path / "config.json")
    copy_file(run.place / names["file"], tmp_path / "diffusion_pytorch_model.safetensors")
    theirs = AutoencoderKL.from_pretrained(tmp_path).state_dict()
    assert {TABLES["vae"].to_public(name) for name in names["vae"].state_dict()} == set(theirs)
    for name, tensor in names["vae"].state_dict().items():
        assert torch.equal(tensor, theirs[TABLES["vae"].to_public(name)]), name

    gone = "decoder.mid_block.attentions.0.key.weight"
    less = Tensors({name: source[name] for name in source if name != gone}, "less")
    with pytest.raises(ValueError, match="less: vae: .* 1 missing: decoder.mid.attention.to_k.weight"):
        load(names["vae"], less, "vae")
    with pytest.raises(ValueError, match="more: vae: .* 1 unexpected: encoder.extra"):
        load(names["vae"], Tensors(dict(source) | {"encoder.extra": torch.ones(1)}, "more"), "vae")
    report = load(load_component(EMBEDDED, "vae"), less, "vae", partial={"*.to_k.weight": zeros})
    assert report.missing == ["decoder.mid.attention.to_k.weight"] and not report.unexpected
    convert(run.place / names["file"], tmp_path / "ours.safetensors")
    assert set(Source([tmp_path / "ours.safetensors"])) == set(names["vae"].state_dict())

"""Arguments of calls: what changes nothing is a warning that names it, and help describes every one."""

import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import kolors_core
from kolors_core import KolorsImg2ImgPipeline, KolorsPAGPipeline
from kolors_core.pipelines.request import Extras, KolorsPipelineOutput
from tests.support.ip_adapters import Both
from tests.support.parity import assert_parity
from tests.support.pipelines import Pair, embeddings, picture, steps_of

pytestmark = pytest.mark.numerical
TASKS = [name for name in kolors_core.__all__ if re.fullmatch("Kolors.*Pipeline", name)]
UNGUIDED = {"guidance_scale": 1.0}
IDLE: list[tuple[dict[str, Any], str]] = [  # arguments, and the one that changes nothing beside the others
    (UNGUIDED | {"negative_prompt": "red"}, "negative_prompt"),
    (UNGUIDED | {"negative_original_size": (8, 8)}, "negative_original_size"),
    (UNGUIDED | {"negative_target_size": (8, 8)}, "negative_target_size"),
    (UNGUIDED | {"negative_crops_coords_top_left": (8, 8)}, "negative_crops_coords_top_left"),
    ({"timesteps": [900, 300], "num_inference_steps": 2}, "num_inference_steps"),
    ({"eta": 0.5}, "eta"),
    ({"callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"]}, ""),
    ({"cross_attention_kwargs": {"scale": 0.5}}, "the scale in cross_attention_kwargs"),
]


@pytest.mark.parametrize(("arguments", "named"), IDLE, ids=lambda value: str(value)[:40])
def test_what_changes_nothing_is_a_warning(
    pipes: Pair, arguments: dict[str, Any], named: str, caplog: pytest.LogCaptureFixture
) -> None:
    """It names the argument, once; the images are the reference's."""
    given = {"prompt": "cat", "num_inference_steps": 2} | arguments
    mine, other = (steps_of(pipe, **given) for pipe in pipes)
    warnings = [record.getMessage() for record in caplog.records if record.name == "kolors_core"]
    assert [text.partition(" has no effect ")[0] for text in warnings] == [named] * bool(named)
    assert_parity(mine[-1], other[-1], 5e-6, lambda: named)


def test_embeddings_without_guidance_are_a_warning(pipes: Pair, caplog: pytest.LogCaptureFixture) -> None:
    given = embeddings(pipes[0], "cat") | UNGUIDED | {"num_inference_steps": 2}
    mine, other = (steps_of(pipe, **given) for pipe in pipes)
    assert "negative_prompt_embeds has no effect without guidance" in caplog.text
    assert_parity(mine[-1], other[-1], 5e-6, lambda: "")


@pytest.mark.exact
def test_callback_names_without_a_callback_are_a_warning(
    pipes: Pair, caplog: pytest.LogCaptureFixture
) -> None:
    given: Any = {"num_inference_steps": 1, "height": 64, "width": 64, "output_type": "latent"}
    pipes[0]("cat", callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"], **given)
    assert "callback_on_step_end_tensor_inputs has no effect without callback_on_step_end" in caplog.text


def test_strength_beside_a_start_and_a_pag_scale_of_0(pipes: Pair, caplog: pytest.LogCaptureFixture) -> None:
    image = KolorsImg2ImgPipeline.from_pipe(pipes[0])
    made = [
        steps_of(image, prompt="cat", image=picture(), denoising_start=0.5, **more)[-1]
        for more in ({}, {"strength": 0.6})
    ]
    assert torch.equal(*made)
    assert "strength has no effect beside denoising_start" in caplog.text
    steps_of(KolorsPAGPipeline.from_pipe(pipes[0]), prompt="cat", pag_scale=0.0, pag_adaptive_scale=0.1)
    assert "pag_adaptive_scale has no effect with pag_scale 0" in caplog.text


def test_a_scale_of_a_block_without_transformers(loaded: Both, caplog: pytest.LogCaptureFixture) -> None:
    """The reference takes it, too, and gives the others 0."""
    for pipe in loaded:
        pipe.set_ip_adapter_scale({"down": {"block_0": 1.0}, "up": {"block_0": 0.7}})
    assert "the scale of down.block_0 has no effect: it has no transformers" in caplog.text
    given = {"prompt": "cat", "ip_adapter_image": picture(3), "num_inference_steps": 1}
    assert_parity(*(steps_of(pipe, **given)[-1] for pipe in loaded), 5e-6, lambda: "")


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("num_inference_step", "did you mean num_inference_steps?"),
        ("negativ_prompt", "did you mean negative_prompt?"),
        ("controlnet_scale", "did you mean controlnet_conditioning_scale?"),
        ("hight", "did you mean height?"),
        ("steps", "did you mean num_inference_steps?"),
        ("guidance", "did you mean guidance_scale?"),
        ("seed", "did you mean generator=torch.Generator().manual_seed(...)?"),
        ("image", "did you mean KolorsImg2ImgPipeline?"),
        ("zzz", "lists them"),
    ],
)
@pytest.mark.exact
def test_a_misspelled_argument_suggests_the_right_one(pipes: Pair, wrong: str, right: str) -> None:
    pipe = pipes[0]
    with pytest.raises(TypeError, match=f"'{wrong}' is no argument of KolorsPipeline.*{re.escape(right)}"):
        pipe("cat", **{wrong: 3})  # pyright: ignore[reportArgumentType, reportCallIssue]


@pytest.mark.exact
def test_each_task_suggests_its_own(pipes: Pair) -> None:
    pipe = KolorsPAGPipeline.from_pipe(pipes[0])
    with pytest.raises(TypeError, match="KolorsPAGPipeline, did you mean pag_scale?"):
        pipe("cat", pagscale=3)  # pyright: ignore[reportCallIssue]


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.exact
def test_help_describes_every_argument(task: str) -> None:
    """Each is named before the colon of a description, or among several that one describes."""
    call = getattr(kolors_core, task).__call__
    text = " ".join((call.__doc__ or "").split())
    named = re.findall(r"((?:[a-z_]+(?:,| and) )*[a-z_]+):", text)
    described = {name for names in named for name in re.findall(r"[a-z_]+", names)}
    wanted = {*inspect.signature(call).parameters, *Extras.__annotations__} - {"self", "extras", "arguments"}
    assert wanted - described == set()


@pytest.mark.exact
def test_the_output_is_a_tuple_and_a_mapping(pipes: Pair) -> None:
    out = KolorsPipelineOutput(["one"])
    (images,) = out
    assert images == out.images == out["images"] == out[0] == {**out}["images"] == dict(out)["images"]
    assert isinstance(out, tuple) and out[:1] == (["one"],) == out.to_tuple()
    assert (list(out.keys()), list(out.values()), list(out.items())) == (
        ["images"], [["one"]], [("images", ["one"])],
    )  # fmt: skip
    with pytest.raises(KeyError):
        out["image"]
    given: Any = {"num_inference_steps": 1, "height": 64, "width": 64, "output_type": "latent"}
    assert len(pipes[0]("cat", return_dict=False, **given)) == 1


@pytest.mark.exact
def test_an_editor_knows_what_a_call_returns(tmp_path: Path) -> None:
    """Pyright takes `.images[0].save(...)` of any task, as users write it."""
    pyright = pytest.importorskip("pyright")
    file = tmp_path / "user.py"
    lines = [f"from kolors_core import {', '.join(TASKS)}"]
    lines += [f'{task}.from_pretrained("tiny")("cat").images[0].save("x.png")' for task in TASKS]
    file.write_text("\n".join(lines) + "\n")
    run = pyright.run("--pythonpath", __import__("sys").executable, str(file), capture_output=True, text=True)
    assert run.returncode == 0, run.stdout

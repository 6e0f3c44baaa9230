"""Loading and saving with the reference's arguments: each at its neutral value, and refused at another."""

from pathlib import Path
from typing import Any

import pytest
import torch

import kolors_core
from kolors_core import KolorsImg2ImgPipeline, KolorsPipeline
from kolors_core.compat import models, pipeline_files, schedulers, tokenizer
from kolors_core.pipelines import image_to_image, text_to_image
from kolors_core.unet import UNet


@pytest.mark.parametrize("name", sorted(pipeline_files.NEUTRAL))
def test_an_argument_is_taken_at_its_neutral_values_and_refused_at_others(name: str) -> None:
    names = pipeline_files.ADAPTERS if name in pipeline_files.LORA_ONLY else pipeline_files.NEUTRAL
    for value in pipeline_files.NEUTRAL[name][0]:
        assert pipeline_files.without_neutral({name: value, "other": 3}, names) == {"other": 3}
    with pytest.raises(ValueError, match=f"^{name}='something' has no place here: "):
        pipeline_files.without_neutral({name: "something"}, names)


def test_an_unknown_argument_is_refused() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'torch_dtyp'"):
        KolorsPipeline.from_pretrained("tiny", torch_dtyp=torch.float16)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", torch.float16, {"unet": "bfloat16"}, None])
def test_a_dtype_by_name(dtype: Any) -> None:
    pipe = KolorsPipeline.from_pretrained("tiny", torch_dtype=dtype, device="meta")
    wanted = dtype["unet"] if isinstance(dtype, dict) else "float32" if dtype is None else dtype
    assert pipe.dtype == (getattr(torch, wanted) if isinstance(wanted, str) else wanted)


def test_auto_is_float32_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    assert KolorsPipeline.from_pretrained("tiny", torch_dtype="auto", device="meta").dtype == torch.float32
    assert "torch_dtype='auto' is float32" in caplog.text
    with pytest.raises(ValueError, match="torch_dtype must be a dtype or its name.*'half a float'"):
        KolorsPipeline.from_pretrained("tiny", torch_dtype="half a float")


def test_a_device_is_named_once() -> None:
    with pytest.raises(ValueError, match="two names of one argument"):
        KolorsPipeline.from_pretrained("tiny", device="meta", device_map="cpu")


def assert_drop_in(pipe: Any) -> None:
    """All parts answer as the reference's do."""
    assert isinstance(pipe.unet, models.UNet2DConditionModel) and isinstance(pipe.vae, models.AutoencoderKL)
    assert isinstance(pipe.text_encoder, models.ChatGLMModel)
    assert isinstance(pipe.tokenizer, tokenizer.ChatGLMTokenizer)
    assert isinstance(pipe.scheduler, schedulers.StatefulScheduler)


def test_every_way_to_load_gives_the_drop_in_parts(reference_folder: Path, whole_file: Path) -> None:
    assert_drop_in(KolorsPipeline.from_pretrained(reference_folder))
    single = KolorsPipeline.from_single_file(whole_file)
    assert_drop_in(single)
    assert single.name_or_path == str(whole_file)
    assert_drop_in(KolorsImg2ImgPipeline.from_pipe(single))


def test_plain_and_drop_in_pipelines_are_made_of_each_other(reference_folder: Path) -> None:
    """And draw the same bits."""
    given: Any = {"height": 32, "width": 32, "num_inference_steps": 2, "output_type": "latent"}
    plain = text_to_image.KolorsPipeline.from_pretrained(reference_folder)
    plain.set_progress_bar_config(disable=True)
    drop_in = KolorsPipeline.from_pipe(plain)
    assert type(plain.unet) is UNet and drop_in.unet is plain.unet
    assert isinstance(drop_in.scheduler, schedulers.StatefulScheduler)
    assert type(image_to_image.KolorsImg2ImgPipeline.from_pipe(drop_in)).__module__.startswith(
        "kolors_core.pipelines"
    )
    loaded = KolorsPipeline.from_pretrained(reference_folder)
    loaded.set_progress_bar_config(disable=True)
    drawn = [
        pipe("cat", generator=torch.Generator().manual_seed(3), **given).images
        for pipe in (plain, drop_in, loaded)
    ]
    assert torch.equal(drawn[0], drawn[1]) and torch.equal(drawn[0], drawn[2])


def test_diffusion_pipeline_refuses_what_is_not_kolors(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionXLPipeline"}')
    for loader in (kolors_core.DiffusionPipeline, kolors_core.AutoPipelineForText2Image):
        with pytest.raises(ValueError, match="is a 'StableDiffusionXLPipeline', expected"):
            loader.from_pretrained(tmp_path)


def test_the_loaders_choose_the_class_of_a_task() -> None:
    pipe = KolorsPipeline.from_pretrained("tiny", device="meta")
    assert isinstance(pipe, kolors_core.DiffusionPipeline)
    for loader, name, options in (
        (kolors_core.AutoPipelineForInpainting, "KolorsInpaintPipeline", {}),
        (kolors_core.AutoPipelineForImage2Image, "KolorsImg2ImgPipeline", {}),
        (kolors_core.AutoPipelineForText2Image, "KolorsPAGPipeline", {"enable_pag": True}),
    ):
        assert type(loader.from_pipe(pipe, **options)).__name__ == name
        assert type(loader.from_pretrained("tiny", device="meta", **options)).__name__ == name
    with pytest.raises(ValueError, match="enable_pag is for text to image"):
        kolors_core.AutoPipelineForInpainting.from_pipe(pipe, enable_pag=True)


def test_a_foreign_folder_is_not_replaced(reference_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("years")
    pipe = KolorsPipeline.from_pretrained(reference_folder)
    with pytest.raises(FileExistsError):
        pipe.save_pretrained(tmp_path / "mine")
    assert (tmp_path / "mine" / "notes.txt").read_text() == "years"

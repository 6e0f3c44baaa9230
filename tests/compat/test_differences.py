"""What stays different from the reference: each row of the table in compat/README.md, and no other."""

import copy
import logging
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

import kolors_core
from kolors_core import EulerDiscreteScheduler, KolorsImg2ImgPipeline, KolorsPipeline
from kolors_core.adapters.lora import attach
from tests.support.pipelines import Pair, picture
from weights_convert import TABLES

README = Path(kolors_core.__file__).parent / "compat" / "README.md"
Check = Callable[[KolorsPipeline, diffusers.KolorsPipeline, Path], None]
CHECKS: dict[str, Check] = {}  # by the row's first cell
CALL: dict[str, Any] = {"num_inference_steps": 1, "height": 32, "width": 32, "output_type": "latent"}


def row(cell: str) -> Callable[[Check], Check]:
    def register(check: Check) -> Check:
        CHECKS[cell] = check
        return check

    return register


@row("`pipe.unet.set_attn_processor(...)`")
def processors(ours: Any, theirs: Any, folder: Path) -> None:
    theirs.unet.set_attn_processor(diffusers.models.attention_processor.AttnProcessor2_0())
    with pytest.raises(NotImplementedError, match="unet.py.*record_attention.*set_attention_backend"):
        ours.unet.set_attn_processor(object())


@row("`pipe.unet.state_dict()` has the public names")
def names(ours: Any, theirs: Any, folder: Path) -> None:
    public = {TABLES["unet"].to_public(name) for name in ours.unet.state_dict()}
    assert public == set(theirs.unet.state_dict()) != set(ours.unet.state_dict())


@row("`pipe.unet.add_adapter(LoraConfig(...))`")
def add_adapter(ours: Any, theirs: Any, folder: Path) -> None:
    assert hasattr(theirs.unet, "add_adapter") and not hasattr(ours.unet, "add_adapter")
    adapter = attach(ours.unet, rank=4)
    assert ours.get_list_adapters()["unet"]
    adapter.detach()


@row("`EulerDiscreteScheduler()` has Stable Diffusion's defaults")
def defaults(ours: Any, theirs: Any, folder: Path) -> None:
    names = ("num_train_timesteps", "beta_schedule", "timestep_spacing")
    mine, other = EulerDiscreteScheduler().config, diffusers.EulerDiscreteScheduler().config
    assert [mine[name] for name in names] == [1100, "scaled_linear", "leading"]
    assert [other[name] for name in names] == [1000, "linear", "linspace"]


@row("`save_pretrained(..., safe_serialization=False)`")
def pickles(ours: Any, theirs: Any, folder: Path) -> None:
    for part in (ours, ours.unet):
        with pytest.raises(ValueError, match="safe_serialization=False would write a pickle"):
            part.save_pretrained(folder / "k", safe_serialization=False)


@row("`torch_dtype=torch.float16` loads the VAE so")
def half(ours: Any, theirs: Any, folder: Path) -> None:
    pipe = KolorsPipeline.from_pretrained("tiny", torch_dtype=torch.float16)
    assert (pipe.unet.dtype, pipe.vae.dtype) == (torch.float16, torch.float32)


@row('`torch_dtype="float16"` warns and loads float32')
def dtype_by_name(ours: Any, theirs: Any, folder: Path) -> None:
    assert KolorsPipeline.from_pretrained("tiny", torch_dtype="float16").dtype == torch.float16


@row("`for name in pipe(...)`")
def iteration(ours: Any, theirs: Any, folder: Path) -> None:
    (images,) = ours("cat", **CALL)
    assert len(images) == 1 and list(theirs("cat", **CALL)) == ["images"]


@row('`device_map="balanced"` spreads models over devices')
def device_map(ours: Any, theirs: Any, folder: Path) -> None:
    pipe = KolorsPipeline.from_pretrained("tiny", device_map="balanced")
    assert pipe.device == (torch.device("cpu") if not torch.cuda.is_available() else pipe.offload.device)
    for other in ("auto", "balanced_low_0", {"unet": "cpu"}):
        with pytest.raises(ValueError, match="device_map must be a device, such as 'cuda', or 'balanced'"):
            KolorsPipeline.from_pretrained("tiny", device_map=other)
    assert KolorsPipeline.from_pretrained("tiny", device_map="cpu").hf_device_map == "cpu"


@row("`from_pipe(pipe)` casts to float32")
def from_pipe(ours: Any, theirs: Any, folder: Path) -> None:
    assert KolorsImg2ImgPipeline.from_pipe(ours).dtype == torch.float64
    assert KolorsPipeline.from_pipe(KolorsPipeline.from_pretrained("tiny"), torch_dtype="bfloat16").dtype == (
        torch.bfloat16
    )


@row("`pipe.unet.down_blocks[0]`")
def modules(ours: Any, theirs: Any, folder: Path) -> None:
    assert not hasattr(ours.unet, "down_blocks") and len(ours.unet.down) == len(theirs.unet.down_blocks)


@row("`pipe.config[...] = ...`")
def config(ours: Any, theirs: Any, folder: Path) -> None:
    with pytest.raises(TypeError, match=r"read only: pipe.register_to_config\(x=...\)"):
        ours.config["x"] = 3
    ours.register_to_config(x=3)
    assert ours.config.x == 3


@row("`KolorsImg2ImgPipeline` without sizes tells the UNet its default size")
def sizes(ours: Any, theirs: Any, folder: Path) -> None:
    seen: list[Any] = []

    def see(pipe: Any, i: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append(tensors["add_time_ids"][0].tolist())
        return {}

    given: Any = {"num_inference_steps": 2, "strength": 0.5, "callback_on_step_end": see}
    given |= {"callback_on_step_end_tensor_inputs": ["add_time_ids"], "output_type": "latent"}
    for pipe in (KolorsImg2ImgPipeline.from_pipe(ours), diffusers.KolorsImg2ImgPipeline(**theirs.components)):
        pipe.set_progress_bar_config(disable=True)
        pipe("cat", image=picture(1, 32, 32), **given)
    assert seen == [[32, 32, 0, 0, 32, 32], [128, 128, 0, 0, 128, 128]]


@row("`load_lora_weights(..., hotswap=True)`")
def hotswap(ours: Any, theirs: Any, folder: Path) -> None:
    with pytest.raises(ValueError, match=r"hotswap=True has no place here: call delete_adapters\(name\)"):
        ours.load_lora_weights({}, adapter_name="one", hotswap=True)


@row("`lora_state_dict(...)` converts other spellings")
def lora_state_dict(ours: Any, theirs: Any, folder: Path) -> None:
    state = {"lora_unet_mid_block_x.lora_down.weight": torch.ones(2, 2)}
    assert KolorsPipeline.lora_state_dict(state) == (state, None)


@row("`enable_attention_slicing()`, `enable_xformers_memory_efficient_attention()`")
def nothing_to_do(ours: Any, theirs: Any, folder: Path) -> None:
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("kolors_core").addHandler(handler)
    ours.enable_attention_slicing()
    ours.enable_xformers_memory_efficient_attention()
    logging.getLogger("kolors_core").removeHandler(handler)
    assert len(said) == 2 and all("has no effect: attention runs torch's fused" in line for line in said)


@row("`pipe.fuse_qkv_projections(vae=True)` fuses the VAE's one attention too")
def fuse_projections(ours: Any, theirs: Any, folder: Path) -> None:
    def fused(vae: Any) -> bool:
        return any(hasattr(part, "to_qkv") for part in vae.modules())

    ours.fuse_qkv_projections(vae=True)
    theirs.fuse_qkv_projections(vae=True)
    kinds = {type(part).__name__ for part in ours.unet.modules()}
    assert "FusedAttention" in kinds and fused(theirs.vae) and not fused(ours.vae)
    ours.fuse_qkv_projections(unet=False)
    ours.unfuse_qkv_projections()
    assert not any(type(part).__name__ == "FusedAttention" for part in ours.unet.modules())


@row("`enable_group_offload(num_blocks_per_group=4)`")
def group_offload(ours: Any, theirs: Any, folder: Path) -> None:
    ours.enable_group_offload("cpu", num_blocks_per_group=4, use_stream=True)
    for wrong, named in (
        ({"offload_to_disk_path": "x"}, "offload_device must be the CPU, without offload_to_disk_path"),
        ({"offload_type": "tensor"}, "offload_type must be block_level or leaf_level, got 'tensor'"),
        ({"exclude_modules": ["vae"]}, "exclude_modules must be None"),
    ):
        with pytest.raises(ValueError, match=named):
            ours.enable_group_offload("cpu", **wrong)


@row("`text_encoder(...).last_hidden_state`")
def last_hidden_state(ours: Any, theirs: Any, folder: Path) -> None:
    with pytest.raises(AttributeError, match="the final norm is not loaded"):
        ours.text_encoder(input_ids=torch.tensor([[1, 2]])).last_hidden_state  # noqa: B018


@row("`pipe.unet.load_lora_adapter(...)`, `pipe.unet.set_adapters(...)` and others")
def lora_of_the_unet(ours: Any, theirs: Any, folder: Path) -> None:
    for name in ("load_lora_adapter", "set_adapters", "disable_lora", "enable_lora", "delete_adapters"):
        assert hasattr(theirs.unet, name) and not hasattr(ours.unet, name)
    assert callable(ours.load_lora_weights) and callable(ours.set_adapters)


@row("`pipe.unet.enable_layerwise_casting(...)`")
def layerwise_casting(ours: Any, theirs: Any, folder: Path) -> None:
    assert hasattr(theirs.unet, "enable_layerwise_casting")
    assert not hasattr(ours.unet, "enable_layerwise_casting")


@row("`UNet2DConditionModel(sample_size=128, ...)`")
def from_fields(ours: Any, theirs: Any, folder: Path) -> None:
    fields = dict(theirs.unet.config)
    with pytest.raises(TypeError):
        kolors_core.UNet2DConditionModel(**fields)
    assert kolors_core.UNet2DConditionModel.from_config(fields).config == ours.unet.config


@row("`pipe.scheduler.config.beta_end = ...`, `pipe.scheduler.timesteps = ...`")
def read_only_scheduler(ours: Any, theirs: Any, folder: Path) -> None:
    config = ours.scheduler.config
    with pytest.raises(TypeError, match=r"read only: .*from_config\(config, beta_end=...\)"):
        config.beta_end = 0.5
    for name in ("timesteps", "sigmas"):
        with pytest.raises(AttributeError):
            setattr(ours.scheduler, name, getattr(ours.scheduler, name))
    assert copy.deepcopy(config) == config == pickle.loads(pickle.dumps(config))


@row("`DPMSolverMultistepScheduler.add_noise` before `set_timesteps` reads its table backwards")
def noise_of_training(ours: Any, theirs: Any, folder: Path) -> None:
    clean, noise, timestep = torch.zeros(1, 4, 2, 2), torch.ones(1, 4, 2, 2), torch.tensor([100])
    mine, other = (
        library.DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
        for library, pipe in ((kolors_core, ours), (diffusers, theirs))
    )
    right = (1 - other.alphas_cumprod[100]).sqrt() * noise
    assert torch.allclose(mine.add_noise(clean, noise, timestep), right, atol=1e-6)
    assert other.add_noise(clean, noise, timestep).mean() > 2 * right.mean()


@row(
    "a pipeline's subclass with its own `encode_prompt` or `prepare_latents`, "
    "a scheduler's with its own `step`"
)
def overridden(ours: Any, theirs: Any, folder: Path) -> None:
    def method(*arguments: Any, **named: Any) -> None: ...

    for name in ("encode_prompt", "prepare_latents", "_get_add_time_ids"):
        with pytest.raises(TypeError, match=f"Mine.{name} is not called by __call__: give "):
            type("Mine", (KolorsPipeline,), {name: method})
        type("Mine", (KolorsPipeline,), {name: method, "__call__": method})
    for name in ("step", "scale_model_input", "set_timesteps"):
        changed = type("Mine", (EulerDiscreteScheduler,), {name: method})
        with pytest.raises(TypeError, match=f"Mine.{name} is for custom loops.*set pipe.sampler"):
            ours.scheduler = changed()


@row("`pipe.image_processor = ...`, `pipe.vae_scale_factor = ...`")
def processors_of_images(ours: Any, theirs: Any, folder: Path) -> None:
    for name in ("image_processor", "vae_scale_factor"):
        setattr(theirs, name, getattr(theirs, name))
        with pytest.raises(AttributeError):
            setattr(ours, name, getattr(ours, name))


@row("`pipe.denoising_end`, `pipe.cross_attention_kwargs`, `pipe.pag_scale` after a call")
def state_of_a_call(ours: Any, theirs: Any, folder: Path) -> None:
    ours("cat", **CALL)
    theirs("cat", **CALL)
    assert theirs.denoising_end is theirs.cross_attention_kwargs is None
    for name in ("denoising_end", "cross_attention_kwargs", "pag_scale"):
        assert not hasattr(ours, name)
    assert (ours.guidance_scale, ours.num_timesteps) == (theirs.guidance_scale, theirs.num_timesteps)


@row("`pipe.scheduler.timesteps` after and during a call are the call's")
def timesteps_of_a_call(ours: Any, theirs: Any, folder: Path) -> None:
    ours("cat", **CALL)
    theirs("cat", **CALL)
    assert len(theirs.scheduler.timesteps) == 1 and len(ours.scheduler.timesteps) == 1100
    ours.scheduler.set_timesteps(1)
    assert torch.equal(ours.scheduler.timesteps, theirs.scheduler.timesteps)


@row("`pipe(..., max_sequence_length=77)` has no effect")
def short_prompts(ours: Any, theirs: Any, folder: Path) -> None:
    made: list[Any] = []
    for pipe in (ours, theirs):
        both = [{}, {"max_sequence_length": 77}]
        made += [pipe("cat", generator=torch.manual_seed(0), **CALL, **given).images for given in both]
    assert not torch.equal(made[0], made[1]) and torch.equal(made[2], made[3])


def test_each_row_has_a_test_and_each_test_a_row() -> None:
    section = README.read_text().partition("## What stays different\n")[2]
    table = section.partition("| in the reference | here |\n|---|---|\n")[2].partition("\n\n")[0]
    assert [line.split(" | ")[0].removeprefix("| ") for line in table.strip().splitlines()] == list(CHECKS)


@pytest.mark.parametrize("cell", CHECKS)
def test_it_is_as_the_table_says(cell: str, small_pair: Pair, tmp_path: Path) -> None:
    CHECKS[cell](*small_pair, tmp_path)


@pytest.fixture(scope="module")
def small_pair(reference_folder: Path) -> Any:
    """Both libraries' pipelines of one checkpoint, in float64."""
    made = [
        library.KolorsPipeline.from_pretrained(reference_folder, variant="fp16", torch_dtype=torch.float64)
        for library in (kolors_core, diffusers)
    ]
    for pipe in made:
        pipe.set_progress_bar_config(disable=True)
    return tuple(made)


def test_the_readme_names_what_exists() -> None:
    folder = README.parent
    linked = re.findall(r"\[\w+\.py\]\((\w+\.py)\)", README.read_text())
    assert {*linked} == {file.name for file in folder.glob("*.py")} - {"__init__.py"}

"""Loading and saving: the reference reads what we write; what does not fit is named."""

import gc
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

from kolors_core import KolorsPipeline
from kolors_core.checkpoint import files_to_download, load_component, resolve, save_component
from kolors_core.loading import load
from kolors_core.unet import UNet
from tests.support.pipelines import NO_SAVINGS
from tests.support.processes import run_program
from tests.support.small import FLOAT32, SMALL, relative_error
from weights_convert import TABLES
from weights_convert.__main__ import convert
from weights_convert.safetensors_files import Source

Spoil = Callable[[Path], None]


def test_every_tensor_of_a_folder_arrives(reference_folder: Path) -> None:
    ours = KolorsPipeline.from_pretrained(reference_folder, variant="fp16", torch_dtype=torch.float32)
    theirs = diffusers.KolorsPipeline.from_pretrained(reference_folder, variant="fp16", dtype=torch.float32)
    for component in ("text_encoder", "unet", "vae"):
        table = TABLES[component]
        expected = {table.to_ours(k): v for k, v in getattr(theirs, component).state_dict().items()}
        state = getattr(ours, component).state_dict()
        assert state and not any(tensor.is_meta for tensor in state.values())
        for name, tensor in state.items():
            assert torch.equal(tensor, expected[name]), name
        assert not getattr(ours, component).training


def test_a_converted_folder_loads_to_the_same_bits(reference_folder: Path, tmp_path: Path) -> None:
    convert(reference_folder, tmp_path / "ours")
    public, ours = (
        KolorsPipeline.from_pretrained(folder) for folder in (reference_folder, tmp_path / "ours")
    )
    for component in ("unet", "vae", "text_encoder"):
        first, second = (getattr(pipe, component).state_dict() for pipe in (public, ours))
        assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="the list of mapped files is Linux's")
def test_weights_in_the_files_dtype_are_the_mapped_file(reference_folder: Path) -> None:
    """In half precision nothing is copied on a CPU: the parameters lie in the pages of the file."""
    unet = load_component(reference_folder, "unet", dtype=torch.float16)
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    files = [line for line in lines if line[-1].startswith(str(reference_folder / "unet"))]
    mapped = [tuple(int(end, 16) for end in line[0].split("-")) for line in files]
    for name, parameter in unet.named_parameters():
        assert any(start <= parameter.data_ptr() < end for start, end in mapped), name


@pytest.mark.numerical
@pytest.mark.parametrize("variant", [None, "fp16"])
def test_what_we_save_the_reference_loads(
    reference_folder: Path, tmp_path: Path, variant: str | None
) -> None:
    """In float64: whole runs in float32 differ by more than FLOAT32 on some CPUs."""
    dtype = torch.float64
    ours = KolorsPipeline.from_pretrained(reference_folder, torch_dtype=dtype)
    ours.save_pretrained(tmp_path / "saved", variant=variant)
    theirs = diffusers.KolorsPipeline.from_pretrained(tmp_path / "saved", variant=variant, dtype=dtype)
    again = KolorsPipeline.from_pretrained(tmp_path / "saved", torch_dtype=dtype)
    pictures = []
    ours.savings = again.savings = NO_SAVINGS  # the last bits are not their subject
    for pipe in (ours, theirs, again):
        pipe.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        arguments = {"height": 64, "width": 64, "num_inference_steps": 2, "output_type": "latent"}
        pictures.append(pipe("cat", **arguments, generator=generator).images)
    assert relative_error(pictures[0], pictures[1]) < FLOAT32
    for component in ("text_encoder", "unet", "vae"):
        first, second = (getattr(pipe, component).state_dict() for pipe in (ours, again))
        assert all(torch.equal(first[name], second[name]) for name in first)
    assert torch.equal(pictures[0], pictures[2])


def test_a_component_passed_in_is_used_and_its_files_not_needed(
    reference_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(reference_folder, tmp_path / "partial")
    shutil.rmtree(tmp_path / "partial" / "unet")
    unet = UNet(SMALL.unet)
    assert KolorsPipeline.from_pretrained(tmp_path / "partial", unet=unet).unet is unet


def unlink(pattern: str) -> Spoil:
    def spoil(folder: Path) -> None:
        sorted(folder.glob(pattern))[0].unlink()

    return spoil


def truncate(pattern: str) -> Spoil:
    def spoil(folder: Path) -> None:
        file = sorted(folder.glob(pattern))[0]
        file.write_bytes(file.read_bytes()[:1000])

    return spoil


def set_field(file: str, name: str, value: object) -> Spoil:
    def spoil(folder: Path) -> None:
        config = json.loads((folder / file).read_text())
        config[name] = value
        (folder / file).write_text(json.dumps(config))

    return spoil


def tensors(change: Callable[[dict[str, torch.Tensor]], None]) -> Spoil:
    def spoil(folder: Path) -> None:
        file = next(
            f for f in sorted((folder / "unet").glob("*.safetensors")) if "conv_in.weight" in load_file(f)
        )
        state = load_file(file)
        change(state)
        save_file(state, file)

    return spoil


SPOILED: dict[str, tuple[Spoil, type[Exception], str]] = {
    "no index": (unlink("model_index.json"), FileNotFoundError, "model_index.json: no such file"),
    "another pipeline": (set_field("model_index.json", "_class_name", "SDXL"), ValueError,
                         "_class_name is 'SDXL', expected Kolors"),
    "no component": (lambda folder: shutil.rmtree(folder / "vae"), FileNotFoundError, "vae: no such folder"),
    "no config": (unlink("unet/config.json"), FileNotFoundError, "unet/config.json: no such file"),
    "config is no JSON": (truncate("unet/config.json"), ValueError, "unet/config.json: not JSON"),
    "shard missing": (unlink("unet/*.safetensors"), FileNotFoundError, "shard 1 of"),
    "file truncated": (truncate("vae/*.safetensors"), ValueError, "not a whole safetensors file"),
    "SDXL's UNet": (set_field("unet/config.json", "encoder_hid_dim_type", None), ValueError,
                    "encoder_hid_dim_type is None, expected 'text_proj'"),
    "field missing": (lambda folder: (folder / "vae" / "config.json").write_text("{}"), ValueError,
                      "vae/config.json: the field block_out_channels is missing"),
    "absurd field": (set_field("unet/config.json", "layers_per_block", -2), ValueError,
                     "layers_per_block is -2, expected 3 positive whole numbers"),
    "wrong type": (set_field("text_encoder/config.json", "num_layers", "3"), ValueError,
                   "num_layers is '3', expected a positive whole number"),
    "unknown field": (set_field("unet/config.json", "use_magic", True), ValueError, "use_magic is True"),
    "schedule in doubt": (lambda folder: (folder / "scheduler" / "scheduler_config.json").write_text(
        '{"_class_name": "EulerDiscreteScheduler"}'), ValueError, "the field num_train_timesteps is missing"),
    "another model": (set_field("unet/config.json", "_class_name", "UNet3D"), ValueError,
                      "_class_name is 'UNet3D', expected 'UNet2DConditionModel'"),
    "endless model": (set_field("text_encoder/config.json", "num_layers", 10**7), ValueError,
                      "num_layers is 10000000, expected a positive whole number up to 1,000"),
    "not true or false": (set_field("model_index.json", "force_zeros_for_empty_prompt", "false"), ValueError,
                          "force_zeros_for_empty_prompt is 'false', expected true or false"),
    "unknown scheduler": (set_field("scheduler/scheduler_config.json", "_class_name", "DDIMInverseScheduler"),
                          ValueError, "'DDIMInverseScheduler', expected one of EulerDiscreteScheduler"),
    "tensor missing": (tensors(lambda state: state.pop("conv_in.weight")), ValueError,
                       "1 missing: conv_in.weight"),
    "tensor extra": (tensors(lambda state: state.update(extra=torch.zeros(1))), ValueError,
                     "1 unexpected: extra"),
    "tensor misshapen": (tensors(lambda state: state.update({"conv_in.weight": torch.zeros(2, 2)})),
                         ValueError, "conv_in.weight is [2, 2], the model wants [16, 4, 3, 3]"),
    "whole numbers": (tensors(lambda state: state.update({"conv_in.weight": torch.zeros(16, 4, 3, 3).int()})),
                      ValueError, "conv_in.weight holds torch.int32, expected floating-point"),
}  # fmt: skip


@pytest.mark.parametrize("case", SPOILED)
def test_a_spoiled_folder_is_refused_by_name(case: str, reference_folder: Path, tmp_path: Path) -> None:
    spoil, kind, message = SPOILED[case]
    shutil.copytree(reference_folder, tmp_path / "spoiled")
    spoil(tmp_path / "spoiled")
    with pytest.raises(kind) as caught:
        KolorsPipeline.from_pretrained(tmp_path / "spoiled")
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_saving_neither_overwrites_nor_leaves_half(reference_folder: Path, tmp_path: Path) -> None:
    pipe = KolorsPipeline.from_pretrained(reference_folder)
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match="exists already, and is not overwritten"):
        pipe.save_pretrained(tmp_path / "foreign")
    with pytest.raises(ValueError, match="variant must be letters, digits and underscores, .* got 'a/b'"):
        pipe.save_pretrained(tmp_path / "new", variant="a/b")
    assert [file.name for file in tmp_path.rglob("*")] == ["foreign", "thesis.txt"]


def test_a_second_save_replaces_the_first(reference_folder: Path, tmp_path: Path) -> None:
    """Of it nothing is left: a shard beside a whole file would be ambiguous."""
    pipe = KolorsPipeline.from_pretrained(reference_folder, torch_dtype=torch.float16)
    pipe.save_pretrained(tmp_path / "saved", max_shard_size="1MB", variant="fp16")
    assert len(list((tmp_path / "saved" / "unet").iterdir())) > 3
    pipe.save_pretrained(tmp_path / "saved")
    assert len(list((tmp_path / "saved" / "unet").iterdir())) == 2
    again = KolorsPipeline.from_pretrained(tmp_path / "saved", torch_dtype=torch.float16)
    for name, tensor in again.unet.state_dict().items():
        assert torch.equal(tensor, pipe.unet.state_dict()[name]), name


def test_nothing_is_loaded_when_something_does_not_fit(reference_folder: Path) -> None:
    model = UNet(SMALL.unet)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    vae = sorted((reference_folder / "vae").glob("*.safetensors"))
    with pytest.raises(ValueError, match="expected the unet of a Kolors checkpoint, got a vae"):
        load(model, Source(vae), "unet")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_pickles_and_bad_names_are_refused(reference_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="pickles can run code"):
        KolorsPipeline.from_pretrained(reference_folder, use_safetensors=False)
    for name in ("nowhere", "/no/such/folder", "./a/b"):
        with pytest.raises(FileNotFoundError, match="no such folder, and not a hub repository"):
            resolve(name, ["unet"])
    with pytest.raises(TypeError, match="expected a checkpoint folder or hub repository, got None"):
        KolorsPipeline.from_pretrained(None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="revision 'main' has no effect: .* is a local folder"):
        KolorsPipeline.from_pretrained(reference_folder, revision="main")
    with pytest.raises(TypeError, match="torch_dtype must be a floating torch.dtype, got torch.int8"):
        KolorsPipeline.from_pretrained(reference_folder, torch_dtype=torch.int8)
    with pytest.raises(ValueError, match="torch_dtype names 'image'"):
        KolorsPipeline.from_pretrained(reference_folder, torch_dtype={"image": torch.float32})
    with pytest.raises(ValueError, match="component must be of .*, or have a kind, got 'image_encoder'"):
        load_component(reference_folder, "image_encoder")
    with pytest.raises(ValueError, match="two names of one argument"):
        KolorsPipeline.from_pretrained(reference_folder, torch_dtype=torch.float32, dtype=torch.float32)
    with pytest.raises(FileNotFoundError, match="variant 'fp32', found 'fp16'"):
        KolorsPipeline.from_pretrained(reference_folder, variant="fp32")


def test_needed_files_of_the_published_layout() -> None:
    listing = [
        ".gitattributes", "README.md", "imgs/picture.png", "model_index.json",
        "scheduler/scheduler_config.json", "text_encoder/config.json",
        "text_encoder/model.safetensors.index.fp16.json",
        "text_encoder/model.fp16-00001-of-00002.safetensors",
        "text_encoder/model.fp16-00002-of-00002.safetensors",
        "tokenizer/tokenizer.model", "tokenizer/tokenizer_config.json", "tokenizer/vocab.txt",
        "unet/config.json", "unet/diffusion_pytorch_model.fp16.safetensors",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/config.json", "vae/diffusion_pytorch_model.fp16.safetensors", "vae/diffusion_pytorch_model.bin",
    ]  # fmt: skip
    everything = ["text_encoder", "tokenizer", "unet", "vae", "scheduler"]
    unwanted = {".gitattributes", "README.md", "imgs/picture.png", "tokenizer/vocab.txt",
                "text_encoder/model.safetensors.index.fp16.json", "unet/diffusion_pytorch_model.safetensors",
                "vae/diffusion_pytorch_model.bin"}  # fmt: skip
    assert set(files_to_download(listing, everything, "fp16", "hub")) == set(listing) - unwanted
    configs = files_to_download(listing, everything, "no such", "hub", has_weights=False)
    assert all(file.endswith(".json") for file in configs) and "unet/config.json" in configs
    assert files_to_download(listing, ["unet"], None, "hub")[-1] == "unet/diffusion_pytorch_model.safetensors"
    with pytest.raises(FileNotFoundError, match="hub: has no image_encoder/ folder"):
        files_to_download(listing, ["image_encoder"], "fp16", "hub")


def test_garbage_is_collected_again_after_loading(reference_folder: Path) -> None:
    """Whether it went well or not, and not if it was not before."""
    load_component(reference_folder, "vae")
    assert gc.isenabled()
    with pytest.raises(FileNotFoundError):
        load_component(reference_folder, "vae", variant="missing")
    assert gc.isenabled()
    gc.disable()
    try:
        load_component(reference_folder, "vae")
        assert not gc.isenabled()
    finally:
        gc.enable()


LOADING = """
import sys, torch
from kolors_core import checkpoint, loading

def memory(line):
    return next(int(text.split()[1]) * 1024 for text in open("/proc/self/status") if text.startswith(line))

loading.RELEASE_AFTER = int(sys.argv[3])
before = memory("VmRSS")
model = checkpoint.load_component(sys.argv[1], "unet", dtype=getattr(torch, sys.argv[2]))
kept = sum(parameter.nbytes for parameter in model.parameters())
print((memory("VmHWM") - before) / kept)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_loading_needs_no_more_memory_than_the_weights_kept(tmp_path: Path) -> None:
    """Mapped pages counted; at most 1.1 times, and about twice if the file's pages are not let go of."""
    config = replace(SMALL.unet, channels=(64, 256, 512), heads=(1, 4, 8), norm_groups=32)
    save_component(UNet(config).to(torch.bfloat16), tmp_path, "unet")

    def peak(dtype: str, release_after: int = 2**20) -> float:
        run = run_program(LOADING, str(tmp_path), dtype, str(release_after))
        assert run.returncode == 0, run.stderr
        return float(run.stdout)

    assert peak("float16") < 1.1
    assert peak("bfloat16") < 1.1
    assert peak("float16", 2**40) > 1.5, "the measure sees mapped pages"

"""Models and pipelines from single files: every spelling, THUDM's whole numbers, what is refused."""

import shutil
from collections.abc import Callable
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from kolors_core import KolorsImg2ImgPipeline, KolorsPipeline
from kolors_core.chatglm import ChatGLM
from kolors_core.checkpoint import load_component
from kolors_core.cli.generate import main as command
from kolors_core.config import KOLORS, ChatGLMConfig
from kolors_core.performance.quantize import QuantizedLinear, is_quantized
from kolors_core.pipelines.adapter_methods import MODELS
from kolors_core.pipelines.single_file import load_model
from kolors_core.tokenizer import Tokenizer
from tests.support.hub import environment, serving
from tests.support.processes import run_program
from tests.support.single_files import FOREIGN, LINEAR, State, behind, full_size_unet, public, sparse, thudm
from weights_convert import TABLES
from weights_convert.__main__ import convert, main
from weights_convert.folder_to_single_file import to_folder
from weights_convert.sgm import public_to_sgm
from weights_convert.single_file import open_models


def draw(pipe: KolorsPipeline, seed: int = 0) -> Tensor:
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(seed)
    return pipe("cat", height=64, width=72, num_inference_steps=2, generator=generator, output_type="pt")[0]


@pytest.fixture(scope="module")
def drawn(whole_folder: Path) -> Tensor:
    return draw(KolorsPipeline.from_pretrained(whole_folder))


@pytest.mark.numerical
@pytest.mark.parametrize("kind", FOREIGN)
def test_files_of_other_programs(kind: str, whole_folder: Path, drawn: Tensor, tmp_path: Path) -> None:
    """Each gives the folder's image bit for bit, and comes back byte for byte from a folder made of it."""
    file = tmp_path / "whatever.safetensors"
    save_file(FOREIGN[kind](whole_folder), file, metadata={"format": "pt"})
    assert torch.equal(draw(KolorsPipeline.from_single_file(file, config=whole_folder)), drawn)
    assert main([str(file), str(tmp_path / "made"), "--to", "diffusers"]) == 0
    parts, _, _ = open_models(file)
    for component in parts:
        shutil.copy(whole_folder / component / "config.json", tmp_path / "made" / component)
        model, other = (
            load_component(folder, component, kind=MODELS[component])
            for folder in (tmp_path / "made", whole_folder)
        )
        assert all(map(torch.equal, model.state_dict().values(), other.state_dict().values()))
    assert main([str(tmp_path / "made"), str(tmp_path / "again.safetensors"), "--to", "single"]) == 0
    assert file.read_bytes() == (tmp_path / "again.safetensors").read_bytes()


def test_a_file_of_our_own_names(whole_folder: Path, tmp_path: Path) -> None:
    save_file(FOREIGN["UNet, diffusers' names"](whole_folder), tmp_path / "theirs.safetensors")
    convert(tmp_path / "theirs.safetensors", tmp_path / "ours.safetensors")
    models = [
        load_model(tmp_path / f"{n}.safetensors", "unet", config=whole_folder) for n in ("theirs", "ours")
    ]
    assert all(map(torch.equal, models[0].state_dict().values(), models[1].state_dict().values()))
    assert (
        main([str(tmp_path / "ours.safetensors"), str(tmp_path / "b.safetensors"), "--to", "diffusers"]) == 0
    )
    assert (tmp_path / "b.safetensors").read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()


@pytest.mark.numerical
def test_a_whole_file_needs_nothing_else(whole_file: Path, drawn: Tensor, tmp_path: Path) -> None:
    pipe = KolorsPipeline.from_single_file(whole_file)
    assert torch.equal(draw(pipe), drawn) and pipe.image_encoder is not None
    assert isinstance(KolorsImg2ImgPipeline.from_single_file(whole_file), KolorsImg2ImgPipeline)
    halved = KolorsPipeline.from_single_file(
        whole_file, torch_dtype={"unet": torch.float16}, image_encoder=None
    )
    assert halved.dtype == torch.float16 and halved.image_encoder is None
    planned = KolorsPipeline.from_single_file(whole_file, device="meta")
    assert planned.unet.conv_in.weight.is_meta and planned.tokenizer is None

    pipe.save_single_file(tmp_path / "saved.safetensors")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["saved.safetensors"]
    assert torch.equal(draw(KolorsPipeline.from_single_file(tmp_path / "saved.safetensors")), drawn)
    to_folder(tmp_path / "saved.safetensors", tmp_path / "folder")
    theirs = diffusers.KolorsPipeline.from_pretrained(tmp_path / "folder")
    assert torch.equal(theirs.unet.conv_in.weight, pipe.unet.conv_in.weight)
    with pytest.raises(ValueError, match="expected a new .safetensors file"):
        pipe.save_single_file(tmp_path / "saved.safetensors")


def test_what_a_killed_save_left_is_swept_by_the_next(tmp_path: Path) -> None:
    """A folder of the size of the model, beside the file."""
    left = tmp_path / f".one.safetensors.{'0' * 16}.partial"
    (left / "folder" / "unet").mkdir(parents=True)
    pipe = KolorsPipeline.from_pretrained("tiny")
    pipe.save_single_file(tmp_path / "one.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["one.safetensors"]


def test_what_is_missing_is_named_or_given(whole_folder: Path, drawn: Tensor, tmp_path: Path) -> None:
    file = tmp_path / "both.safetensors"
    save_file(FOREIGN["UNet and VAE, as ComfyUI saves them"](whole_folder), file)
    with pytest.raises(
        ValueError, match=r"\(unet\): .*; these are Kolors' sizes, for others name a checkpoint"
    ):
        KolorsPipeline.from_single_file(file)
    given = {name: load_component(whole_folder, name) for name in ("unet", "vae")}
    with pytest.raises(
        FileNotFoundError, match="both.safetensors: has no text_encoder: give text_encoder, or"
    ):
        KolorsPipeline.from_single_file(file, **given)
    given["text_encoder"] = load_component(whole_folder, "text_encoder")
    with pytest.raises(FileNotFoundError, match="has no tokenizer"):
        KolorsPipeline.from_single_file(file, **given)
    pipe = KolorsPipeline.from_single_file(file, **given, tokenizer=Tokenizer(whole_folder / "tokenizer"))
    assert torch.equal(draw(pipe), drawn), "the scheduler is Kolors' own"
    with pytest.raises(ValueError, match="variant and revision have no effect"):
        KolorsPipeline.from_single_file(file, variant="fp16")
    with pytest.raises(ValueError, match="expected the text_encoder, got the unet and the vae"):
        load_model(file, "text_encoder")
    with pytest.raises(ValueError, match="never opened"):
        load_model(tmp_path / "unet.ckpt", "unet")


def test_a_file_by_its_address_on_a_hub(whole_folder: Path, tmp_path: Path) -> None:
    save_file(FOREIGN["VAE, SGM's names alone"](whole_folder), tmp_path / "vae.safetensors")
    program = f"""
from kolors_core.pipelines.adapter_methods import MODELS
from kolors_core.pipelines.single_file import load_model
address = "https://huggingface.co/owner/kolors/blob/main/vae/vae.safetensors"
assert load_model(address, "vae", config={str(whole_folder)!r}).config.norm_groups == 8
"""
    content = {"vae/vae.safetensors": (tmp_path / "vae.safetensors").read_bytes(), "unet.safetensors": b""}
    with serving({"owner/kolors": {"main": content}}) as hub:
        run = run_program(program, env=environment(hub.endpoint, tmp_path / "home"))
        assert run.returncode == 0, run.stderr
        assert hub.fetched("owner/kolors") == ["vae/vae.safetensors"]


@pytest.mark.numerical
@pytest.mark.parametrize("prefix", ["", "transformer."])
@pytest.mark.parametrize("bits", [8, 4])
def test_a_chatglm_in_whole_numbers_is_what_its_numbers_say(
    bits: int, prefix: str, whole_folder: Path, tmp_path: Path
) -> None:
    made, meant = thudm(public(whole_folder, "text_encoder"), bits)
    file = tmp_path / "chatglm3.safetensors"
    save_file(behind(prefix, made), file)
    model = load_model(file, "text_encoder", config=whole_folder, dtype=torch.float64)
    assert isinstance(model, ChatGLM) and is_quantized(model)
    plain = ChatGLM(model.config).double().eval()
    table = TABLES["text_encoder"]
    plain.load_state_dict({table.to_ours(n): t for n, t in meant.items() if table.why_dropped(n) is None})
    for path, layer in model.named_modules():
        if isinstance(layer, QuantizedLinear):
            assert torch.equal(layer.weight, plain.get_submodule(path).weight), path
    tokens = Tokenizer(whole_folder / "tokenizer")(["cat", ""])
    with torch.no_grad():
        assert torch.equal(model(tokens).tokens, plain(tokens).tokens)

    half = load_model(file, "text_encoder", config=whole_folder, dtype=torch.float16)
    layer, exact = half.get_submodule("layers.0.mlp.proj_in"), plain.get_submodule("layers.0.mlp.proj_in")
    step = layer.scale.double().flatten()[:, None]
    if bits == 8:
        assert torch.equal(layer.weight, exact.weight.half())
    assert ((layer.weight.double() - exact.weight).abs() / step).max() < (1 / 16 if bits == 8 else 0.01)

    to_folder(file, tmp_path / "full")  # multiplied out, as the reference reads it
    assert not (tmp_path / "full" / "single_file.json").exists()
    full = public(tmp_path / "full", "text_encoder")
    assert full.keys() == meant.keys()
    assert all(torch.equal(full[name], meant[name].to(full[name].dtype)) for name in full)


def test_a_pipeline_with_a_chatglm_in_whole_numbers(whole_folder: Path, tmp_path: Path) -> None:
    save_file(thudm(public(whole_folder, "text_encoder"), 8)[0], tmp_path / "glm.safetensors")
    pipe = KolorsPipeline.from_single_file(tmp_path / "glm.safetensors", config=whole_folder)
    picture = draw(pipe)
    assert is_quantized(pipe.text_encoder) and torch.isfinite(picture).all()
    with pytest.raises(ValueError, match="is quantized: cannot save"):
        pipe.save_single_file(tmp_path / "out.safetensors")
    planned = KolorsPipeline.from_single_file(
        tmp_path / "glm.safetensors", config=whole_folder, device="meta"
    )
    assert is_quantized(planned.text_encoder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop(f"encoder.layers.1.{LINEAR[0]}.weight_scale"), "weight holds torch.int8"),
        (lambda s: (s.pop(f"encoder.layers.1.{LINEAR[1]}.weight_scale"),
                    s.update({f"encoder.layers.1.{LINEAR[1]}.weight": torch.zeros(64, 64)})),
         "layers.1.attention.to_out lacks a weight_scale"),
        (lambda s: s.update({f"encoder.layers.0.{LINEAR[1]}.weight_scale": torch.ones(3)}), r"is \[3\], exp"),
        (lambda s: s.update({f"encoder.layers.0.{LINEAR[0]}.weight": torch.zeros(128, 7, dtype=torch.int8)}),
         r"has \[7\] columns, expected \[64\]"),
        (lambda s: s.pop(f"encoder.layers.1.{LINEAR[2]}.weight"), "weight_scale is there, and"),
        (lambda s: s.update({f"encoder.layers.0.{LINEAR[3]}.weight": torch.zeros(64, 96)}), "expected int8"),
    ],
)  # fmt: skip
def test_whole_numbers_that_do_not_fit_are_named(
    change: Callable[[State], object], message: str, whole_folder: Path, tmp_path: Path
) -> None:
    state = thudm(public(whole_folder, "text_encoder"), 8)[0]
    change(state)
    save_file(state, tmp_path / "glm.safetensors")
    with pytest.raises(ValueError, match=message):
        load_model(tmp_path / "glm.safetensors", "text_encoder", config=whole_folder)


def test_full_size_files_are_known_by_their_tensors(tmp_path: Path) -> None:
    shapes = full_size_unet()
    for prefix in ("", "model.diffusion_model."):
        file = sparse(tmp_path / "unet.safetensors", {prefix + name: size for name, size in shapes.items()})
        assert load_model(file, "unet", device="meta").config == KOLORS.unet
    names = public_to_sgm("unet", shapes)
    sgm = {f"model.diffusion_model.{names[name]}": size for name, size in shapes.items()}
    file = sparse(tmp_path / "sgm.safetensors", sgm)
    assert load_model(file, "unet", device="meta").config == KOLORS.unet
    inpainting = sparse(tmp_path / "inpaint.safetensors", shapes | {"conv_in.weight": (320, 9, 3, 3)})
    assert load_model(inpainting, "unet", device="meta").config.in_channels == 9

    with torch.device("meta"):
        glm = {name: tuple(tensor.shape) for name, tensor in ChatGLM(ChatGLMConfig()).state_dict().items()}
    public_glm = {TABLES["text_encoder"].to_public(name): size for name, size in glm.items()}
    for bits in (8, 4):
        sizes, dtypes = dict(public_glm), dict[str, str]()
        for name in [n for n in public_glm if any(n.endswith(f"{layer}.weight") for layer in LINEAR)]:
            rows, columns = public_glm[name]
            sizes |= {name: (rows, columns * bits // 8), name + "_scale": (rows,)}
            dtypes[name] = "I8"
        file = sparse(tmp_path / f"chatglm3-{bits}bit.safetensors", sizes, dtypes)
        assert is_quantized(load_model(file, "text_encoder", device="meta"))


def without(name: str) -> Callable[[dict], dict]:
    return lambda shapes: {key: size for key, size in shapes.items() if not key.startswith(name)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s | {"add_embedding.linear_1.weight": (1280, 2816)},
         r"linear_1.weight is \[1280, 2816\], the model wants \[1280, 5632\]"),
        (without("encoder_hid_proj"), r"encoder_hid_proj.weight of the unet is missing \(.*SDXL"),
        (lambda s: without("add_embedding")(without("encoder_hid_proj")(s)), "encoder_hid_proj.weight of"),
        (lambda s: {"double_blocks.0.img_attn.norm.key_norm.scale": (128,), "img_in.weight": (3072, 64)},
         "double_blocks.0.img_attn.norm.key_norm.scale is no tensor"),
        (lambda s: s | {"mid_block.motion.weight": (1,)}, "1 unexpected: mid.motion.weight"),
        (without("down_blocks.1.resnets.0.norm1.bias"), "1 missing: down.1.resnets.0.norm1.bias"),
        (lambda s: s | {"conv_in.weight": ()}, "conv_in.weight is"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("spelling", ["public", "sgm"])
def test_other_models_are_refused_by_the_tensor_that_shows_it(
    spelling: str, change: Callable[[dict], dict], message: str, tmp_path: Path
) -> None:
    shapes = change(full_size_unet())
    if spelling == "sgm":
        names = public_to_sgm("unet", shapes)
        shapes = {f"model.diffusion_model.{names[name]}": size for name, size in shapes.items()}
    file = sparse(tmp_path / "other.safetensors", shapes)
    with pytest.raises(ValueError, match=message) as caught:
        load_model(file, "unet")
    assert "other.safetensors" in str(caught.value) and "\n" not in str(caught.value)


def test_the_command_line_takes_files(
    whole_folder: Path, whole_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    files = {}
    for component, kind in (
        ("unet", "UNet, SGM's names"),
        ("vae", "VAE, SGM's names alone"),
        ("text_encoder", "ChatGLM"),
    ):
        files[component] = str(tmp_path / f"{component}.safetensors")
        save_file(FOREIGN[kind](whole_folder), files[component])
    flags = [part for name, file in files.items() for part in (f"--{name.replace('_', '-')}", file)]
    common = ["cat", "--steps", "2", "--device", "cpu", "-q", "--seed", "3"]
    where = ["-w", str(whole_folder)]
    ways = {"folder": where, "single": ["-w", str(whole_file)], "files": [*where, *flags]}
    for name, more in ways.items():
        assert command([*common, *more, "-o", str(tmp_path / f"{name}.png")]) == 0
    pixels = [np.asarray(Image.open(tmp_path / f"{name}.png")) for name in ("folder", "single", "files")]
    assert np.array_equal(pixels[0], pixels[1]) and np.array_equal(pixels[0], pixels[2])
    assert command([*common, "--plan", "-w", str(whole_folder), *flags]) == 0
    assert command([*common, "-o", str(tmp_path / "x.png"), *flags]) == 2
    assert "--unet needs --weights" in capsys.readouterr().err
    assert command([*common, "-o", str(tmp_path / "x.png"), *flags[-2:]]) == 2
    assert "--text-encoder needs --weights" in capsys.readouterr().err

"""The tables, closed at full size against the reference's own modules and invertible; the converter."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from kolors_core.adapters.clip_vision import CLIPVision, CLIPVisionConfig
from kolors_core.chatglm import ChatGLM
from kolors_core.config import KOLORS
from kolors_core.unet import UNet
from kolors_core.vae import VAE
from tests.support.parity import reference_chatglm, reference_clip, reference_unet, reference_vae
from tests.support.small import SMALL
from weights_convert import TABLES, detect_component
from weights_convert.__main__ import convert, main
from weights_convert.key_mapping import UNUSED, Table, compare
from weights_convert.safetensors_files import Source, weight_files


def older_clip() -> nn.Module:
    """The image encoder as older releases of transformers saved it: 392 tensors and the position numbers."""
    model = reference_clip(CLIPVisionConfig())
    embeddings = model.vision_model.embeddings
    embeddings.register_buffer("position_ids", embeddings.position_ids, persistent=True)
    return model


FULL_SIZE = {
    "unet": (lambda: reference_unet(KOLORS.unet), lambda: UNet(KOLORS.unet), 1682, 2_579_458_820, 0),
    "vae": (lambda: reference_vae(KOLORS.vae), lambda: VAE(KOLORS.vae), 248, 83_653_863, 0),
    "text_encoder": (lambda: reference_chatglm(KOLORS.text_encoder), lambda: ChatGLM(KOLORS.text_encoder),
                     200, 5_977_241_600, 3),
    "image_encoder": (older_clip, lambda: CLIPVision(CLIPVisionConfig()), 392 + 1, 304_293_888, 1),
}  # fmt: skip


def weights(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


@pytest.fixture(scope="module")
def full_size() -> dict[str, tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]]:
    """Component -> names and shapes of the released model, the reference's and ours, from the meta device."""
    with torch.device("meta"):
        return {name: (shapes(theirs()), shapes(ours())) for name, (theirs, ours, *_) in FULL_SIZE.items()}


@pytest.mark.parametrize("component", FULL_SIZE)
def test_full_size_map_is_closed_both_ways(component: str, full_size: dict) -> None:
    table, (theirs, ours) = TABLES[component], full_size[component]
    _, _, tensors, parameters, dropped = FULL_SIZE[component]
    assert len(theirs) == tensors
    renamed = {table.to_ours(name): shape for name, shape in theirs.items()}
    assert len(renamed) == tensors
    assert not compare(table, renamed, ours)
    assert sum(torch.Size(shape).numel() for shape in ours.values()) == parameters
    assert [table.to_public(table.to_ours(name)) for name in theirs] == list(theirs)
    assert table.unused_rules(theirs) == []
    assert sum(name.startswith(UNUSED) for name in renamed) == dropped
    assert table.faults(theirs) == []
    assert all(len(reason) > 10 for reason in table.dropped.values())


def test_the_closed_check_can_fail(full_size: dict) -> None:
    table, (theirs, ours) = TABLES["unet"], full_size["unet"]
    renamed = {table.to_ours(name): shape for name, shape in theirs.items()}
    without = {name: shape for name, shape in renamed.items() if name != "text_proj.bias"}
    assert "1 missing: text_proj.bias" in str(compare(table, without, ours))
    assert "1 unexpected: extra.weight" in str(compare(table, renamed | {"extra.weight": (1,)}, ours))
    assert "is [1], the model wants [2048]" in str(compare(table, renamed | {"text_proj.bias": (1,)}, ours))
    idle = Table(component="unet", blocks=table.blocks, rules=(*table.rules, ("never", "ever")))
    assert idle.unused_rules(theirs) == [("never", "ever")]


def rename_level(shapes: dict) -> None:
    for name in [name for name in shapes if name.startswith("down_blocks.1.")]:
        shapes[name.replace("blocks.1", "blocks.77")] = shapes.pop(name)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda shapes: shapes.pop("mid_block.resnets.0.conv1.weight"), "resnets.0.conv1.weight is missing"),
        (lambda shapes: shapes.pop("conv_in.bias"), "conv_in.bias is missing"),
        (
            lambda shapes: shapes.update({"mid_block.motion.weight": (1,)}),
            "mid_block.motion.weight is no tensor",
        ),
        (lambda shapes: shapes.update({"conv_in.weight": (3,)}), "which does not fit its weight, [3]"),
        (rename_level, "down_blocks.1 is missing"),
        (
            lambda shapes: shapes.update({f"down_blocks.{10**15}.downsamplers.0.conv.weight": (1,)}),
            "down_blocks.3 is missing",
        ),  # told at once, without counting to there
    ],
)
def test_the_formats_own_check_can_fail(
    change: Callable[[dict], object], fault: str, full_size: dict
) -> None:
    shapes = dict(full_size["unet"][0])
    change(shapes)
    assert any(fault in found for found in TABLES["unet"].faults(shapes))


def test_round_trip_of_a_folder_is_byte_equal(
    reference_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main([str(reference_folder), str(tmp_path / "ours")]) == 0
    printed = capsys.readouterr().err
    assert "output_layer.weight" in printed and "language-model head" in printed
    assert [line.split()[0] for line in printed.splitlines() if "tensors" in line].count("unet") == 1
    converted = Source(sorted((tmp_path / "ours" / "unet").glob("*.safetensors")))
    assert "text_proj.weight" in converted and "encoder_hid_proj.weight" not in converted

    assert main([str(tmp_path / "ours"), str(tmp_path / "back"), "--to", "diffusers"]) == 0
    files = sorted(
        path.relative_to(reference_folder) for path in reference_folder.rglob("*") if path.is_file()
    )
    assert files == sorted(
        path.relative_to(tmp_path / "back") for path in (tmp_path / "back").rglob("*") if path.is_file()
    )
    for file in files:
        assert (reference_folder / file).read_bytes() == (tmp_path / "back" / file).read_bytes(), file


@pytest.mark.parametrize("keys", [1, 2, 9])
def test_round_trip_of_one_file_is_byte_equal(keys: int, tmp_path: Path) -> None:
    """With as many metadata as there may be, which the library writes in an order that it draws."""
    reference_vae(SMALL.vae).save_pretrained(tmp_path / "vae")
    file = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    save_file(load_file(file), file, metadata={f"k{i}": f'"v"\n猫{i}' for i in range(keys)})
    convert(file, tmp_path / "ours.safetensors")
    convert(tmp_path / "ours.safetensors", tmp_path / "back.safetensors", to_public=True)
    assert file.read_bytes() == (tmp_path / "back.safetensors").read_bytes()
    assert "decoder.mid.attention.to_q.weight" in load_file(tmp_path / "ours.safetensors")


def test_prune_leaves_the_dropped_tensors_out(tmp_path: Path) -> None:
    """Of a text encoder in shards, whose index names what is left."""
    reference_chatglm(SMALL.text_encoder).save_pretrained(tmp_path / "whole", max_shard_size="200KB")
    assert any(name.startswith("output_layer") for name in Source(weights(tmp_path / "whole")))
    convert(tmp_path / "whole", tmp_path / "pruned", prune=True)
    kept = Source(weights(tmp_path / "pruned"))
    assert not [name for name in kept if name.startswith(UNUSED)]
    index = json.loads(next((tmp_path / "pruned").glob("*.index.*")).read_text())
    assert set(index["weight_map"]) == set(kept)


def spoil_index(folder: Path) -> None:
    next((folder / "unet").glob("*.index.*")).write_text("{}")


def spoil_missing(folder: Path) -> None:
    for file in (folder / "vae").glob("*.safetensors"):
        tensors = load_file(file)
        if tensors.pop("encoder.conv_out.bias", None) is not None:
            save_file(tensors, file)


def spoil_truncated(folder: Path) -> None:
    file = next((folder / "vae").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-100])


def spoil_stranger(folder: Path) -> None:
    file = next((folder / "vae").glob("*.safetensors"))
    save_file(load_file(file) | {"encoder.motion.weight": torch.zeros(1)}, file)


def spoil_shard(folder: Path) -> None:
    sorted((folder / "unet").glob("*.safetensors"))[1].unlink()


def spoil_sdxl(folder: Path) -> None:
    files = sorted((folder / "unet").glob("*.safetensors"))
    for file in files:
        tensors = load_file(file)
        save_file({name: tensor for name, tensor in tensors.items() if "encoder_hid_proj" not in name}, file)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_truncated, "not a whole safetensors file"),
        (spoil_stranger, "encoder.motion.weight is no tensor of Kolors' vae"),
        (spoil_shard, "shard 2 of"),
        (spoil_index, "index.fp16.json: not an index of shards"),
        (spoil_missing, "encoder.conv_out.bias is missing"),
        (spoil_sdxl, "encoder_hid_proj.weight is missing"),
    ],
)
def test_converting_a_spoiled_folder_writes_nothing(
    spoil: object, message: str, reference_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    shutil.copytree(reference_folder, tmp_path / "spoiled")
    spoil(tmp_path / "spoiled")
    assert main([str(tmp_path / "spoiled"), str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["spoiled"]


def test_wrong_direction_existing_destination_and_pickles_are_named(
    reference_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="has public names already"):
        convert(reference_folder / "vae", tmp_path / "out", to_public=True)
    with pytest.raises(FileExistsError, match="exists already"):
        convert(reference_folder / "vae", tmp_path)
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        convert(tmp_path / "nothing", tmp_path / "out")
    with pytest.raises(ValueError, match="lies inside"):
        convert(reference_folder, reference_folder / "out")
    shutil.copytree(reference_folder / "vae", tmp_path / "vae")
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "vae").symlink_to(tmp_path / "vae")
    assert convert(tmp_path / "links", tmp_path / "followed") and (tmp_path / "followed" / "vae").is_dir()
    (tmp_path / "vae" / "extra.bin").write_bytes(b"pickle")
    assert any("extra.bin: skipped, a pickle" in line for line in convert(tmp_path / "vae", tmp_path / "out"))


@pytest.mark.parametrize(
    ("listing", "variant", "wanted"),
    [
        (["a.json", "model.safetensors"], None, ["model.safetensors"]),
        (["model.fp16.safetensors"], None, ["model.fp16.safetensors"]),
        (["model.fp16.safetensors", "model.safetensors"], "fp16", ["model.fp16.safetensors"]),
        (["model.fp16.safetensors", "model.safetensors"], None, ["model.safetensors"]),
        (["model.fp16-00002-of-00002.safetensors", "model.fp16-00001-of-00002.safetensors"], "fp16",
         ["model.fp16-00001-of-00002.safetensors", "model.fp16-00002-of-00002.safetensors"]),
        (["model-00001-of-00001.fp16.safetensors"], "fp16", ["model-00001-of-00001.fp16.safetensors"]),
    ],
)  # fmt: skip
def test_weight_files_are_found_whatever_their_name(
    listing: list[str], variant: str | None, wanted: list[str]
) -> None:
    assert weight_files(listing, variant, "here") == wanted


@pytest.mark.parametrize(
    ("listing", "variant", "message"),
    [
        (["model.bin"], None, r"here: expected .safetensors weights, found only pickles \(model.bin\)"),
        ([], None, "found none"),
        (["model.safetensors"], "fp16", "expected weights of variant 'fp16', found no variant"),
        (["model.a.safetensors", "model.b.safetensors"], None, "found 'a', 'b'"),
        (["model-00001-of-00002.safetensors"], None, "shard 2 of 2 is missing"),
        (["model.safetensors", "other.safetensors"], None, "several checkpoints side by side"),
    ],
)
def test_weight_files_that_do_not_fit_are_named(
    listing: list[str], variant: str | None, message: str
) -> None:
    with pytest.raises(FileNotFoundError, match=message):
        weight_files(listing, variant, "here")


def test_recognise_tells_ours_from_public_and_names_what_is_missing(full_size: dict) -> None:
    for component, (theirs, ours) in full_size.items():
        assert detect_component(theirs.keys(), "here") == (TABLES[component], False)
        assert detect_component(ours.keys(), "here") == (TABLES[component], True)
    sdxl = [name for name in full_size["unet"][0] if not name.startswith("encoder_hid_proj")]
    with pytest.raises(ValueError, match=r"here: .*encoder_hid_proj.weight is missing \(.*SDXL"):
        detect_component(sdxl, "here")
    with pytest.raises(ValueError, match="none of the tensors"):
        detect_component(["a.weight"], "here")

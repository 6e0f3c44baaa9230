"""SGM's names against the reference's converter; a folder in one file and back, byte for byte."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint
from safetensors.torch import load_file, save_file

from kolors_core.config import KOLORS
from tests.support.parity import reference_unet, reference_vae
from tests.support.single_files import State, behind, in_sgm
from tests.support.small import SMALL
from weights_convert import sgm
from weights_convert.__main__ import main
from weights_convert.folder_to_single_file import LAYOUT_KEY, to_folder, to_single
from weights_convert.safetensors_files import Source
from weights_convert.sgm import public_to_sgm, sgm_to_public


def same_files(one: Path, other: Path) -> None:
    files = sorted(path.relative_to(one) for path in one.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(other) for path in other.rglob("*") if path.is_file())
    for file in files:
        assert (one / file).read_bytes() == (other / file).read_bytes(), file


@pytest.mark.parametrize("component", ["unet", "vae"])
def test_sgms_names_are_those_that_the_reference_reads_at_full_size(component: str) -> None:
    """The oracle is diffusers' own converter of SGM files: from our names it finds every tensor's place."""
    config = getattr(KOLORS, component)
    with torch.device("meta"):
        state = {"unet": reference_unet, "vae": reference_vae}[component](config).state_dict()
    names = public_to_sgm(component, state)
    assert len(set(names.values())) == len(state) == {"unet": 1682, "vae": 248}[component]
    assert sgm_to_public(component, names.values()) == {sgm: name for name, sgm in names.items()}

    convert = {"unet": convert_ldm_unet_checkpoint, "vae": convert_ldm_vae_checkpoint}[component]
    prefix = {"unet": "model.diffusion_model.", "vae": "first_stage_model."}[component]
    given = behind(prefix, in_sgm(component, state))
    found = convert(dict(given), config.to_public())
    kolors_own = {"encoder_hid_proj.weight", "encoder_hid_proj.bias"} if component == "unet" else set()
    assert set(found) == set(state) - kolors_own, "the oracle leaves out Kolors' own text projection"
    assert {name: tensor.shape for name, tensor in found.items()} == {
        name: state[name].shape for name in found
    }
    told = sgm_to_public(component, [name.removeprefix(prefix) for name in given])
    source = {id(tensor): name for name, tensor in given.items()}
    for name, tensor in found.items():
        if id(tensor) in source:  # the VAE's attention is reshaped by the oracle, and so another object
            assert told[source[id(tensor)].removeprefix(prefix)] == name


def test_a_table_with_two_rows_exchanged_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = sgm.SGM_PARTS["resnets"] | {"norm1": "out_layers.0", "norm2": "in_layers.0"}
    monkeypatch.setitem(sgm.SGM_PARTS, "resnets", parts)
    with pytest.raises(AssertionError):
        test_sgms_names_are_those_that_the_reference_reads_at_full_size("unet")


def test_folder_to_file_and_back_is_byte_equal(whole_folder: Path, whole_file: Path, tmp_path: Path) -> None:
    assert main([str(whole_file), str(tmp_path / "back"), "--to", "diffusers"]) == 0
    same_files(whole_folder, tmp_path / "back")
    assert len(list((whole_folder / "unet").glob("*.safetensors"))) > 5 and list(
        (whole_folder / "unet").glob("*.index.*")
    )
    assert main([str(tmp_path / "back"), str(tmp_path / "again.safetensors"), "--to", "single"]) == 0
    assert whole_file.read_bytes() == (tmp_path / "again.safetensors").read_bytes()


def test_metadata_keep_their_order_in_a_file_and_in_a_folder(whole_folder: Path, tmp_path: Path) -> None:
    """Of each file of a folder that becomes one file, and of one of another program that becomes a folder."""
    metadata, folder = {f"k{9 - i}": "v" for i in range(9)}, tmp_path / "folder"
    shutil.copytree(whole_folder, folder)
    for file in (folder / "vae").glob("*.safetensors"):
        save_file(load_file(file), file, metadata=metadata)
    single = tmp_path / "single.safetensors"
    to_single(folder, single)
    to_folder(single, tmp_path / "back")
    same_files(folder, tmp_path / "back")

    state = behind("first_stage_model.", in_sgm("vae", reference_vae(SMALL.vae).state_dict()))
    theirs = tmp_path / "theirs.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, theirs, metadata=metadata)
    to_folder(theirs, tmp_path / "made")
    to_single(tmp_path / "made", tmp_path / "again.safetensors")
    assert theirs.read_bytes() == (tmp_path / "again.safetensors").read_bytes()


def test_the_file_has_comfyuis_names(whole_folder: Path, whole_file: Path) -> None:
    names = Source([whole_file])
    for name in ("model.diffusion_model.input_blocks.0.0.weight",
                 "model.diffusion_model.encoder_hid_proj.bias",
                 "first_stage_model.decoder.up.0.block.0.conv1.weight",
                 "files.tokenizer/tokenizer.model",
                 "text_encoder.encoder.layers.0.mlp.dense_h_to_4h.weight"):  # fmt: skip
        assert name in names
    assert names.shape("first_stage_model.encoder.mid.attn_1.q.weight") == (32, 32, 1, 1)
    stored = bytes(names["files.tokenizer/tokenizer.model"].numpy())
    assert stored == (whole_folder / "tokenizer" / "tokenizer.model").read_bytes()


def with_layout(change: Callable[[dict], object]) -> Callable[[State], object]:
    def spoil(state: State) -> None:
        layout = json.loads(bytes(state[LAYOUT_KEY].numpy()))
        change(layout)
        state[LAYOUT_KEY] = torch.tensor(list(json.dumps(layout).encode()), dtype=torch.uint8)

    return spoil


BYTES = torch.tensor(list(b"{}"), dtype=torch.uint8)
VAE_FILE = "vae/diffusion_pytorch_model.fp16-00001-of-00003.safetensors"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda s: s.update({"files.../x.json": BYTES}), "'../x.json': expected a path inside the folder"),
        (lambda s: s.update({"files./etc/x.json": BYTES}), "expected a path inside the folder"),
        (lambda s: s.update({"files.vae\\x": BYTES}), "expected a path inside the folder"),
        (lambda s: s.update({"files.model_index.json/x": BYTES}), "a folder or another file has its path"),
        (lambda s: s.update({"files.Model_Index.json": BYTES}), "a folder or another file has its path"),
        (lambda s: s.update({"files.unet": BYTES}), "a folder or another file has its path"),
        (lambda s: s.update({"files." + "x" * 300: BYTES}), "expected a path inside the folder"),
        (lambda s: s.update({LAYOUT_KEY: torch.zeros(2**24 + 1).byte()}), "expected at most 16,777,216"),
        (lambda s: s.update({"files.vae/x.bin": BYTES}), "weights are no small file"),
        (lambda s: s.update({"files.vae/x.json": torch.ones(3)}), "x.json is torch.float32"),
        (lambda s: s.update({"stranger.weight": torch.ones(3)}), "stranger.weight is no tensor"),
        (lambda s: s.pop("first_stage_model.quant_conv.bias"), "quant_conv.bias is missing"),
        (with_layout(lambda found: found.update({"../x.safetensors": {}})), "expected a path inside"),
        (with_layout(lambda found: found.update({"vae/x.json": {}})), "expected a .safetensors file in"),
        (with_layout(lambda found: found.update({"vae/x.safetensors": {}})), "expected metadata and tensors"),
        (with_layout(lambda found: found.pop(min(f for f in found if f.startswith("vae")))), "not list the"),
        (with_layout(lambda found: found.update(
            {"vae/x.safetensors": {"metadata": None, "tensors": ["quant_conv.bias"]}})), "twice"),
        (with_layout(lambda found: found[min(found)].update({"tensors": []})), "does not list the tensors"),
        (with_layout(lambda found: found.update(
            {"vae/x.safetensors": {"metadata": 3, "tensors": None}})), "metadata: expected texts"),
        (with_layout(lambda found: found.update(
            {"vae/x.safetensors": {"metadata": None, "tensors": 3}})), "expected a list of names"),
    ],
)  # fmt: skip
def test_a_spoiled_file_makes_no_folder(
    spoil: Callable[[State], object],
    message: str,
    whole_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    state = load_file(whole_file)
    spoil(state)
    save_file(state, tmp_path / "spoiled.safetensors")
    assert main([str(tmp_path / "spoiled.safetensors"), str(tmp_path / "out"), "--to", "diffusers"]) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["spoiled.safetensors"]


def test_folders_that_make_no_file_are_named(whole_folder: Path, tmp_path: Path) -> None:
    place = tmp_path / "folder"
    shutil.copytree(whole_folder, place)
    (place / "a:b").write_bytes(b"")
    with pytest.raises(ValueError, match="'a:b': expected a path inside the folder"):
        to_single(place, tmp_path / "one.safetensors")
    (place / "a:b").unlink()
    (place / "vae" / "extra.bin").write_bytes(b"pickle")
    report = to_single(place, tmp_path / "one.safetensors")
    assert any("extra.bin: skipped, a pickle" in line for line in report)
    with pytest.raises(FileExistsError, match="not overwritten"):
        to_single(place, tmp_path / "one.safetensors")
    with pytest.raises(ValueError, match="must end in .safetensors"):
        to_single(place, tmp_path / "one.ckpt")
    save_file({"a": torch.ones(1)}, place / "vae" / "diffusion_pytorch_model.safetensors")
    with pytest.raises(ValueError, match="several checkpoints side by side"):
        to_single(place, tmp_path / "two.safetensors")
    (place / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    (place / "safety").mkdir()
    save_file({"a": torch.ones(1)}, place / "safety" / "model.safetensors")
    with pytest.raises(ValueError, match="has weights, expected them only in"):
        to_single(place, tmp_path / "two.safetensors")
    with pytest.raises(FileNotFoundError, match="no such folder"):
        to_single(tmp_path / "nothing", tmp_path / "two.safetensors")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no safetensors weights"):
        to_single(tmp_path / "empty", tmp_path / "two.safetensors")
    assert not (tmp_path / "two.safetensors").exists()


def test_a_file_of_our_names_stays_a_file(adapters: list[Path], tmp_path: Path) -> None:
    """An IP-Adapter, which has no place in a pipeline's file, goes to our names and back as before."""
    ours, back = str(tmp_path / "ours.safetensors"), tmp_path / "back.safetensors"
    assert main([str(adapters[0]), ours]) == main([ours, str(back), "--to", "diffusers"]) == 0
    assert back.read_bytes() == adapters[0].read_bytes()

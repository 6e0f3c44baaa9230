"""IP-Adapter-FaceID-Plus against the reference: modules, and runs step by step; how it comes and leaves."""

from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from kolors_core import DPMSolverMultistepScheduler, KolorsImg2ImgPipeline, KolorsPipeline
from kolors_core.adapters.face_id import FaceIDAdapter, FaceIDConfig, load_face_embeds
from kolors_core.adapters.ip_adapter import attach, attached
from kolors_core.adapters.lora import attach as attach_lora
from kolors_core.adapters.lora import save_adapters
from kolors_core.cli.generate import main
from kolors_core.config import KOLORS
from kolors_core.pipelines.memory_plan import plan
from kolors_core.pipelines.png_metadata import read_metadata
from kolors_core.unet import UNet
from tests.support.face_ids import FACE, TOKENS, ReferenceFace, face_config, parts_of, write_face
from tests.support.ip_adapters import Both, load_both
from tests.support.offloads import offloaded
from tests.support.parity import pair
from tests.support.pipelines import EMBEDDINGS, NO_SAVINGS, SOLVERS, picture, saving, steps_of, use_solver
from tests.support.small import EXACT, FLOAT32, relative_error
from tests.test_unet import inputs
from weights_convert import TABLES
from weights_convert.__main__ import convert, convert_pickle
from weights_convert.key_mapping import compare

Faced = tuple[KolorsPipeline, ReferenceFace]


@pytest.fixture(scope="module")
def face_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_face(tmp_path_factory.mktemp("face") / "face.safetensors")


@pytest.fixture
def faced(both: Both, face_file: Path) -> Faced:
    """Both pipelines with the face adapter."""
    ours, theirs = both
    ours.load_ip_adapter_face_id(face_file)
    return ours, ReferenceFace(theirs, face_file)


def face_steps(pipe: Any, **arguments: Any) -> list[torch.Tensor]:
    return steps_of(pipe, **{"prompt": "cat", "num_inference_steps": 3} | FACE | arguments)


def adapter_of(pipe: KolorsPipeline) -> FaceIDAdapter:
    adapter = attached(pipe.unet)[-1].adapter
    assert isinstance(adapter, FaceIDAdapter)
    return adapter


@pytest.mark.numerical
def test_the_resampler_equals_the_reference(faced: Faced) -> None:
    ours, theirs = faced
    draw = torch.Generator().manual_seed(1)
    ids, states = (torch.randn(2, *s, dtype=torch.float64, generator=draw) for s in ((12,), (17, 64)))
    theirs.projection.clip_embeds = states[:, None]
    with torch.no_grad():
        mine, other = adapter_of(ours).resampler(ids, states), theirs.projection(ids)
    assert mine.shape == (2, TOKENS, ours.unet.config.text_dim) and relative_error(mine, other) < EXACT


@pytest.mark.numerical
@torch.no_grad()
def test_the_unet_equals_the_reference(faced: Faced) -> None:
    ours, theirs = faced
    given, ids = inputs(1, 9, 7, torch.float64), FACE["face_embeds"]
    guide, _ = ours._face_prompts(FACE["face_image"], ids, 1, is_guided=False)[attached(ours.unet)[0]]
    text = torch.cat([given["text_tokens"], theirs.tokens(ids, FACE["face_image"])[0]], dim=1)
    added = {"text_embeds": given["pooled_text"], "time_ids": given["size_ids"]}
    call = theirs.pipe.unet(given["latents"], given["timestep"], text, added_cond_kwargs=added)
    assert relative_error(ours.unet(**given, image_prompts=[guide]), call.sample) < EXACT


@pytest.mark.numerical
@pytest.mark.parametrize(("solver", "changes"), SOLVERS[:2], ids=["euler", "dpm"])
@pytest.mark.parametrize("guidance_scale", [5.0, 1.0])
def test_every_step_equals_the_reference(
    both: Both, face_file: Path, solver: str, changes: dict, guidance_scale: float
) -> None:
    """Ours reads once and collapses pads; in the reference the tokens go through the UNet with the text."""
    use_solver(both, solver, changes)
    both[0].load_ip_adapter_face_id(face_file)
    both[0].set_ip_adapter_face_id_scale(0.8)
    theirs = ReferenceFace(both[1], face_file, scale=0.8)
    prompt = ["一张照片", "cat"]
    mine = face_steps(both[0], prompt=prompt, num_images_per_prompt=2, guidance_scale=guidance_scale)
    given = theirs.arguments(prompt, guidance_scale > 1, copies=2)
    other = steps_of(both[1], num_inference_steps=3, guidance_scale=guidance_scale, **given)
    assert len(mine) == len(other) == 4
    for i, (a, b) in enumerate(zip(mine, other, strict=True)):
        assert relative_error(a, b) < FLOAT32, i


def test_a_face_that_is_taken_for_none_is_noticed(faced: Faced) -> None:
    """The test of whole runs can fail: by the shortcut alone, and by which half is without a face."""
    ours, theirs = faced
    given = theirs.arguments("cat")
    expected = steps_of(theirs.pipe, num_inference_steps=3, **given)
    assert relative_error(face_steps(ours)[0], expected[0]) < FLOAT32
    assert relative_error(face_steps(ours, face_embeds=0 * FACE["face_embeds"])[0], expected[0]) > 1e-3
    assert relative_error(face_steps(ours, face_image=picture(8, 64, 64))[0], expected[0]) > 1e-4
    adapter = adapter_of(ours).resampler
    for norm in (adapter.id_norm, adapter.norm_out):
        norm.weight.data *= 1.01
        assert relative_error(face_steps(ours)[0], expected[0]) > 1e-4
        norm.weight.data /= 1.01


def test_image_to_image_with_a_lora(faced: Faced, tmp_path: Path) -> None:
    """The LoRA is on the projection of the text too, which the face's tokens pass, and has a factor.

    The reference's image to image does not pass pooled embeddings on: it gets all four from `encode_prompt`.
    """
    ours, theirs = faced
    adapter = attach_lora(ours.unet, rank=2, targets=("to_q", "to_k", "text_proj"))
    for j, parameter in enumerate(adapter.parameters()):
        parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(j)))
    save_adapters({"unet": adapter}, tmp_path / "lora.safetensors")
    factor = 0.5
    merged = deepcopy(theirs.pipe.unet)
    table, modules = TABLES["unet"], dict(merged.named_modules())
    for path, part in adapter.parts().items():
        weight = modules[table.to_public(path)].weight
        weight.data += factor * part.delta_weight(weight.data)
    adapter.detach()
    given = theirs.arguments("cat")
    texts = tuple(given[name] for name in EMBEDDINGS)
    parts = {**theirs.pipe.components, "vae": deepcopy(theirs.pipe.vae), "unet": merged}
    other = diffusers.KolorsImg2ImgPipeline(**parts, force_zeros_for_empty_prompt=False)
    other.set_progress_bar_config(disable=True)
    other.encode_prompt = lambda *_, **__: texts
    pipe = KolorsImg2ImgPipeline.from_pipe(ours)
    pipe.load_lora_weights(tmp_path / "lora.safetensors")
    start = {"image": picture(0), "strength": 1.0}
    mine = face_steps(pipe, cross_attention_kwargs={"scale": factor}, **start)
    expected = steps_of(other, num_inference_steps=3, prompt="cat", **start)
    assert all(relative_error(a, b) < 4 * FLOAT32 for a, b in zip(mine, expected, strict=True))
    assert relative_error(face_steps(pipe, **start)[0], mine[0]) > 1e-4


@pytest.mark.numerical
def test_savings_change_nothing(faced: Faced) -> None:
    fast = face_steps(faced[0])
    with saving(faced[0], NO_SAVINGS):
        assert relative_error(face_steps(faced[0])[-1], fast[-1]) < EXACT


def test_beside_a_picture_in_whatever_order_they_came(
    both: Both, adapters: list[Path], face_file: Path
) -> None:
    ours, runs = both[0], []
    loads = (lambda: load_both((ours,), adapters[0]), lambda: ours.load_ip_adapter_face_id(face_file))
    for order in (loads, loads[::-1]):
        for load in order:
            load()
        ours.set_ip_adapter_scale(0.6)
        runs.append(face_steps(ours, ip_adapter_image=picture(3)))
        assert len(attached(ours.unet)) == 2
        ours.unload_ip_adapter()
        alone = face_steps(ours)
        ours.unload_ip_adapter_face_id()
    assert relative_error(runs[0][-1], runs[1][-1]) < EXACT < 1e-4 < relative_error(runs[0][-1], alone[-1])
    assert not attached(ours.unet)


def test_it_comes_and_leaves_without_a_trace(both: Both, face_file: Path, tmp_path: Path) -> None:
    ours = both[0]
    before, state = steps_of(ours, prompt="cat")[-1], deepcopy(ours.unet.state_dict())
    ours.load_ip_adapter_face_id(face_file)
    first = face_steps(ours)
    ours.save_pretrained(tmp_path / "saved")
    public = load_file(tmp_path / "saved" / "unet" / "diffusion_pytorch_model.safetensors")
    assert len(public) == len(state)
    ours.set_ip_adapter_face_id_scale(0.0)
    assert torch.equal(face_steps(ours, num_inference_steps=4)[-1], before), "scale 0 is no adapter"
    ours.unload_ip_adapter_face_id()
    after = ours.unet.state_dict()
    assert list(after) == list(state) and all(torch.equal(after[name], state[name]) for name in state)
    assert torch.equal(steps_of(ours, prompt="cat")[-1], before)
    for _ in range(2):  # loading replaces
        ours.load_ip_adapter_face_id(face_file)
    assert len(attached(ours.unet)) == 1
    assert all(torch.equal(a, b) for a, b in zip(face_steps(ours), first, strict=True))


@pytest.mark.numerical
def test_states_stand_in_for_a_picture_and_faces_may_differ(
    faced: Faced,
) -> None:
    ours = faced[0]
    encoder = ours.image_encoder
    assert encoder is not None
    with torch.no_grad():
        pixels = ours._pixels([FACE["face_image"], picture(8, 64, 64)], encoder)
        # each alone, as a run encodes its one image: a batch of two is added up in another order
        states = torch.cat([encoder.penultimate(one.double()) for one in pixels.split(1)])
    assert torch.equal(face_steps(ours, face_image=states[:1])[-1], face_steps(ours)[-1])
    given = FACE["face_embeds"].numpy()
    assert torch.equal(face_steps(ours, face_embeds=given)[-1], face_steps(ours)[-1])
    two = torch.cat([FACE["face_embeds"], -FACE["face_embeds"]])
    generators = [torch.Generator().manual_seed(0) for _ in range(2)]
    both_faces = face_steps(
        ours, prompt=["cat", "cat"], face_embeds=two, face_image=states, generator=generators
    )[0]
    for i in range(2):
        one = face_steps(ours, face_embeds=two[i : i + 1], face_image=states[i : i + 1])[0]
        assert relative_error(both_faces[i : i + 1], one) < EXACT, i


def test_clip_comes_and_leaves_with_it(pipes: Any, tmp_path: Path) -> None:
    folder = tmp_path / "clip-vit-large-patch14-336"
    pair("image_encoder", torch.float32)[1].save_pretrained(folder)
    write_face(tmp_path / "face.safetensors")
    pipe = KolorsPipeline.from_pipe(pipes[0], unet=deepcopy(pipes[0].unet))
    pipe.load_ip_adapter_face_id(tmp_path)
    assert pipe.image_encoder is not None
    run = face_steps(pipe)
    pipe.load_ip_adapter_face_id(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(face_steps(pipe), run, strict=True))
    pipe.unload_ip_adapter_face_id()
    assert pipe.image_encoder is None


def test_it_is_planned(faced: Faced) -> None:
    ours = faced[0]
    with_face = plan(ours, 64, 64)
    assert "image_encoder" in with_face.stages
    ours.image_encoder = None
    assert "image_encoder" not in plan(ours, 64, 64).stages
    ours.unload_ip_adapter_face_id()
    assert plan(ours, 64, 64).stages["unet"].weights < with_face.stages["unet"].weights


@pytest.mark.parametrize("by_block", [False, True])
def test_it_comes_to_the_accelerator(by_block: bool, faced: Faced) -> None:
    ours = faced[0]
    expected = face_steps(ours)[-1]
    with offloaded(ours, by_block):
        assert torch.equal(face_steps(ours)[-1], expected)


# Files.


def test_the_map_is_closed_at_full_size_both_ways() -> None:
    """6 tokens, 4,096 wide; 70 pairs of keys and values that read the projected text's 2,048."""
    with torch.device("meta"):
        adapter, unet = FaceIDAdapter(FaceIDConfig()), UNet(KOLORS.unet)
    handle = attach(unet, adapter)
    assert [path.split(".")[0] for path in handle.branches] == ["down"] * 24 + ["up"] * 36 + ["mid"] * 10
    table = TABLES["face_id"]
    ours = {name: tuple(tensor.shape) for name, tensor in adapter.state_dict().items()}
    public = {table.to_public(name): shape for name, shape in ours.items()}
    assert table.faults(public) == [] and table.unused_rules(public) == []
    assert not compare(table, {table.to_ours(name): shape for name, shape in public.items()}, ours)
    assert FaceIDConfig.from_shapes(ours, "here") == FaceIDConfig()
    assert len(public) == 2 * 6 + 4 * 11 + 2 * 70
    for name, shape in {
        "image_proj.proj.0.weight": (1024, 512),
        "image_proj.proj.2.weight": (6 * 4096, 1024),
        "image_proj.norm.bias": (4096,),
        "image_proj.perceiver_resampler.proj_in.weight": (4096, 1024),
        "image_proj.perceiver_resampler.layers.3.0.to_kv.weight": (8192, 4096),
        "image_proj.perceiver_resampler.layers.0.0.norm2.weight": (4096,),
        "image_proj.perceiver_resampler.layers.0.1.3.weight": (4096, 16384),
        "image_proj.perceiver_resampler.norm_out.weight": (4096,),
        "adapter_modules.1.to_k_ip.weight": (640, 2048),
        "adapter_modules.139.to_v_ip.weight": (1280, 2048),
    }.items():
        assert public[name] == shape
    del public["adapter_modules.5.to_k_ip.weight"], public["adapter_modules.5.to_v_ip.weight"]
    assert table.faults(public) == ["adapter_modules.5 is missing"]


def test_the_published_pickle_is_converted_and_loaded(both: Both, face_file: Path, tmp_path: Path) -> None:
    torch.save(parts_of(face_file), tmp_path / "ipa-faceid-plus.bin")
    with pytest.raises(ValueError, match=r"ipa-faceid-plus.bin: a pickle .* --pickle"):
        both[0].load_ip_adapter_face_id(tmp_path)
    convert_pickle(tmp_path / "ipa-faceid-plus.bin", tmp_path / "face.safetensors")
    convert(tmp_path / "face.safetensors", tmp_path / "ours.safetensors")
    convert(tmp_path / "ours.safetensors", tmp_path / "back.safetensors", to_public=True)
    assert (tmp_path / "face.safetensors").read_bytes() == (tmp_path / "back.safetensors").read_bytes()
    runs = []
    for file in (face_file, tmp_path / "face.safetensors", tmp_path / "ours.safetensors"):
        both[0].load_ip_adapter_face_id(file)
        runs.append(face_steps(both[0])[-1])
    both[0].load_ip_adapter_face_id(parts_of(face_file))
    assert all(torch.equal(run, face_steps(both[0])[-1]) for run in runs)


def test_other_files_are_refused_and_nothing_changes(
    both: Both, adapters: list[Path], face_file: Path, tmp_path: Path
) -> None:
    ours = both[0]
    with pytest.raises(ValueError, match="expected tensors of face_id, got ip_adapter"):
        ours.load_ip_adapter_face_id(adapters[0])
    with pytest.raises(ValueError, match="got face_id: load_ip_adapter_face_id loads it"):
        ours.load_ip_adapter(face_file)
    wide = replace(face_config(), width=128)
    with pytest.raises(ValueError, match="makes tokens 128 wide, and the UNet reads text 64 wide"):
        ours.load_ip_adapter_face_id(write_face(tmp_path / "wide.safetensors", wide))
    tensors = load_file(face_file)
    del tensors["image_proj.norm.bias"]
    save_file(tensors, tmp_path / "short.safetensors")
    with pytest.raises(ValueError, match="1 missing: resampler.id_norm.bias"):
        ours.load_ip_adapter_face_id(tmp_path / "short.safetensors")
    assert not attached(ours.unet)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"face_embeds": None, "face_image": None}, "a face adapter is loaded and no face_embeds given"),
        ({"face_embeds": None}, "face_embeds and face_image need each other"),
        ({"face_image": None}, "face_embeds and face_image need each other"),
        ({"face_embeds": torch.zeros(12)}, r"must be floats \[1 or more, 12\], got \[12\] of torch.float32"),
        ({"face_embeds": torch.zeros(1, 12, dtype=torch.long)}, "of torch.int64"),
        ({"face_embeds": torch.zeros(2, 12)}, "for each of 1 images or prompts, got 2 face_embeds and 1"),
        ({"face_image": torch.zeros(1, 17, 60)}, r"states \[n, P, 64\], got \[1, 17, 60\]"),
        ({"face_image": "face.png"}, "got .*str"),
        ({"ip_adapter_image": picture(1)}, "no IP-Adapter is loaded"),
    ],
    ids=lambda value: str(list(value)) if isinstance(value, dict) else "",
)
def test_bad_arguments_are_named(faced: Faced, arguments: dict, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message) as caught:
        face_steps(faced[0], **arguments)
    assert "\n" not in str(caught.value)


def test_a_face_without_an_adapter_is_an_error(both: Both) -> None:
    with pytest.raises(ValueError, match="no face adapter is loaded: load_ip_adapter_face_id first"):
        face_steps(both[0])
    with pytest.raises(ValueError, match="no face adapter is loaded"):
        both[0].set_ip_adapter_face_id_scale(1.0)
    both[0].unload_ip_adapter_face_id()  # nothing to do, and nothing happens


def test_files_of_id_vectors(tmp_path: Path) -> None:
    vector = torch.arange(4.0)
    np.save(tmp_path / "flat.npy", vector.numpy())
    np.save(tmp_path / "row.npy", vector[None].numpy())
    save_file({"embedding": vector}, tmp_path / "flat.safetensors")
    for name in ("flat.npy", "row.npy", "flat.safetensors"):
        assert torch.equal(load_face_embeds(tmp_path / name), vector[None])
    np.save(tmp_path / "two.npy", torch.zeros(2, 4).numpy())
    np.save(tmp_path / "object.npy", np.array([{}], dtype=object), allow_pickle=True)
    np.save(tmp_path / "scalar.npy", np.float32(1))
    save_file({"a": vector, "b": -vector}, tmp_path / "two.safetensors")
    (tmp_path / "text.npy").write_text("no array")
    for name, message in {
        "two.npy": r"two.npy: expected one id vector, got \[2, 4\]",
        "object.npy": "object.npy: not an array of numbers",
        "scalar.npy": r"scalar.npy: expected one id vector, got \[\]",
        "text.npy": "text.npy: not an array of numbers",
        "two.safetensors": "two.safetensors: expected one tensor, a face's id vector, got 2",
        "none.npy": "none.npy",
        "face.bin": "face.bin: a pickle",
    }.items():
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            load_face_embeds(tmp_path / name)


def test_on_the_command_line(reference_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write_face(tmp_path / "face" / "face.safetensors")
    encoder = pair("image_encoder", torch.float32)[1]
    encoder.save_pretrained(tmp_path / "face" / "clip-vit-large-patch14-336")
    np.save(tmp_path / "id.npy", FACE["face_embeds"][0].float().numpy())
    FACE["face_image"].save(tmp_path / "face.png")
    command = ["cat", "-w", str(reference_folder), "--device", "cpu", "-q", "--seed", "3", "--steps", "2"]
    flags = ["--face-adapter", str(tmp_path / "face"), "--face-image", str(tmp_path / "face.png"),
             "--face-embeds", str(tmp_path / "id.npy"), "--face-scale", "0.8"]  # fmt: skip
    out = tmp_path / "out.png"
    assert main([*command, *flags, "-o", str(out)]) == 0
    pipe = KolorsPipeline.from_pretrained(reference_folder)
    pipe.scheduler = DPMSolverMultistepScheduler(use_karras_sigmas=True)
    pipe.set_progress_bar_config(disable=True)
    pipe.load_ip_adapter_face_id(tmp_path / "face")
    pipe.set_ip_adapter_face_id_scale(0.8)
    given = FACE | {"generator": torch.Generator().manual_seed(3), "num_inference_steps": 2}
    expected = np.asarray(pipe("cat", **given).images[0]).astype(int)
    with Image.open(out) as image:
        assert abs(np.asarray(image).astype(int) - expected).max() <= 1
    told = read_metadata(out)
    assert (told["face_adapter"], told["face_scale"]) == (str(tmp_path / "face"), "0.8")
    assert main([*command, *flags[:4], "-o", str(tmp_path / "no.png")]) == 2
    assert "--face-adapter, --face-image, --face-embeds and --face-scale need" in capsys.readouterr().err
    assert main([*command, *flags, "--plan"]) == 0
    assert "image_encoder" in capsys.readouterr().out

"""The second example of the reference's Kolors page, with its import lines changed, against a hub here."""

from pathlib import Path

import torch
from PIL import Image

from kolors_core.pipelines.png_metadata import read_metadata
from tests.support.hub import environment, files_of, serving
from tests.support.ip_adapters import write_adapter
from tests.support.parity import pair
from tests.support.pipelines import picture
from tests.support.processes import run_program

MODEL, ADAPTER, REVISION = "Kwai-Kolors/Kolors-diffusers", "Kwai-Kolors/Kolors-IP-Adapter-Plus", "refs/pr/4"
CAT = "asset/test_ip/cat_square.png"
PAGE = """
import torch
from kolors_core import CLIPVisionModelWithProjection
from kolors_core import load_image
from kolors_core import DPMSolverMultistepScheduler, KolorsPipeline

image_encoder = CLIPVisionModelWithProjection.from_pretrained(
    "Kwai-Kolors/Kolors-IP-Adapter-Plus",
    subfolder="image_encoder",
    low_cpu_mem_usage=True,
    torch_dtype=torch.float16,
    revision="refs/pr/4",
)

pipe = KolorsPipeline.from_pretrained(
    "Kwai-Kolors/Kolors-diffusers", image_encoder=image_encoder, torch_dtype=torch.float16, variant="fp16"
)

pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, use_karras_sigmas=True)

pipe.load_ip_adapter(
    "Kwai-Kolors/Kolors-IP-Adapter-Plus",
    subfolder="",
    weight_name="ip_adapter_plus_general.safetensors",
    revision="refs/pr/4",
    image_encoder_folder=None,
)
pipe.enable_model_cpu_offload()

ipa_image = load_image("https://huggingface.co/Kwai-Kolors/Kolors-IP-Adapter-Plus/resolve/main/asset/test_ip/cat_square.png")

image = pipe(
    prompt="best quality, high quality",
    negative_prompt="",
    guidance_scale=6.5,
    num_inference_steps=25,
    ip_adapter_image=ipa_image,
).images[0]

image.save("kolors_ipa_sample.png")
"""


def test_the_pages_second_example_runs(reference_folder: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    write_adapter(adapter / "ip_adapter_plus_general.safetensors")
    pair("image_encoder", torch.float32)[1].save_pretrained(adapter / "image_encoder")
    picture(3, 80, 60).save(tmp_path / "cat.png")
    beside = {"README.md": b"# IP-Adapter", "image_encoder/pytorch_model.bin": b"a pickle"}
    main = {CAT: (tmp_path / "cat.png").read_bytes(), "ip_adapter_plus_general.bin": b"a pickle"}
    repositories = {
        MODEL: {"main": files_of(reference_folder)},
        ADAPTER: {"main": main | beside, REVISION: files_of(adapter) | beside},
    }
    with serving(repositories) as hub:
        script = PAGE.replace("https://huggingface.co", hub.endpoint).replace("steps=25", "steps=2")
        command = [
            "cat", "-w", str(reference_folder), "--steps", "1", "--device", "cpu",
            "-o", "more.png", "--ip-adapter", f"{ADAPTER}@{REVISION}", "--ip-image", "cat.png",
            "--image", f"{hub.endpoint}/{ADAPTER}/resolve/main/{CAT}", "--strength", "1",
        ]  # fmt: skip
        script += f"\nfrom kolors_core.__main__ import main\nraise SystemExit(main({command}))\n"
        run = run_program(script, cwd=tmp_path, env=environment(hub.endpoint, tmp_path / "home"))
        assert run.returncode == 0, run.stderr
        wanted = ["image_encoder/config.json", "image_encoder/model.safetensors"]
        wanted += ["ip_adapter_plus_general.safetensors"]
        assert sorted(hub.fetched(ADAPTER, REVISION)) == wanted, "once: then they are in the cache"
        assert not [path for path in hub.fetched(MODEL) if path.endswith((".bin", ".md"))]
        assert Image.open(tmp_path / "more.png").size == (56, 80)
        assert not hub.fetched(ADAPTER), "the encoder too is of the revision, and that is in the cache"
        assert f"/{ADAPTER}/resolve/main/{CAT}" in [path for _, path, _ in hub.seen]
    made = tmp_path / "kolors_ipa_sample.png"
    assert Image.open(made).size == (128, 128)
    assert read_metadata(made)["prompt"] == "best quality, high quality"

"""What is printed of pipelines, tokenizers, reports and recordings: a few lines that say what there is."""

import re
from base64 import b64decode
from io import BytesIO
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from kolors_core import KolorsPipeline, capture, record_attention
from kolors_core.adapters.ip_adapter import IPAdapter
from kolors_core.adapters.ip_adapter import attach as attach_images
from kolors_core.adapters.lora import attach
from kolors_core.checkpoint import MODEL_SPECS, load_modified
from kolors_core.inspection.thumbnails import thumbnail
from kolors_core.inspection.token_attention import explain_prompt
from kolors_core.pipelines.memory_plan import plan
from kolors_core.pipelines.quantization_report import quantize
from tests.support.ip_adapters import adapter_config
from tests.support.notebooks import check_html, render

SIZE: dict[str, Any] = {"height": 64, "width": 64, "num_inference_steps": 1}


@pytest.fixture
def pipe() -> KolorsPipeline:
    pipe = KolorsPipeline.from_pretrained("tiny")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_a_pipeline_says_its_parts_and_what_is_on(pipe: KolorsPipeline) -> None:
    lines = repr(pipe).splitlines()
    assert lines[0] == "KolorsPipeline of tiny" and len(lines) == 6
    unet = next(line for line in lines if "unet" in line)
    assert "7.8 million parameters, 29.6 MiB, float32 on cpu" in unet
    adapter = attach(pipe.unet, rank=2, name="toy")
    adapter.set_scale(0.5)
    pipe.enable_freeu(0.6, 0.4, 1.1, 1.2)
    text = repr(pipe)
    assert "lora           toy: 0.5" in text and "freeu          s1=0.6" in text
    pipe.disable_lora()
    assert "lora" not in repr(pipe)
    pipe.to(torch.bfloat16)
    assert "bfloat16 on cpu" in repr(pipe)
    pipe.text_encoder = None
    assert "text_encoder" not in repr(pipe)


def test_a_tokenizer_says_its_size_and_file(pipe: KolorsPipeline) -> None:
    text = repr(pipe.tokenizer)
    assert "2,042 pieces and 5 special tokens" in text and text.endswith("tokenizer.model)")


def test_images_say_their_number_and_are_a_row_in_a_notebook(pipe: KolorsPipeline) -> None:
    out = pipe(["a cat", "a dog"], **SIZE)
    assert repr(out) == "KolorsPipelineOutput(images: 2 of 64x64)"
    png = out._repr_png_()
    assert png is not None
    row = np.asarray(Image.open(BytesIO(png)))
    assert row.shape == (64, 64 + 8 + 64, 3)
    assert np.array_equal(row[:, :64], np.asarray(out.images[0])) and (row[:, 64:72] == 255).all()
    wide = type(out)([Image.new("RGB", (1024, 512))] * 9)._repr_png_()
    assert wide is not None and Image.open(BytesIO(wide)).width == 1600
    tensors = pipe("a cat", **SIZE, output_type="pt")
    assert repr(tensors) == "KolorsPipelineOutput(images: Tensor [1, 3, 64, 64] of torch.float32)"
    assert tensors._repr_png_() is None


def test_recordings_say_names_and_shapes(pipe: KolorsPipeline) -> None:
    with record_attention(pipe.unet, "*cross_attention") as maps, capture(pipe.unet, "*") as kept:
        assert "none yet" in repr(maps)
        pipe("a cat", **SIZE)
    lines = repr(maps).splitlines()
    assert lines[0] == "AttentionMaps of 7 attentions" and len(lines) == 8
    assert lines[1] == "  down.1.attentions.0.blocks.0.cross_attention: [2, 4, 4, 5]"
    lines = repr(kept).splitlines()
    assert len(lines) == 14 and lines[-1] == f"  ... and {len(kept) - 12} more"
    assert any("calls, first [2, 64, 8, 8] float32" in line for line in lines)


def test_an_explanation_is_its_sheet_in_a_notebook(pipe: KolorsPipeline) -> None:
    found = explain_prompt(pipe, "一只猫", 3, height=64, width=64)
    assert repr(found).splitlines()[0] == "Explanation of '一只猫'"
    assert "[gMASK] sop" in repr(found) and len(repr(found)) < 500
    sheet = Image.open(BytesIO(found._repr_png_()))
    assert sheet.width > 4 * 192


def test_reports_are_lines_and_no_lists_of_tensors(
    pipe: KolorsPipeline, capsys: pytest.CaptureFixture
) -> None:
    _, report = load_modified("tiny", "unet", MODEL_SPECS["unet"].build, {})
    assert repr(report) == "<LoadReport: 332 loaded>"
    path = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    state = {f"{path}.lora_A.weight": torch.ones(2, 160), f"{path}.lora_B.weight": torch.ones(160, 2)}
    lora = pipe.load_lora_weights(state, adapter_name="toy")
    assert repr(lora) == "<LoRAReport toy: 2 of 2 tensors matched, on 1 layers>"
    pipe.unload_lora_weights()
    adapter = attach(pipe.unet, rank=1, name="x")
    assert repr(adapter) == f"LoRAAdapter('x' on 56 layers of a {type(pipe.unet).__name__}, weight 1.0)"
    adapter.set_active(False)
    assert repr(adapter).endswith("weight 1.0, off)")
    adapter.detach()
    handle = attach_images(pipe.unet, IPAdapter(adapter_config(pipe.unet.config)), source="there")
    assert repr(handle) == "<IPAdapter from there on 7 cross-attentions>"
    handle.detach()
    needed = plan(pipe)
    capsys.readouterr()
    assert repr(needed).startswith("<Plan: GiB for 1 image of 128x128 with guidance on cpu: 0.0")
    assert repr(quantize(pipe, unet=8)).startswith("<QuantizationReport: unet int8, 29.6 -> 21.2 MiB, noise")


def test_a_pipeline_is_a_table_in_a_notebook(pipe: KolorsPipeline) -> None:
    pipe.name_or_path = "<u>tiny"
    attach(pipe.unet, rank=2, name="<i>toy")
    content = render(pipe)["html"]
    pages = check_html(content)
    assert "KolorsPipeline of <u>tiny" in pages.texts and "<i>toy: 1.0" in pages.texts
    assert not {"u", "i"} & pages.tags
    assert content.count("<tr>") == len(repr(pipe).splitlines()) - 1


def test_recordings_are_thumbnails_in_a_notebook(pipe: KolorsPipeline) -> None:
    with (
        record_attention(pipe.unet, "*cross_attention") as maps,
        record_attention(pipe.unet, "mid.*", whole=True) as whole,
        capture(pipe.unet, "*") as kept,
    ):
        assert "none yet" in render(maps)["html"] and "<img" not in render(kept)["html"]
        pipe("a cat", **SIZE)
    content = render(maps)["html"]
    assert content.count("<tr>") == 1 + 7 and content.count("<img") == 7 * 5, "an image a token"
    assert "[2, 4, 4, 5]" in content
    shares = [int(share) for share in re.findall(r">\d+: (\d+)%<", content)]
    assert all(98 <= sum(shares[i : i + 5]) <= 102 for i in range(0, 35, 5)), "of all attention"
    assert render(whole)["html"].count("<img") == 4 + 5, "the pixels of self-attention, and the tokens"
    content = render(kept)["html"]
    assert content.count("<tr>") == 1 + 12 and f"... and {len(kept) - 12} more" in content
    assert "[2, 64, 8, 8] float32" in content and "<img" in content


def test_a_thumbnail_shows_where_the_map_is_high() -> None:
    values = torch.zeros(2, 4)
    values[1, 3] = 5.0
    [found] = re.findall(r'base64,([^"]+)"', thumbnail(values, "<a>"))
    pixels = np.asarray(Image.open(BytesIO(b64decode(found))).convert("L")).astype(int)
    assert pixels.shape == (2, 4) and pixels.argmax() == 7 and (pixels.ravel()[:7] == pixels.min()).all()
    assert "&lt;a&gt;" in thumbnail(values.fill_(torch.nan), "<a>"), "what is not finite is drawn as 0"


def test_reports_are_tables_in_a_notebook(pipe: KolorsPipeline) -> None:
    needed = plan(pipe, is_printed=False)
    content = render(needed)["html"]
    assert content.count("<tr>") == 1 + len(needed.stages) + 3 and content.count("as it is now") == 1
    assert f"{needed.resident:.3f}" in content and "text_encoder" in content
    report = quantize(pipe, unet=8)
    content = render(report)["html"]
    assert content.count("<tr>") == 1 + 2 and f"{report.noise.cosine:.5f}" in content
    assert "int8, 29.6 -&gt; 21.2 MiB" in content and "text_encoder" not in content

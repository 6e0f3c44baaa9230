"""The page in a browser, each tab by pointer and by keyboard; two browsers at once."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from kolors_core.pipelines.png_metadata import attach_metadata, save_png
from kolors_core.ui.server import PageServer
from tests.support.pages import Tab, served, tab_on


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PageServer]:
    with served(tmp_path_factory.mktemp("page") / "images") as server:
        yield server


@pytest.fixture
def tab(server: PageServer, tmp_path: Path) -> Iterator[Tab]:
    with tab_on(server.address, tmp_path / "profile") as tab:
        yield tab
        assert tab.faults(server.address) == []


def drawn(tab: Tab, place: str, count: int = 1) -> None:
    """Wait until results are shown, or fail with the error that is."""
    tab.until(
        f"document.querySelectorAll('{place} .results img').length >= {count} "
        f"&& document.querySelector('{place} .results img').complete || "
        f"!document.querySelector('{place} .stage > .error').hidden"
    )
    assert tab.value(f"document.querySelector('{place} .stage > .error').textContent") == ""


def clear(tab: Tab, place: str) -> None:
    tab.value(f"document.querySelector('{place} .results').replaceChildren()")


def test_drawing_by_pointer_and_by_keyboard(server: PageServer, tab: Tab, tmp_path: Path) -> None:
    tab.fill("#draw [name=steps]", "2")
    tab.fill("#draw [name=seed]", "7")
    tab.point("#draw .start")
    drawn(tab, "#draw")
    clear(tab, "#draw")
    tab.fill("#draw textarea", "a red car")
    tab.press("Enter", ctrl=True)
    drawn(tab, "#draw")
    assert server.studio.gallery.list()["images"][0]["prompt"] == "a red car"
    tab.fill("#draw [name=width]", "63")
    tab.point("#draw .start")
    tab.until("!document.querySelector('#draw .stage > .error').hidden")
    assert "--width must be" in tab.value("document.querySelector('#draw .stage > .error').textContent")
    tab.fill("#draw [name=width]", "64")

    # a part of an image: one half by the pointer, then more by the keyboard
    dropped = "document.body.dispatchEvent(new DragEvent('{}', {{ bubbles: true, cancelable: true }}))"
    assert not any(tab.value(dropped.format(kind)) for kind in ("dragover", "drop")), "the page is left"
    Image.new("RGB", (128, 128), "green").save(tmp_path / "green.png")
    tab.point("#draw [value=inpaint]")
    tab.point("#draw .start")
    told = "document.querySelector('#draw .stage > .error').textContent"
    tab.until(f"{told} === 'choose an image first'")
    tab.choose_file("#draw [name=file]", tmp_path / "green.png")
    tab.until("document.querySelector('.mask').width === 128 && document.querySelector('.source').complete")
    tab.point("#draw .start")
    tab.until(f"{told}.startsWith('paint the part')")
    tab.point(".mask", (0.25, 0.25), (0.25, 0.75))
    painted = (
        "(() => { const m = document.querySelector('.mask');"
        "const d = m.getContext('2d').getImageData(0, 0, 128, 128).data;"
        "return [...Array(128 * 128).keys()].filter(i => d[4 * i + 3] && d[4 * i + 1]).length })()"
    )
    by_pointer = tab.value(painted)
    assert 25 * 60 < by_pointer < 27 * 100
    assert tab.value(painted.replace("d[4 * i + 1])", "d[4 * i + 1] < d[4 * i])")) == by_pointer, "on white"
    tab.focus(".mask")
    tab.press(*["ArrowRight"] * 6, "Space")
    assert tab.value(painted) > by_pointer + 200
    clear(tab, "#draw")
    tab.focus("#draw .start")
    tab.press("Enter")
    drawn(tab, "#draw")
    name = tab.value("document.querySelector('#draw figcaption').textContent")
    with Image.open(server.studio.gallery.find(name)) as image:
        assert image.info["task"] == "KolorsInpaintPipeline" and image.size == (64, 128)
        with Image.open(
            server.studio.gallery.find(f"inputs/{Path(json.loads(image.info['mask_image'])['file']).name}")
        ) as mask:
            colors = {color: count for count, color in mask.convert("RGB").getcolors() or ()}
    white, black = colors.pop((255, 255, 255)), colors.pop((0, 0, 0))
    assert by_pointer + 200 < white + sum(colors.values()) < 128 * 128 / 2 < black
    assert all(red == green == blue for red, green, blue in colors), "edges of strokes are grays"

    # the edges of the image, shown before they are used
    tab.point("#draw [value=control]")
    tab.until("document.querySelector('.edges').src && document.querySelector('.edges').complete")
    clear(tab, "#draw")
    tab.point("#draw .start")
    drawn(tab, "#draw")
    tab.point("#draw [value=prompt]")
    clear(tab, "#draw")
    tab.point("#draw .add-lora")
    tab.fill("#draw [name=lora_from]", "tiny")
    tab.point("#draw .start")
    drawn(tab, "#draw")
    with Image.open(server.studio.gallery.find(server.studio.gallery.list()["images"][0]["name"])) as image:
        assert "lora" in image.info and "ip_adapter" in image.info


def test_comparing_looking_inside_and_the_history(server: PageServer, tab: Tab) -> None:
    tab.focus("#tab-draw")
    tab.press("ArrowRight")
    tab.fill("#compare [name=steps]", "2")
    assert tab.value("document.querySelector('#compare [name=guidance]').disabled"), "it is an axis"
    tab.value("(() => { const [first, second] = document.querySelectorAll('#compare [name=axis]');"
              "second.value = 'sampler'; second.dispatchEvent(new Event('change')) })()")  # fmt: skip
    assert not tab.value("document.querySelector('#compare [name=guidance]').disabled")
    assert "dpm2-ancestral" in tab.value("document.querySelector('#compare .names').textContent")
    values = "document.querySelectorAll('#compare [name=values]')[{}].value"
    assert "euler, " in tab.value(values.format(1))
    for i, text in enumerate(["1, 2", "euler"]):
        tab.value(f"{values.format(i)} = '{text}'")
    tab.focus("#compare .start")
    tab.press("Enter")
    drawn(tab, "#compare")

    tab.point("#tab-inside")
    tab.fill("#inside [name=steps]", "3")
    tab.focus("#inside textarea")
    tab.press("Enter", ctrl=True)
    drawn(tab, "#inside", 2)
    shown = "document.querySelector('#inside .map').src + document.querySelector('#inside .look').innerText"
    seen = {tab.value(shown)}
    tab.point("#inside .tokens button")
    seen.add(tab.value(shown))
    for label in ("Layers", "Steps"):
        tab.focus(f"#inside [aria-label={label}]")
        tab.press("ArrowRight")
        seen.add(tab.value(shown))
    assert len(seen) == 4
    assert "down path" in tab.value(shown) and "steps 1 to 1" in tab.value(shown)
    tab.point("#inside [value=features]")
    clear(tab, "#inside")
    tab.value("document.querySelector('#inside [name=layer]').value = 0")
    tab.value("document.querySelector('#inside [name=step]').value = 2")
    tab.point("#inside .start")
    drawn(tab, "#inside", 10)

    # images that another program brought here, named as it likes; one that says a sheet is no sheet
    for name, facts in (("猫 #1?.png", {}), ("sheet.png", {"prompt": "<b>bold", "sheet": "no JSON"})):
        image = Image.new("RGB", (8, 8))
        attach_metadata(image, facts)
        save_png(image, server.studio.gallery.folder / name)
        os.utime(server.studio.gallery.folder / name, (1, 1))  # the oldest
    tab.focus("#tab-inside")
    tab.press("ArrowRight")
    count = "document.querySelectorAll('.gallery img').length"
    tab.until(f"{count} === {len(server.studio.gallery.list()['images'])}")
    before = tab.value(count)
    tab.focus(".gallery button")
    tab.press("Enter")
    tab.until("document.querySelector('dialog').open")
    assert "a red apple" in tab.value("document.querySelector('dialog').innerText")
    tab.point("dialog .vary")
    tab.until(f"{count} === {before + 1}")
    drawn(tab, "#history")
    titled = "[...document.querySelectorAll('.gallery button')].find(b => b.title === '{}')"
    tab.until("[...document.querySelectorAll('.gallery img')].every(i => i.complete && i.naturalWidth)")
    tab.value(f"{titled.format('<b>bold')}.click()")
    assert tab.value("document.querySelector('dialog .again').hidden")
    assert "<b>bold" in tab.value("document.querySelector('dialog').innerText")
    tab.press("Escape")
    sheet = "[...document.querySelectorAll('.gallery img')].find(i => i.naturalWidth > 200).closest('button')"
    tab.value(f"{sheet}.click()")
    assert "sampler euler" in tab.value("document.querySelector('dialog dl').innerText")
    clear(tab, "#history")
    tab.point("dialog .again")
    tab.until(f"{count} === {before + 2}")
    drawn(tab, "#history")
    sheets = [one for one in server.studio.gallery.list()["images"] if "axes" in one.get("sheet", "")]
    assert len({one["sheet"] for one in sheets}) == 1 < len(sheets)
    tab.point(".gallery button")
    tab.point("dialog .use")
    tab.until("!document.querySelector('#draw').hidden && document.querySelector('.source').complete")
    assert tab.value("document.querySelector('[name=task]:checked').value") == "image"


def test_a_job_is_cancelled_and_another_browser_sees_its_place(
    server: PageServer, tab: Tab, tmp_path: Path
) -> None:
    tab.fill("#draw [name=steps]", "900")
    tab.point("#draw .start")
    tab.until("document.querySelector('#draw .told').textContent.includes(' of 900')")
    assert tab.value("document.querySelector('#draw .preview').src").startswith("data:image/png")
    tab.value("delete document.body.dataset.ready")
    tab.browser("Page.reload")  # the job goes on, and is seen again
    tab.until("document.body?.dataset.ready")
    tab.until("document.querySelector('#draw .told').textContent.includes(' of 900')")
    with tab_on(f"{server.address}?token=a", tmp_path / "other") as other:
        assert other.value("location.search") == "", "a token is not left in the address"
        other.fill("#draw [name=steps]", "1")
        other.point("#draw .start")
        other.until("document.querySelector('#draw .told').textContent === 'waiting, 1 before it'")
        tab.focus("#draw .cancel")
        tab.press("Enter")
        tab.until("document.querySelector('#draw .stage > .error').textContent === 'cancelled'")
        drawn(other, "#draw")
        assert other.faults(server.address) == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_is_readable_on_a_phone(tab: Tab, scheme: str) -> None:
    tab.browser("Emulation.setDeviceMetricsOverride", width=390, height=844, deviceScaleFactor=1, mobile=True)
    tab.browser("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    for name in ("draw", "compare", "inside", "history"):
        tab.point(f"#tab-{name}")
        assert tab.value("document.documentElement.scrollWidth") == 390
        assert tab.value("[...document.querySelectorAll('input, button, select')].every(e => "
                         "e.getBoundingClientRect().right <= 390)")  # fmt: skip
    contrast = """(() => {
        const light = color => color.match(/[0-9.]+/g).slice(0, 3).map(v => v / 255)
            .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
            .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
        const back = light(getComputedStyle(document.body).backgroundColor);
        return [...document.querySelectorAll('label, .hint, h1, #model')]
            .map(e => light(getComputedStyle(e).color))
            .map(l => (Math.max(l, back) + 0.05) / (Math.min(l, back) + 0.05))
            .reduce((a, b) => Math.min(a, b));
    })()"""
    assert tab.value(contrast) > 4.5

"""Where each token of a prompt acted: maps, their labels, the sheet, the page, and the page in a browser."""

import resource
import time
from base64 import b64decode
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from kolors_core.__main__ import main
from kolors_core.cli.explain import write
from kolors_core.inspection.attention_report import (
    GAP,
    TILE,
    Explanation,
    Token,
    displayed_facts,
    font,
    has_no_glyph,
    render_html,
    render_png,
    shortened,
    shown,
    wrapped,
)
from kolors_core.pipelines.png_metadata import read_metadata
from kolors_core.tokenizer import Tokenizer
from tests.support.browser import BROWSER, Browser
from tests.support.explained import TINY, explained
from tests.support.pipelines import picture

HOSTILE = '<script>alert("x")</script>\n\0 \'"><img src=x onerror=alert(1)>{{tokens}} مرحبا\u202egnp.exe'
CORNERS = [(1, 1), (1, 6), (4, 1), (4, 6)]  # of maps of 6 by 8, row and column


@pytest.fixture(scope="module")
def made() -> Explanation:
    """By hand: each of four tokens looks at a corner of its own, in the second view at the next one's."""
    maps = torch.full((4, 6, 8), 0.2)
    for i, (row, column) in enumerate(CORNERS):
        maps[i, row, column] = 0.4
    tokens = [Token(label, label, slice(i, i + 1)) for i, label in enumerate(["9 pads", HOSTILE, "瓢", "🐞"])]
    views = {("all", "all"): maps, ("up", "all"): maps.roll(-1, 0)}
    return Explanation(HOSTILE, picture(0, 48, 64), tokens, views, {"model": HOSTILE, "seed": "7"})


def test_the_sheet_is_bright_where_a_labels_map_is(made: Explanation) -> None:
    pixels = np.asarray(render_png(made).convert("L")).astype(float)
    width, height = TILE, TILE * 3 // 4
    top = pixels.shape[0] - height - GAP - 20  # five tiles are one row
    assert pixels.shape[1] == GAP + 5 * (TILE + GAP)
    grey = np.asarray(made.image.convert("L").resize((width, height))).astype(float)
    for i, (row, column) in enumerate(CORNERS, start=1):
        left = GAP + i * (TILE + GAP)
        lit = pixels[top : top + height, left : left + width] - 0.4 * grey
        y, x = np.unravel_index(lit.argmax(), lit.shape)
        assert abs(y / height - (row + 0.5) / 6) < 0.1 and abs(x / width - (column + 0.5) / 8) < 0.1
        label = pixels[top + height + 2 : top + height + 20, left : left + 132]
        shape = np.asarray(font().getmask(shortened(made.tokens[i - 1].label, 132))).astype(bool)
        assert (label < 128).sum() == shape.sum() > 20, "its label, and no other, stands below"


def test_the_font_has_what_the_models_read() -> None:
    pieces = Tokenizer(TINY).pieces
    read = {c for i in range(len(pieces)) if not pieces.is_byte(i) for c in pieces.id_to_piece(i)}
    assert not [c for c in read if has_no_glyph(c)] and len(read) > 400
    rows = [bytes([a, b]).decode("gb2312", "ignore") for a in range(0xB0, 0xF8) for b in range(0xA1, 0xFF)]
    assert not [c for c in "".join(rows) + "…␣éñüЖΩあア한" if has_no_glyph(c)] and len("".join(rows)) == 6763
    assert shortened("🐞\n\u202e瓢", 400) == "U+1F41EU+000AU+202E瓢"
    assert shortened("abcdefgh", 32) == "abc…" and shortened("abcdefgh", 64) == "abcdefgh"
    assert wrapped("one two 一张瓢虫", 64, 9) == ["one two ", "一张瓢虫"]
    assert wrapped("one two 一张瓢虫", 32, 2) == ["one ", "two …"]
    assert not [line for line in wrapped("x" * 999, 100, 99)[1:] if not line]


class Parts(HTMLParser):
    """A page's tags with their attributes, and its text outside of scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags, self.text, self.inside = list[tuple[str, dict[str, str | None]]](), "", ""
        self.buttons = list[str]()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.inside = tag if tag in ("script", "style", "button") else self.inside
        if tag == "button":
            self.buttons.append("")

    def handle_endtag(self, tag: str) -> None:
        self.inside = "" if tag == self.inside else self.inside

    def handle_data(self, data: str) -> None:
        if self.inside in ("", "button"):
            self.text += data
            if self.inside == "button":
                self.buttons[-1] += data


def check_page(text: str, made: Explanation) -> None:
    """It tells all, and asks nobody for anything."""
    parts = Parts(text)
    assert parts.buttons == [shown(token.label) for token in made.tokens]
    for said in (made.prompt, *displayed_facts(made).values()):
        assert shown(said) in parts.text
    assert [tag for tag, _ in parts.tags if tag in ("script", "style", "h1")] == ["style", "h1", "script"]
    assert "://" not in text and "@import" not in text and "url(" not in text and "\0" not in text
    names = {name for _, attributes in parts.tags for name in attributes}
    assert "href" not in names and not [name for name in names if name.startswith("on")]
    sources = [(attributes, attributes["src"]) for _, attributes in parts.tags if "src" in attributes]
    assert len(sources) == 1 + len(made.views)
    for i, (attributes, source) in enumerate(sources):
        kind, _, content = str(source).partition(",")
        image = Image.open(BytesIO(b64decode(content, validate=True)))
        image.load()
        assert (kind, image.format) == ("data:image/png;base64", "PNG")
        if i == 0:
            assert np.array_equal(np.asarray(image), np.asarray(made.image))
            continue
        shares = made.views[str(attributes["data-part"]), str(attributes["data-span"])]
        count, height, width = shares.shape
        finer = 32 // max(height, width)
        assert image.size == (16 * finer * width, -(-count // 16) * finer * height)
        assert attributes["data-size"] == f"{width} by {height}"
        told = [float(share) for share in str(attributes["data-shares"]).split()]
        assert told == pytest.approx(shares.mean((1, 2)).tolist(), abs=1e-4)


def test_a_page_stands_alone_and_takes_a_prompt_for_text(made: Explanation) -> None:
    check_page(render_html(made), made)
    check_page(render_html(explained()), explained())


def test_the_command_writes_both_and_overwrites_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    command = ["explain", HOSTILE[:36], "-o", str(tmp_path / "new" / "it.png"), "--steps", "2", "-q"]
    command += ["--height", "64", "--width", "64", "-n", "red", "--seed", "3"]
    png, text = tmp_path / "new" / "it.png", tmp_path / "new" / "it.html"
    assert main(command) == 0 and capsys.readouterr() == (f"{png}\n{text}\n", "")
    assert sorted(path.name for path in png.parent.iterdir()) == ["it.html", "it.png"]
    told = read_metadata(png)
    assert (told["seed"], told["negative_prompt"], told["model"]) == ("3", "red", "tiny")
    parts, before = Parts(text.read_text(encoding="utf-8")), png.read_bytes()
    assert shown(HOSTILE[:36]) in parts.text and "all steps (2)" in parts.text
    assert [tag for tag, _ in parts.tags].count("script") == 1
    assert main(command) == 2 and "exists: choose another --out, or --force" in capsys.readouterr().err
    assert main([*command, "--force"]) == 0 and png.read_bytes() == before, "a seed is one sheet"


@pytest.mark.parametrize(
    "flags, message",
    [
        (["-o", "EXISTS"], "EXISTS.html exists"),
        (["-o", "FOLDER", "--force"], "is a folder"),
        (["--height", "65"], "height must be a positive multiple of 8, got 65"),
        (["--steps", "0"], "steps must be"),
        (["--seed", "-1"], "--seed must be"),
        (["-w", "nowhere"], "nowhere"),
    ],
)
def test_errors_are_one_line_and_leave_nothing(
    flags: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    Path("EXISTS.html").write_bytes(b"mine")
    Path("FOLDER.png").mkdir()
    assert main(["explain", "cat", *flags]) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1
    assert Path("EXISTS.html").read_bytes() == b"mine" and len(list(tmp_path.iterdir())) == 2


def test_both_files_or_none(made: Explanation, tmp_path: Path) -> None:
    """The disk is full for the larger of both."""
    files = tmp_path / "it.png", tmp_path / "it.html"
    write(made, *files)
    sizes = [file.stat().st_size for file in files]
    for file in files:
        file.write_bytes(b"before")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (sum(sizes) // 2, hard))
    try:
        with pytest.raises(OSError, match="cannot be written"):
            write(made, *files)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [file.read_bytes() for file in files] == [b"before"] * 2
    assert len(list(tmp_path.iterdir())) == 2


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    if BROWSER is None:
        pytest.skip("neither chromium nor google-chrome is on PATH")
    told = Browser(tmp_path / "profile")
    try:
        target = told("Target.createTarget", url="about:blank")["targetId"]
        session = told("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        told.session = {"sessionId": session}
        for area in ("Page", "Runtime", "Log", "Network"):
            told(f"{area}.enable")
        yield told
    finally:
        told.process.kill()
        told.process.wait()


STATE = """(() => {
    const map = document.getElementById("map"), {width, height} = map;
    const pen = new OffscreenCanvas(width, height).getContext("2d", {willReadFrequently: true});
    pen.drawImage(map, 0, 0);
    const pixels = pen.getImageData(0, 0, width, height).data;
    const light = i => pixels[4 * i] + pixels[4 * i + 1] + pixels[4 * i + 2];
    let most = 0;
    for (let i = 0; i < width * height; i++) if (light(i) > light(most)) most = i;
    const pressed = [...document.querySelectorAll("button")].findIndex(b => b.ariaPressed === "true");
    const told = document.getElementById("told").textContent;
    return {pressed, told, opacity: Number(map.style.opacity), shown: pixels[3] > 0,
            at: [Math.floor(6 * Math.floor(most / width) / height), Math.floor(8 * (most % width) / width)]};
})()"""


def test_in_a_browser_tokens_light_up_by_pointer_and_keyboard(
    browser: Browser, made: Explanation, tmp_path: Path
) -> None:
    views = {key: maps.repeat(5, 1, 1) for key, maps in made.views.items()}
    many = replace(made, tokens=made.tokens * 5, views=views)  # 20, which are two rows of tiles
    (tmp_path / "it.html").write_text(render_html(many), encoding="utf-8")
    browser("Page.navigate", url=f"{(tmp_path / 'it.html').as_uri()}#18")
    end = time.monotonic() + 20
    while not browser.value("document.querySelectorAll('[aria-pressed]').length"):
        assert time.monotonic() < end, "the page draws nothing"

    def check(token: int, corner: int, where: str) -> None:
        state = browser.value(STATE)
        assert (state["pressed"], tuple(state["at"]), state["shown"]) == (token, CORNERS[corner], True)
        label, averaged = shown(many.tokens[token].label), f"{where}, all steps; maps of 8 by 6"
        assert state["told"] == f"“{label}”: 20.4% of the attention ({averaged})."

    def press(key: str, code: int) -> None:
        for kind in ("rawKeyDown", "keyUp"):
            browser("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code)

    check(18, 2, "all layers")  # by the fragment
    # Tab from the top of the page, before anything else: some Chromium start it where scrollIntoView ended.
    press("Tab", 9)
    check(0, 0, "all layers")
    press("ArrowRight", 39)
    check(1, 1, "all layers")
    press("Tab", 9)
    check(2, 2, "all layers")
    press("End", 35)
    check(19, 3, "all layers")
    for i in (0, 15, 16, 17, 3):
        button = f"document.querySelectorAll('button')[{i}]"
        browser.value(f"{button}.scrollIntoView({{block: 'center'}})")
        box = browser.value(f"{button}.getBoundingClientRect().toJSON()")
        x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        browser("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        check(i, i % 4, "all layers")
    browser.value("document.querySelector('[value=up]').click()")
    check(3, 0, "up path")
    browser.value("strength.value = 20; strength.dispatchEvent(new Event('input', {bubbles: true}))")
    assert browser.value(STATE)["opacity"] == 0.2
    press("Escape", 27)
    state = browser.value(STATE)
    assert (state["pressed"], state["shown"]) == (-1, False) and state["told"].startswith("Point at a token")
    wrong = {"Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded"}
    assert [event["params"] for event in browser.events if event["method"] in wrong] == []
    requests = [event for event in browser.events if event["method"] == "Network.requestWillBeSent"]
    asked = [event["params"]["request"]["url"] for event in requests]
    assert asked and all(url.startswith(("file:", "data:")) for url in asked)

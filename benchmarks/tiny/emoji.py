"""Pictures of emoji with English and Chinese captions, made from two packages: the data of the embedded
model.

Pictures: the Noto Color Emoji font (SIL Open Font License 1.1; Debian's fonts-noto-color-emoji). Captions:
Unicode names and CLDR annotations (npm's emojibase-data, MIT; CLDR under the Unicode License).

    apt-get install fonts-noto-color-emoji && npm pack emojibase-data && tar xzf emojibase-data-*.tgz
    python -m benchmarks.emoji OUT --captions package --concepts 160
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
BITMAP = 109  # the font's one size, in pixels
GROUPS = (3, 4, 5, 6, 7)  # animals and nature, food, travel, activities, objects

# One {x} each. The last of each language are kept from training, to measure with.
ENGLISH = (
    "a photo of a {x}",
    "{x}",
    "a picture of a {x}",
    "an emoji of a {x}",
    "a drawing of one {x}",
    "the {x}",
)
CHINESE = ("一张{x}的照片", "{x}", "一幅{x}的图片", "{x}的表情符号", "画一个{x}", "一个{x}")
ENGLISH_UNSEEN = ("please draw a {x} for me", "I would like to see a {x}")
CHINESE_UNSEEN = ("请给我画{x}", "我想看{x}的样子")


@dataclass(frozen=True)
class Concept:
    """One emoji: its character, and its names in both languages, the label first."""

    character: str
    english: tuple[str, ...]
    chinese: tuple[str, ...]

    def captions(self) -> list[str]:
        """Every phrasing of every name, of both languages."""
        found = [phrase.format(x=name) for name in self.english for phrase in ENGLISH]
        return found + [phrase.format(x=name) for name in self.chinese for phrase in CHINESE]


def read_concepts(package: Path, count: int) -> list[Concept]:
    """`count` emoji of one character, taken evenly over `GROUPS`, with the names that are theirs alone."""
    english = json.loads((package / "en" / "data.json").read_text(encoding="utf-8"))
    chinese = {
        e["hexcode"]: e for e in json.loads((package / "zh" / "data.json").read_text(encoding="utf-8"))
    }
    entries = [e for e in english if e.get("group") in GROUPS and "-" not in e["hexcode"] and e["type"] == 1]
    entries = [e for e in entries if e["version"] <= 13 and chinese.get(e["hexcode"])]
    tags: dict[str, int] = {}
    for entry in entries:
        for tag in {entry["label"], *entry.get("tags", ())}:
            tags[tag] = tags.get(tag, 0) + 1
    chosen = sorted(entries[:: max(1, len(entries) // count)][:count], key=lambda e: e["order"])
    ladybug = next(e for e in entries if e["hexcode"] == "1F41E")
    if ladybug not in chosen:
        chosen[0] = ladybug
    return [
        Concept(
            e["emoji"],
            (e["label"], *(tag for tag in e.get("tags", ()) if tags[tag] == 1 and tag != e["label"])),
            (chinese[e["hexcode"]]["label"],),
        )
        for e in chosen
    ]


def draw(concept: Concept, size: int = 128) -> Image.Image:
    """The emoji in the middle of a white square of `size` pixels."""
    font = ImageFont.truetype(str(FONT), BITMAP)
    glyph = Image.new("RGBA", (BITMAP * 2, BITMAP * 2), (255, 255, 255, 0))
    ImageDraw.Draw(glyph).text((20, 20), concept.character, font=font, embedded_color=True)
    box = glyph.getbbox()
    if box is None:
        raise ValueError(f"{FONT.name} has no picture of {concept.character!r}")
    glyph = glyph.crop(box)
    scale = 0.88 * size / max(glyph.size)
    glyph = glyph.resize((round(glyph.width * scale), round(glyph.height * scale)), Image.Resampling.LANCZOS)
    picture = Image.new("RGBA", (size, size), "white")
    picture.alpha_composite(glyph, ((size - glyph.width) // 2, (size - glyph.height) // 2))
    return picture.convert("RGB")


def write(concepts: list[Concept], folder: Path) -> None:
    """A folder that `kolors_core.dataset.read_folder` reads: pictures and metadata.jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for i, concept in enumerate(concepts):
        draw(concept).save(folder / f"{i:04}.png")
        rows.append(json.dumps({"file_name": f"{i:04}.png", "text": concept.captions()}, ensure_ascii=False))
    (folder / "metadata.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write emoji and captions as a training folder.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--captions", type=Path, required=True, help="the unpacked emojibase-data package")
    parser.add_argument("--concepts", type=int, default=160)
    options = parser.parse_args()
    write(read_concepts(options.captions, options.concepts), options.out)

"""Folder of the page: images that were drawn, which say themselves how, and those that were brought here."""

import hashlib
import time
from collections.abc import Sequence
from io import BytesIO
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kolors_core.image import open_image
from kolors_core.pipelines.png_metadata import attach_metadata, read_metadata, save_png
from weights_convert.atomic_write import write_bytes

if TYPE_CHECKING:
    from PIL.Image import Image

MOST_BYTES = 32 * 2**20  # of an image that is brought here
BROUGHT = "inputs"  # the folder of those
SHOWN = ("prompt", "negative_prompt", "seed", "size", "steps", "sampler", "guidance_scale", "task", "sheet")


class Gallery:
    """Images of a folder by name, the newest first."""

    def __init__(self, folder: Path) -> None:
        """Raises OSError naming the folder if it cannot be made."""
        self.folder = folder.absolute()
        self.folder.mkdir(parents=True, exist_ok=True)

    def find(self, name: str) -> Path:
        """Return the file of an image; ValueError for a name that leads elsewhere, or to none."""
        parts = Path(name).parts
        is_own = len(parts) == 1 or (len(parts) == 2 and parts[0] == BROUGHT)
        file = self.folder / name
        if not is_own or name != "/".join(parts) or file.suffix != ".png" or not file.is_file():
            raise ValueError(f"there is no image {name[:100]!r}")
        if file.resolve().parent != (self.folder.resolve() / Path(*parts[:-1])):
            raise ValueError(f"{name[:100]!r} is a link that leaves the folder")
        return file

    def new(self) -> Path:
        """Return a file that is not there, named by the time."""
        stem = time.strftime("%Y%m%d-%H%M%S")
        names = (self.folder / f"{stem}-{i}.png" for i in count(1))
        return next(file for file in names if not file.exists())

    def save(self, images: Sequence["Image"]) -> list[str]:
        """Write images with what they say of themselves; return their names."""
        names = []
        for image in images:
            # The page watches each step, which changes nothing: the image can be drawn again without it.
            facts = {str(name): text for name, text in image.info.items() if isinstance(text, str)}
            facts.pop("callback_on_step_end", None)
            image.info.clear()
            attach_metadata(image, facts)
            save_png(image, file := self.new())
            names.append(file.name)
        return names

    def bring(self, content: bytes) -> dict[str, Any]:
        """Keep an image of any format that pillow reads, as a PNG by its pixels; return its name and size.

        ValueError for anything else, or for more than `MOST_BYTES`.
        """
        if len(content) > MOST_BYTES:
            raise ValueError(f"an image may have {MOST_BYTES:,} bytes, got {len(content):,}")
        from PIL import ImageOps

        with open_image("the image", BytesIO(content)) as image:
            image.load()
            upright = ImageOps.exif_transpose(image)
            has_alpha = "transparency" in upright.info or "A" in upright.mode
            upright = upright.convert("RGBA" if has_alpha else "RGB")
        buffer = BytesIO()
        upright.save(buffer, "PNG")
        name = f"{BROUGHT}/{hashlib.sha256(buffer.getvalue()).hexdigest()[:24]}.png"
        (self.folder / BROUGHT).mkdir(exist_ok=True)
        if not (self.folder / name).exists():
            write_bytes(buffer.getvalue(), self.folder / name)
        return {"name": name, "width": upright.width, "height": upright.height}

    def list(self, start: int = 0, most: int = 48) -> dict[str, Any]:
        """List images from the newest on: the name and facts of each; `more` if there are others."""
        found = sorted((f for f in self.folder.glob("*.png") if f.is_file()), key=_age)
        shown = [self.facts(file) for file in found[start : start + most]]
        return {"images": shown, "more": len(found) > start + most, "all": len(found)}

    def facts(self, file: Path) -> dict[str, Any]:
        """Return the facts that an image has of itself, or why it has none."""
        try:
            facts = read_metadata(file)
        except (OSError, ValueError) as error:
            return {"name": file.name, "error": str(error)}
        shown = {name: facts[name] for name in SHOWN if name in facts}
        return {"name": file.name, "can_be_drawn": "scheduler" in facts and "software" in facts, **shown}


def _age(file: Path) -> tuple[float, str]:
    try:
        return -file.stat().st_mtime, file.name
    except OSError:  # gone since
        return 0.0, file.name

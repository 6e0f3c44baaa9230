"""Recorded attention maps and features as tables with small images, as notebooks show them.

Shapes: B rows, h and w of the feature map, S keys.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kolors_core.inspection.attention_report import colorize, data_uri, normalize
from kolors_core.notebook import Markup, escape, table_html

MOST_ROWS, MOST_MAPS, SIDE = 12, 6, 48  # the last in pixels


def thumbnail(values: Tensor, caption: str) -> Markup:
    """Draw a map [h, w] from its minimum to its maximum in the colors of `HEAT`, with a caption below."""
    levels = normalize(values.detach().float().cpu().nan_to_num(posinf=0.0, neginf=0.0))
    h, w = levels.shape
    size = f'width="{max(1, round(SIDE * w / max(h, w)))}" height="{max(1, round(SIDE * h / max(h, w)))}"'
    image = f'<img alt="" {size} style="image-rendering: pixelated" src="{data_uri(colorize(levels))}">'
    caption = f"<small>{escape(caption)}</small>"
    return Markup(
        f'<div style="display: inline-block; margin: 2px; text-align: center">{image}<br>{caption}</div>'
    )


def maps_html(title: str, recorded: Mapping[str, Sequence[Tensor]]) -> str:
    """Format a row for each attention: its name, its maps' shape, and the keys with the most attention.

    recorded: maps [B, h, w, S] or [B, heads, h, w, S] of each step, or one; drawn is the mean over steps and
    heads of the last row, with each key's share.
    """
    rows = []
    for name, maps in list(recorded.items())[:MOST_ROWS]:
        if not maps:
            rows.append((name, "none yet", ""))
            continue
        steps = f"{len(maps)} of " if len(maps) > 1 else ""
        mean = torch.stack([x[-1].flatten(0, -4).mean(0) if x.ndim == 5 else x[-1] for x in maps]).mean(0)
        shares = mean.mean((0, 1))  # [S]
        most = sorted(shares.topk(min(MOST_MAPS, len(shares))).indices.tolist())
        images = "".join(thumbnail(mean[..., i], f"{i}: {shares[i]:.0%}") for i in most)  # of [h, w, S]
        rows.append((name, f"{steps}{[*maps[0].shape]}", Markup(images)))
    columns = ("attention", "maps", "keys with the most attention, and their shares, in the last row")
    return table_html(title, columns, rows, _more(len(recorded)))


def features_html(title: str, kept: Mapping[str, Sequence[Any]], shapes: Mapping[str, str]) -> str:
    """Format a row for each module: its name, its calls, and the norm over channels of feature maps.

    kept: an entry for each call; drawn are the first, middle and last one's last row. shapes: of the first.
    """
    rows = []
    for name, calls in list(kept.items())[:MOST_ROWS]:
        chosen = sorted({0, len(calls) // 2, len(calls) - 1}) if calls else []
        maps = [(i, calls[i][-1] if isinstance(calls[i], list | tuple) else calls[i]) for i in chosen]
        images = [
            thumbnail(x[-1].detach().float().norm(dim=0), f"call {i}")
            for i, x in maps
            if isinstance(x, Tensor) and x.ndim == 4
        ]
        rows.append((name or "the model", len(calls), shapes[name], Markup("".join(images))))
    columns = ("module", "calls", "the first's features", "norm over channels, in the last row")
    return table_html(title, columns, rows, _more(len(kept)))


def _more(count: int) -> str:
    return f"... and {count - MOST_ROWS} more" if count > MOST_ROWS else ""

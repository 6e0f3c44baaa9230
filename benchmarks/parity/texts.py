"""The tokenizer: ids, masks and positions of texts that are hard on purpose."""

import torch
from diffusers.pipelines.kolors.tokenizer import ChatGLMTokenizer

from benchmarks.parity.layers import Layer
from benchmarks.parity.measure import Measured, Result, error_of
from kolors_core.tokenizer import Tokenizer

TEXTS = [
    "", " ", "  two  spaces ", "\n", "a\tb\nc", "a photo of a ladybug",
    "一张瓢虫的照片，微距，变焦，高质量，电影，拿着一个木牌，写着“可图”",
    "mixed 中英 text, 混合 with ，punctuation。",
    "🐞🇨🇳👩‍👩‍👧 emoji ❤️", "</s>", "<s><unk><pad>", "[gMASK]sop", "<|user|>\n hi <|assistant|>",
    "[MASK] eop sop",
    "עברית العربية हिन्दी ไทย", "ﬁ ﬂ ２ ㌀ é e\u0301", "\u200b\u00a0\ufeff", "𠀀𠮷", "Ünïcödé ß ŁÓDŹ",
    "1234567890 3.14159 -7", "https://example.com/a?b=c&d=e", "`code` {json: [1, 2]} \\n",
    "A" * 3000, "瓢虫" * 400, "word " * 300, "x" * 252, "的" * 254, "的" * 255,
]  # fmt: skip


def measure_tokenizer(tokenizer: Tokenizer) -> Result:
    """Each text is a row of 256 ids, masks and positions; nothing may differ."""
    ours = tokenizer(TEXTS)
    theirs = ChatGLMTokenizer(str(tokenizer.file))(
        TEXTS, padding="max_length", max_length=256, truncation=True, return_tensors="pt"
    )
    parts = {"ids": (ours.ids, "input_ids"), "masks": (ours.mask, "attention_mask"),
             "positions": (ours.positions, "position_ids")}  # fmt: skip
    pairs = {name: (tensor.long(), theirs[key]) for name, (tensor, key) in parts.items()}
    errors = [error_of(name, got, wanted, wanted) for name, (got, wanted) in pairs.items()]
    mine, other = (torch.stack(tensors, dim=1) for tensors in zip(*pairs.values(), strict=True))
    layers = [
        Layer.of(f"text {i}, {text[:20]!r}", f"text {i}", mine[i], other[i], other[i])
        for i, text in enumerate(TEXTS)
    ]
    measured = Measured.of("Tokenizer", "int64", 0.0, errors, layers)
    note = f"{len(TEXTS)} texts, among them empty, too long and odd ones."
    return Result(
        name="Tokenizer", weights="checkpoint", measured=[measured], left_out={}, note=note, unit="text"
    )

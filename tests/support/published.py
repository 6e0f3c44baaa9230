"""Facts of the published files as numbers, so that no test needs the files: ChatGLM3's tokens, and configs.

They were read once from the files. Where the environment variable KOLORS_TEST_DATA names a folder with
those, the tests of these facts run on the files too; so run, they are marked `published`.
"""

import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest
from _pytest.mark import ParameterSet

TOKENIZER = "chatglm3_tokenizer.model"
TEXT_ENCODER = "kolors_text_encoder_config.json"
IMAGE_ENCODER = "clip_vit_l_14_336_config.json"
MARK = pytest.mark.published

VOCABULARY = 64_789  # SentencePiece's pieces; the special tokens are numbered after them
PREFIX = [64_790, 64_792]  # [gMASK] sop
BYTES = range(3, 259)

# Every piece that a text of IDS contains, with its id; a merge of smaller id goes first.
PIECES = """
▁t 259 ▁a 260 on 264 ▁▁ 265 er 266 ▁s 268 at 269 ▁o 270 ▁w 271 or 274 it 275 is 276 an 277 es 278 ▁p 281
ed 286 ▁m 288 ▁of 290 ion 297 as 298 ▁h 299 st 305 ▁l 306 ct 313 ▁e 315 ot 322 ad 333 us 337 ac 338
ation 340 un 342 ith 348 ce 351 ▁with 356 se 360 ist 385 th 398 op 404 ant 417 ▁wor 462 ▁sp 473 te 483
ass 530 ▁- 560 ace 563 so 571 ▁te 596 ord 600 use 662 ph 670 xt 681 ▁tw 699 ug 725 ▁la 736 ▁two 769 ▁[ 790
▁ph 815 io 841 ▁< 906 ex 914 ix 925 ss 957 ces 974 to 1143 of 1448 sp 1457 text 1648 ▁phot 1710 </ 1833
aces 1854 AS 2080 ▁space 2165 uation 2177 ▁text 2254 ser 2325 ta 2428 ▁word 2691 ▁</ 2893 ▁▁▁ 2951
unk 3013 word 3297 ixed 3364 oto 3394 ext 3406 la 3424 wor 3508 ho 3524 ▁é 4006 bu 4133 ady 4174 with 4310
istan 4403 rd 4441 ▁photo 4562 user 4865 ▁mix 4869 ua 5144 hi 5473 MA 5724 tw 5825 ati 6048 >< 6144
pace 6773 ista 6879 ▁mixed 7332 ▁spaces 7642 space 8007 dy 8218 ▁lad 9097 pa 9336 unc 9526 ti 10039
▁lady 10086 lad 10708 nt 10753 sis 10908 tex 11113 nc 11185 mi 11229 hot 11478 unct 11572 ▁mi 11847
wo 11874 two 12689 stan 13028 si 14656 wi 14895 ▁hi 14980 pad 16632 sta 16957 ▁spac 17032 istant 18971
▁spa 19306 phot 19672 pu 19853 photo 20917 ▁wit 22025 tu 23078 assis 23649 ▁wo 26686 tan 27230 atio 29468
stant 30202 tion 30526 ▁ 30910 e 30911 t 30912 a 30913 o 30914 i 30915 n 30916 s 30917 r 30918 h 30919
l 30920 d 30921 c 30922 u 30923 m 30924 p 30925 f 30926 g 30927 y 30928 w 30929 . 30930 b 30931 , 30932
k 30934 S 30937 A 30938 1 30939 0 30940 - 30941 2 30943 M 30944 x 30948 3 30966 / 30967 9 30969 5 30970
4 30972 8 30973 6 30978 7 30981 K 30984 “ 30989 ” 30991 > 30994 [ 30995 ] 30996 < 31002 | 31007 é 31008
， 31123 。 31155 \u0301 31212 ﬁ 31238 一个 31623 质量 31838 电影 31867 ▁， 32459 照片 32643 高质量 32742
▁中 34001 ▁一 34346 混合 34496 一张 34663 着一 36585 拿着 36860 的照片 39094 wit 41238 着一个 43332
写着 44857 中英 50617 SK 52105 的 54530 一 54531 中 54538 个 54550 可 54568 高 54589 合 54620 着 54666
量 54698 电 54710 影 54765 质 54824 变 54848 片 54900 张 54940 图 54959 照 55010 英 55029 微 55072
写 55172 牌 55184 木 55366 拿 55380 距 55634 焦 55723 混 55880 虫 56395 瓢 59450 bug 64526 hoto 64699
"""

# Of each text what SentencePiece makes of it, without prefix and pads.
IDS = {
    "": [],
    "a photo of a ladybug": [260, 4562, 290, 260, 10086, 64526],
    "一张瓢虫的照片，微距，变焦，高质量，电影，拿着一个木牌，写着“可图”": [
        34346, 54940, 59450, 56395, 39094, 31123, 55072, 55634, 31123, 54848, 55723, 31123, 32742, 31123,
        31867, 31123, 36860, 31623, 55366, 55184, 31123, 44857, 30989, 54568, 54959, 30991,
    ],
    "mixed 中英 text, 混合 with ，punctuation。": [
        7332, 34001, 55029, 2254, 30932, 30910, 34496, 356, 32459, 30925, 11572, 2177, 31155,
    ],
    "一张瓢虫的照片🐞": [34346, 54940, 59450, 56395, 39094, 243, 162, 147, 161],
    "e\u0301 é ﬁ 🐞龘": [315, 31212, 4006, 30910, 31238, 30910, 243, 162, 147, 161, 236, 193, 155],
    "  two  spaces ": [265, 769, 265, 1457, 1854, 30910],
    "a\tb\nc": [260, 12, 30931, 13, 30922],
    "1234567890 3.14159 -7": [
        30910, 30939, 30943, 30966, 30972, 30970, 30978, 30981, 30973, 30969, 30940,
        30910, 30966, 30930, 30939, 30972, 30939, 30970, 30969, 560, 30981,
    ],
    "</s>": [2893, 30917, 30994],
    "<s><unk><pad>": [906, 30917, 6144, 3013, 6144, 16632, 30994],
    "[gMASK]sop": [790, 30927, 30944, 2080, 30984, 30996, 30917, 404],
    "<|user|>\n hi <|assistant|>": [
        906, 31007, 4865, 31007, 30994, 13, 14980, 906, 31007, 530, 18971, 31007, 30994,
    ],
    "瓢虫" * 400: [30910, *[59450, 56395] * 400],
    "word " * 300: [2691] * 300 + [30910],
}  # fmt: skip

# All that says how the models compute; fields of training alone too, since an unknown one would be refused.
TEXT_ENCODER_CONFIG = {
    "_name_or_path": "THUDM/chatglm3-6b-base", "model_type": "chatglm", "architectures": ["ChatGLMModel"],
    "add_bias_linear": False, "add_qkv_bias": True, "apply_query_key_layer_scaling": True,
    "apply_residual_connection_post_layernorm": False, "attention_dropout": 0.0,
    "attention_softmax_in_fp32": True, "bias_dropout_fusion": True, "ffn_hidden_size": 13696,
    "fp32_residual_connection": False, "hidden_dropout": 0.0, "hidden_size": 4096, "kv_channels": 128,
    "layernorm_epsilon": 1e-05, "multi_query_attention": True, "multi_query_group_num": 2,
    "num_attention_heads": 32, "num_layers": 28, "original_rope": True, "padded_vocab_size": 65024,
    "post_layer_norm": True, "rmsnorm": True, "seq_length": 32768, "use_cache": True,
    "torch_dtype": "float16", "transformers_version": "4.30.2", "tie_word_embeddings": False,
    "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
IMAGE_ENCODER_CONFIG = {
    "attention_dropout": 0.0, "dropout": 0.0, "hidden_act": "quick_gelu", "hidden_size": 1024,
    "image_size": 336, "initializer_factor": 1.0, "initializer_range": 0.02, "intermediate_size": 4096,
    "layer_norm_eps": 1e-05, "model_type": "clip_vision_model", "num_attention_heads": 16,
    "num_channels": 3, "num_hidden_layers": 24, "patch_size": 14, "projection_dim": 768,
    "torch_dtype": "float32",
}  # fmt: skip


def published_file(name: str) -> Path | None:
    """Find a published file in the folder that KOLORS_TEST_DATA names; None where that is not set.

    Raises FileNotFoundError if the folder does not have it.
    """
    folder = os.environ.get("KOLORS_TEST_DATA")
    if not folder:
        return None
    file = Path(folder) / name
    if not file.is_file():
        raise FileNotFoundError(f"{file}: expected in the folder that KOLORS_TEST_DATA names")
    return file


def configs(name: str, facts: dict[str, Any]) -> list[ParameterSet]:
    """List the configs to test: the facts, and the published file where there is one."""
    file = published_file(name)
    files = [] if file is None else [pytest.param(json.loads(file.read_text()), id=name, marks=MARK)]
    return [pytest.param(facts, id="facts"), *files]


def pieces() -> dict[str, int]:
    """Read PIECES: each piece with its id."""
    words = PIECES.split()
    return dict(zip(words[::2], map(int, words[1::2]), strict=True))


def _field(number: int, value: int | float | bytes) -> bytes:
    """Encode a field of a protocol buffer: a number as varint, a float in 4 bytes, bytes behind a length."""
    if isinstance(value, float):
        return _varint(number << 3 | 5) + struct.pack("<f", value)
    if isinstance(value, bytes):
        return _varint(number << 3 | 2) + _varint(len(value)) + value
    return _varint(number << 3) + _varint(value)


def _varint(number: int) -> bytes:
    """Encode a whole number, 7 bits in a byte, the lowest first."""
    low, high = number & 127, number >> 7
    return bytes([low | 128]) + _varint(high) if high else bytes([low])


def write_stand_in(file: Path) -> Path:
    """Write a SentencePiece model that encodes the texts of IDS as ChatGLM3's does; return its path.

    It has that model's settings, size, bytes and PIECES; all other ids are unused, so that of other texts the
    characters without a piece become bytes.
    """
    unknown, control, unused, byte = 2, 3, 5, 6  # ModelProto.SentencePiece.Type; a plain piece is 1
    known = {i: piece for piece, i in pieces().items()}
    content = bytearray()
    for i in range(VOCABULARY):
        if i < BYTES.start:
            text, kind = ("<unk>", "<s>", "</s>")[i], control if i else unknown
        elif i in BYTES:
            text, kind = f"<0x{i - BYTES.start:02X}>", byte
        else:
            text, kind = (known[i], 1) if i in known else (f"\ue000{i}", unused)
        content += _field(1, _field(1, text.encode()) + _field(2, -float(i)) + _field(3, kind))
    content += _field(2, _field(3, 2) + _field(35, 1))  # byte-pair encoding, with bytes for what is unknown
    content += _field(3, _field(1, b"identity") + _field(3, 1) + _field(4, 0))  # "▁" in front, spaces kept
    file.write_bytes(content)
    return file

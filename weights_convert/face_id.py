"""IP-Adapter-FaceID-Plus: public file <-> `kolors_core.adapters.face_id.FaceIDAdapter`.

Kolors-IP-Adapter-FaceID-Plus is a pickle, `ipa-faceid-plus.bin`, of two dicts, "image_proj" and
"adapter_modules"; `python -m weights_convert --pickle` joins their names by dots. The keys and values are
numbered as in IP-Adapter-Plus.
"""

from weights_convert.ip_adapter import BRANCH, LAYER, LAYER_RULES
from weights_convert.key_mapping import Block, Table, weight_and_bias, weight_only

FACE_ID = Table(
    component="face_id",
    blocks=(
        Block("image_proj", weight_and_bias("proj.0", "proj.2", "norm")),
        Block(r"image_proj\.perceiver_resampler", weight_and_bias("proj_in", "proj_out", "norm_out")),
        *(Block(rf"image_proj\.perceiver_resampler\.{path}", tensors) for path, tensors in LAYER),
        Block(r"adapter_modules\.\d*[13579]", weight_only(*BRANCH)),
    ),
    rules=(
        ("image_proj.perceiver_resampler", "resampler"),
        ("image_proj.proj.0", "resampler.id_in"),
        ("image_proj.proj.2", "resampler.id_out"),
        ("image_proj.norm", "resampler.id_norm"),
        *LAYER_RULES,
        ("adapter_modules", "branches"),
        *BRANCH.items(),
    ),
    odd_numbered=("adapter_modules",),
    required={
        "image_proj.proj.0.weight": "it reads the face's id vector",
        "image_proj.perceiver_resampler.proj_in.weight": "it reads CLIP's states of the face",
        "adapter_modules.1.to_k_ip.weight": "it is the first attention's image branch",
    },
)

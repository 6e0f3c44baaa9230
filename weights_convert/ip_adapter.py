"""IP-Adapter-Plus: public file <-> `IPAdapter` of kolors_core (a resampler, 70 keys and values).

The file, and ours, number the UNet's cross-attentions 1, 3, 5, ... in the order down, up, mid.
"""

from weights_convert.key_mapping import Block, Table, weight_and_bias, weight_only

LAYER = (
    (r"layers\.\d+\.0", weight_and_bias("norm1", "norm2") + weight_only("to_q", "to_kv", "to_out")),
    (r"layers\.\d+\.1", weight_and_bias("0") + weight_only("1", "3")),
)
LAYER_RULES = (
    ("0.norm1", "attention.norm_image"),
    ("0.norm2", "attention.norm_latents"),
    ("0.to_q", "attention.to_q"),
    ("0.to_kv", "attention.to_kv"),
    ("0.to_out", "attention.to_out"),
    ("1.0.weight", "feed_forward.norm.weight"),
    ("1.0.bias", "feed_forward.norm.bias"),
    ("1.1.weight", "feed_forward.proj_in.weight"),
    ("1.3.weight", "feed_forward.proj_out.weight"),
)
BRANCH = {"to_k_ip": "to_k", "to_v_ip": "to_v"}

IP_ADAPTER = Table(
    component="ip_adapter",
    blocks=(
        Block("image_proj", (*weight_and_bias("proj_in", "proj_out", "norm_out"), "latents")),
        *(Block(rf"image_proj\.{path}", tensors) for path, tensors in LAYER),
        Block(r"ip_adapter\.\d*[13579]", weight_only(*BRANCH)),
    ),
    rules=(
        ("image_proj", "resampler"),
        *LAYER_RULES,
        ("ip_adapter", "branches"),
        *BRANCH.items(),
    ),
    odd_numbered=("ip_adapter",),
    required={
        "image_proj.latents": "they are the resampler's queries; a plain or a FaceID adapter has none",
        "image_proj.layers.0.0.to_kv.weight": "it is the resampler's first attention",
        "ip_adapter.1.to_k_ip.weight": "it is the first attention's image branch",
    },
)

"""CLIP's image encoder: transformers' CLIPVisionModelWithProjection <-> ours (392 tensors).

Ours is `kolors_core.adapters.clip_vision.CLIPVision`. The public name of the first norm is misspelt,
`pre_layrnorm`. A whole CLIP has its text encoder too, which Kolors does not use.
"""

from weights_convert.key_mapping import Block, Table, weight_and_bias, weight_only

_ATTENTION = tuple(f"self_attn.{name}_proj" for name in ("q", "k", "v", "out"))

CLIP_VISION = Table(
    component="image_encoder",
    blocks=(
        Block("", weight_only("visual_projection")),
        Block(r"vision_model", weight_and_bias("pre_layrnorm", "post_layernorm")),
        Block(
            r"vision_model\.embeddings",
            ("class_embedding", *weight_only("patch_embedding", "position_embedding")),
        ),
        Block(
            r"vision_model\.encoder\.layers\.\d+",
            weight_and_bias("layer_norm1", *_ATTENTION, "layer_norm2", "mlp.fc1", "mlp.fc2"),
        ),
    ),
    rules=(
        ("vision_model.embeddings", "embedding"),
        ("class_embedding", "class_token"),
        ("patch_embedding", "patches"),
        ("position_embedding", "positions"),
        ("vision_model.pre_layrnorm", "norm_in"),
        ("vision_model.encoder.layers", "layers"),
        ("vision_model.post_layernorm", "norm_out"),
        ("visual_projection", "projection"),
        ("layer_norm1", "attention_norm"),
        ("self_attn", "attention"),
        ("q_proj", "to_q"),
        ("k_proj", "to_k"),
        ("v_proj", "to_v"),
        ("out_proj", "to_out"),
        ("layer_norm2", "mlp_norm"),
        ("fc1", "proj_in"),
        ("fc2", "proj_out"),
    ),
    dropped={
        "vision_model.embeddings.position_ids": "the numbers 0, 1, 2, ..., which older files store",
        "text_model.": "CLIP's text encoder: Kolors reads prompts with ChatGLM",
        "text_projection.": "CLIP's text encoder: Kolors reads prompts with ChatGLM",
        "logit_scale": "how CLIP compares images with texts, which Kolors does not",
    },
    required={
        "vision_model.embeddings.patch_embedding.weight": "it is the embedding of CLIP's image patches",
        "visual_projection.weight": "it makes image_embeds; CLIPVisionModelWithProjection has it",
    },
)

"""ChatGLM3-6B, the text encoder: public checkpoint <-> `kolors_core.chatglm.ChatGLM` (200 tensors)."""

from weights_convert.key_mapping import Block, Table, weight_and_bias, weight_only

_QKV = "self_attention.query_key_value"
_LAYER = ("input_layernorm", "self_attention.dense", "post_attention_layernorm")
_MLP = ("mlp.dense_h_to_4h", "mlp.dense_4h_to_h")

CHATGLM = Table(
    component="text_encoder",
    blocks=(
        Block("", weight_only("embedding.word_embeddings")),
        Block(r"encoder\.layers\.\d+", weight_and_bias(_QKV) + weight_only(*_LAYER, *_MLP)),
    ),
    rules=(
        ("embedding.word_embeddings", "embedding"),
        ("encoder.layers", "layers"),
        ("input_layernorm", "attention_norm"),
        (_QKV, "attention.to_qkv"),
        ("self_attention.dense", "attention.to_out"),
        ("post_attention_layernorm", "mlp_norm"),
        ("dense_h_to_4h", "proj_in"),
        ("dense_4h_to_h", "proj_out"),
    ),
    dropped={
        "encoder.final_layernorm.weight": "Kolors reads the hidden states before the final norm",
        "output_layer.weight": "language-model head: Kolors reads hidden states, not logits",
        "rotary_pos_emb.inv_freq": "RoPE frequencies are computed in forward, in float32",
    },
    required={
        "embedding.word_embeddings.weight": "it is ChatGLM's token embedding",
        "encoder.layers.0.self_attention.query_key_value.weight": "it is ChatGLM's first attention",
    },
)

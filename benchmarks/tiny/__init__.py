"""How the embedded model is made and measured: data, recipe, quality, LoRA."""

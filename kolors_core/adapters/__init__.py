"""Adapters, attached to a model and removed again: LoRA, IP-Adapter, FaceID, ControlNet, words, FreeU."""

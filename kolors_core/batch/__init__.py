"""Batch generation: many prompts on many processes, killed and resumed."""

"""Data, losses and the trainer."""

"""Inspection of a running model: features, attention maps, the token report."""

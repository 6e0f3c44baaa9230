"""Tasks under the reference's names, composed of the core and its features."""

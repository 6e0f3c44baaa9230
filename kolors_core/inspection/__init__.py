"""What happens inside a model: features, attention maps, the token report."""

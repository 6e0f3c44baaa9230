"""Many prompts on many processes, killed and resumed."""

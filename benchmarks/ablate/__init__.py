"""What a change of the architecture did: two trained side by side, in minutes, on a CPU."""

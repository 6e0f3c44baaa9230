"""Side by side with the reference, in one process."""

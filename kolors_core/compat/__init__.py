"""What only scripts written for the reference need: its classes, built on the plain ones."""

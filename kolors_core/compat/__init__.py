"""Drop-in classes: what only scripts written for the reference need, built on the plain ones."""

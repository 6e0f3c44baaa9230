"""A page to draw with, for one person on one machine: `kolors ui`. See README.md."""

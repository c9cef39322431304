"""Checkpoints scored, and converted from and to what other programs read."""

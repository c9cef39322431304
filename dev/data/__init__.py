"""Text into what the trainer reads."""

"""Where time and memory go, and what would help."""

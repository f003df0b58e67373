"""Reports as one file that a browser shows."""

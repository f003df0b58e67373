"""What this machine can run, tried path by path."""

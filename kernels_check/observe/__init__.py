"""One step seen, by a profile or by a spy."""

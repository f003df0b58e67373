"""The tokens that a trial trains on."""

"""Generation with a trained adapter: cold, first and warm."""

"""Which models there are, their shapes, and what they cost by formula."""

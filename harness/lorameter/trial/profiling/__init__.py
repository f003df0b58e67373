"""A trial taken apart, in steps of its own."""

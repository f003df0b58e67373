"""A profiled trial, in steps of its own."""

"""Closed forms of parameters, bytes and FLOPs of a model's shape."""

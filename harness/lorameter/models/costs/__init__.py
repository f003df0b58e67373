"""Closed forms for parameters, bytes and FLOPs from a model's shape."""

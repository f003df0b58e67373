"""Closed forms: parameters, bytes and operations of a shape."""

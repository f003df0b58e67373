"""Parity: whether an adapter gives the same answers when it is merged, or served on another base."""

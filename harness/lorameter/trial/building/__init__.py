"""Builds the trainable model of a variant."""

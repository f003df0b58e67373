"""Judges what an observation proves about a requirement."""

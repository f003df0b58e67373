"""Profiles: the distribution of time and memory, and remedies."""

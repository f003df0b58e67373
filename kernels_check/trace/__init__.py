"""Recordings of others, read and summed up."""

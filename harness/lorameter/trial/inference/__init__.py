"""Requests: warm, to their natural end, and cold."""

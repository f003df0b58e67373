"""Requests: warm, open-ended, and cold."""

"""Requests to a trained model: warm, until EOS, and after a cold start."""

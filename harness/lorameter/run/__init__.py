"""Runs a study: from the study to its records."""

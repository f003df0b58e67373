"""Estimates, comparisons and verdicts, computed from the records of runs."""

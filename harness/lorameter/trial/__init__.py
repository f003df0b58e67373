"""Trials in their processes: building, training, requests, profiling."""

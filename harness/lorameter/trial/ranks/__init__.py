"""Trials of several ranks, which train one model together."""

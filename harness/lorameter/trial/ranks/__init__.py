"""Trials with several ranks, which train one model together."""

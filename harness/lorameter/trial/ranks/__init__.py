"""Trials of several ranks: processes that train one model together, and what is said of them all."""

"""Trials of several ranks: processes that train one model together, and the record that they share."""

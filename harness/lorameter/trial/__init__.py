"""The measuring process: the only room that loads torch."""

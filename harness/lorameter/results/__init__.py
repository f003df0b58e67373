"""Tables of runs, their files, and the history of a metric."""

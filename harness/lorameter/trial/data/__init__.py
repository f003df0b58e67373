"""Records, tokens and batches of a workload."""

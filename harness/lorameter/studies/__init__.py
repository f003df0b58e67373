"""What is asked: variants, workloads, protocols, claims."""

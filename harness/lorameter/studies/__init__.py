"""Studies: variants, workloads, protocols and claims."""

"""Sites: several devices or machines that measure one run. Whole replicates are distributed, never single trials."""

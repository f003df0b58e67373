"""What records say: estimates, comparisons, verdicts."""

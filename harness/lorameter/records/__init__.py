"""What is written: records of trials, metrics, accounts."""

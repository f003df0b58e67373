"""What the machine is, and what disturbs it."""

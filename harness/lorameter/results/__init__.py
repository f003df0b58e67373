"""What became of many runs: tables of them, their files, and how a number went over time."""

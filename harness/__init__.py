"""lorameter's measuring harness: studies in, trial records and verdicts out."""

"""From a study to its records."""

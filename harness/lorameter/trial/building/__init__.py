"""From a variant to something that can take a step."""

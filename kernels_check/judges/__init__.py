"""What an observation says of a claim."""

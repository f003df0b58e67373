"""A training of several ranks: what each rank says of its steps, and what they say of each other."""

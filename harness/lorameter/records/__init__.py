"""Records of trials, their storage, metrics and units."""

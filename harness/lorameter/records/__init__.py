"""Records of trials and how they are stored; metrics and units."""

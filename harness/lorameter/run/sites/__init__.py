"""Where replicates are measured when there are several places for them: whole replicates are spread, never trials."""

"""Reports as a single HTML file."""

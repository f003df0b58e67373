"""Reads recordings of other tools and sums them up."""

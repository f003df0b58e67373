"""Negative controls: training steps that are broken on purpose, each beside its sound twin.

A check that has never failed proves nothing. Every control names what is broken, the path that must say so and words
of the reason, so that a right verdict for a wrong reason counts as a miss.
"""

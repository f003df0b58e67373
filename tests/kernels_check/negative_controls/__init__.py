"""Negative controls: faulty training steps, each next to a healthy control that meets the same requirement.

A check that never failed proves nothing. Every control names the fault, the path whose check must find it, and words of
the reason, so that a right verdict for a wrong reason is a failure.
"""

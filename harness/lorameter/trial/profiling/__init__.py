"""Profiles of a trial's steps and requests."""

"""Instruments: clocks and memory gauges, one idea a module."""

"""The machine: hardware, settings, telemetry, disturbances, provenance."""

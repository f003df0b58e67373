"""The declarations of what a trial measures: commands, costs and metrics of each measurement."""

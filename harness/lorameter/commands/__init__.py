"""What the doors do: one module a command."""

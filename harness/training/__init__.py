"""What happens in a trial's process while it trains."""

"""Parameters, bytes and FLOPs of a training, and the peak rates of devices."""

"""What runs in a training process that somebody else has written: it follows the steps and changes nothing of them."""

"""What a trial does in each measurement: one function for each command, with the trial as argument."""

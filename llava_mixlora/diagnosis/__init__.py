"""What works on this machine, and how much memory a run will need."""

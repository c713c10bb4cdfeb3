"""What works here, what a run will need, which patches fit. Imports `patches` and the rooms below it."""

"""What a run needs beside the method: checks, checkpoints, held-out data, logs. Imports `method` and `adapters`."""

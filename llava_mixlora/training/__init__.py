"""What a run needs beside the method: checks, checkpoints, signals, logs, counts. Imports `method`, `adapters`."""

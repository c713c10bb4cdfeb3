"""What a training run needs beside the method: checkpoints, signals, logs and shared counts."""

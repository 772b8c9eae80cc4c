"""What keeps a run alive and is no part of the method: processes, signals, checkpoints, logs, the command line."""

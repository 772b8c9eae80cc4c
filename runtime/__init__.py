"""What keeps a run alive and is no part of the method: files, processes, signals, arguments."""

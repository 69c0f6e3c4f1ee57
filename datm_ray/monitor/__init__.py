"""What a user sees of a running or finished run: progress, metrics, loggers, and what it has spent."""

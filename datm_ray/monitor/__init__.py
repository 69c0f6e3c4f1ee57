"""Output about a running or finished run: progress, logs, metrics, loggers and its cost."""

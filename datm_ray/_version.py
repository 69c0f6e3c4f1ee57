"""Version of the package, for `pyproject.toml` and for files that runs write."""

__version__ = "0.1.0"

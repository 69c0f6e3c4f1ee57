"""Methods that make a synthetic set, one folder or module each. Numerics only: no disk, no Ray."""

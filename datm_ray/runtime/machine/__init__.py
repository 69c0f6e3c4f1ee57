"""Machine on which a worker runs: the devices assigned to it, and the versions of its packages."""

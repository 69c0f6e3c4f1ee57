"""Files that outlive a process: expert trajectories, labels and tensor files, on local disks and object stores.

Imports numpy, pyarrow and fsspec, but neither ray, torch nor typer. Values go in and out as flat float vectors, named
arrays and plain metadata. A file appears whole or not at all. Arrow files carry digests of all their bytes, and reading
them executes nothing (no pickle).
"""

"""Files that outlive a process: expert trajectories, tensor files, and the places they are kept in.

Needs numpy, pyarrow and fsspec only. Nothing in this folder imports ray, torch or typer: what goes in and out
are flat float vectors, named arrays and plain metadata. Every file appears whole or not at all, carries
digests of all its bytes, and is read without executing anything (no pickle).
"""

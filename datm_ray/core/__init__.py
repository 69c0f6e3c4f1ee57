"""The numerics: networks, augmentation, matching, the synthetic set.

Needs torch and numpy only. Nothing in this folder imports ray, typer or pyarrow, reads the disk or prints: all of
it runs in one process on a machine without a cluster, and everything random is a function of explicit counters.
"""

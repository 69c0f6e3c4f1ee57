"""Numerics: networks, augmentation, matching, and the synthetic set.

This folder needs torch and numpy only. No module here imports ray, typer or pyarrow, reads the disk or prints. All code
runs in one process without a cluster, and all random numbers are functions of explicit counters.
"""

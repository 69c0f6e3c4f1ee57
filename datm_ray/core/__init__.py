"""Numerics that every method needs: networks and their training, augmentation, MetaDD, the synthetic set.

Needs torch, numpy and the sections of a recipe (`config`). No module here imports ray, typer or pyarrow, reads the disk
or prints. All code runs in one process without a cluster, and all random numbers are functions of explicit counters.
"""

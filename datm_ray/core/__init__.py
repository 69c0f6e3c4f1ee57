"""Numerics that every method needs: networks and their training, augmentation, MetaDD, the synthetic set.

The modules need torch, numpy and the sections of a recipe (`config`). They do not import ray, typer or pyarrow, read
the disk or print. All code runs in one process without a cluster, and all random numbers are functions of explicit
counters.
"""

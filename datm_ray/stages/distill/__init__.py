"""Distillation of one synthetic set: the task, its checkpoints, its validation, and MetaDD's networks.

Some methods make a set in pieces: parts that workers make independently, see `pieces`.
"""

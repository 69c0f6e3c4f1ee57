"""Distillation: its task, checkpoints, sets made in pieces, validation, and MetaDD's networks."""

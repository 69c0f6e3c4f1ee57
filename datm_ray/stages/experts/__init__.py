"""Experts: their training, saved progress, use as trained networks, and the curriculum that they may follow."""

"""Stages of a run (experts, priors, distillation, labels, evaluation), as workers that Ray or this process runs.

A worker is a plain class whose methods are generators of events, see `runtime/executor.py`. No module here imports Ray.
"""

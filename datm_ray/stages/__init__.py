"""Stages of a run, as workers that Ray or this process runs: experts, distillation, evaluation.

A worker is a plain class whose methods are generators of events, see `runtime/executor.py`. No module here imports Ray.
"""

"""Doing the work: workers for each stage, executors that place them, progress.

Workers are plain classes that know nothing of Ray; `ray_executor` is the only module that imports it.
"""

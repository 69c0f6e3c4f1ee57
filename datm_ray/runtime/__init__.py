"""Doing the work: workers for each stage, executors that place them, progress.

Workers are plain classes that know nothing of Ray; only the modules named `ray_...` import it.
"""

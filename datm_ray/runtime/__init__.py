"""Running the stages: executors, workers, run directories, progress.

Workers are plain classes that know nothing of Ray; `ray_executor` is the only module that imports it.
"""

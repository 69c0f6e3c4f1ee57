"""Methods as a worker runs them: their interface, the packaged methods, their memory, and the first images of a set.

The numerics are in `datm_ray/methods`. A method knows nothing of the stage that runs it (`stages/distill/task.py`).
"""

"""Methods as a worker runs them: what every method is given and gives, the packaged ones, and the first images.

The numerics are in `datm_ray/methods`. A method knows nothing of the stage that runs it (`stages/distill.py`).
"""

"""Networks: architectures, their registry, and a network as a function of one parameter vector.

No module here reads the disk or depends on a method. A new architecture is one class in `architectures.py` and one row
in `registry.py`.
"""

"""Networks: architectures, their registry, and a network as a function of one parameter vector.

No module here reads the disk or depends on a method. A new architecture is one class or function in
`architectures.py`, which builds it, and one row in `registry.py`.
"""

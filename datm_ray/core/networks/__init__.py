"""Networks: architectures, their registry, and a network as a function of one parameter vector.

Reads no disk and knows no method. A new architecture is one class in `architectures.py` and one row in `registry.py`.
"""

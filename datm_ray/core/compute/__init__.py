"""How torch computes: compiled functions, CUDA graphs, the precision of float32, private parts of torch.

No module here imports another part of the package.
"""

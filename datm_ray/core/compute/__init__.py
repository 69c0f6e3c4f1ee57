"""How torch computes: compiled functions, CUDA graphs, the precision of float32, private parts of torch.

The modules import nothing of the package but `errors` and `words`.
"""

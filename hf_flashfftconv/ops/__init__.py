"""Operators: the only sub-package that knows torch.library and the shared CUDA library."""

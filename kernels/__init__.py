"""Triton kernels of bi-level routing attention and their launches; nothing here knows of `nn.Module`.

`grid` and `problem` need no Triton: every backend speaks in their terms.
"""

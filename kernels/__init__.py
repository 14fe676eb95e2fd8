"""Triton kernels of bi-level routing attention, and their launches; no file here uses `nn.Module`.

`grid` and `problem` do not import Triton: every backend uses their classes.
"""

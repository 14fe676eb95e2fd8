"""The backends: `registry` lists and picks them, the other files are one each, or a part of one.

Not called `backends`: torch.compile refuses to trace any file whose path contains "triton/backends".
"""

"""The backends: `protocol` says what one is, `select` lists them and picks one.

Not called `backends`: torch.compile refuses to trace any file whose path contains "triton/backends".
"""

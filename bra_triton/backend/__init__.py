"""The backends: `protocol` defines what a backend is; `select` lists all backends and picks one for a call.

This folder is not called `backends`, because torch.compile refuses to trace any file whose path contains
"triton/backends".
"""

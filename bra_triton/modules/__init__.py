"""The drop-in modules: parameters and checks, no computation."""

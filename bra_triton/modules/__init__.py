"""The drop-in modules: parameters and checks of arguments, no computation."""

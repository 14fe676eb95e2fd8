"""The drop-in modules: they hold parameters and check arguments; backends compute the attention."""

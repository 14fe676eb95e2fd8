"""Small maps: one program a region, which routes and attends for several heads at once."""

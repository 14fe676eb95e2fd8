"""Small maps: one program per region and group of heads chooses the key regions and attends to them."""

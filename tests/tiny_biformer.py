"""The arguments of a BiFormer that is small enough for tests, and the size of its images."""

# Three routed stages and a dense one, as in the released models. An image of 64 x 96 gives maps of 16 x 24,
# 8 x 12, 4 x 6 and 2 x 3 tokens. The second stage has two blocks, so that their order makes a difference.
TINY = {
    "depth": (1, 2, 1, 1),
    "embed_dim": (16, 16, 32, 24),
    "head_dim": 8,
    "topks": (1, 2, 4, -2),
    "n_win": 2,
    "num_classes": 5,
}
SIZE = (64, 96)

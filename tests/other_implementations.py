"""Models written by other people: the original attention, pasted copies, the authors' NCHW form, blocks."""

from types import SimpleNamespace

import seed_module
import torch
import torch.nn.functional as F
from torch import nn

original = seed_module.BiLevelRoutingAttention
SIZE = {"dim": 12, "num_heads": 2, "n_win": 2, "topk": 3}


def paste(forward, **layers):
    """A module named `Paste` that has the original's layers, further `layers`, and the given `forward`."""
    attn = type("Paste", (nn.Module,), {"forward": forward})()
    vars(attn).update(vars(original(**SIZE)))
    for name, layer in layers.items():
        setattr(attn, name, layer)
    return attn


def with_parts_of(self, x, **parts):
    """Runs the original's forward on a pasted copy; `parts` replace its layers of the same names."""
    return original.forward(SimpleNamespace(**vars(self) | self._modules | parts), x)


class Permuting(nn.Module):
    """A pasted copy under another class name, which takes and returns NCHW maps."""

    def __init__(self, **arguments):
        super().__init__()
        vars(self).update(vars(original(**arguments)))

    def forward(self, x, ret_attn_mask=False):
        out = original.forward(self, x.permute(0, 2, 3, 1), ret_attn_mask)
        if ret_attn_mask:
            return out[0].permute(0, 3, 1, 2), *out[1:]
        return out.permute(0, 3, 1, 2)


class AuthorsNCHW(nn.Module):
    """A module like the authors' NCHW class, which computes the same by masked dense attention.

    With `least` 1 it also takes maps with fewer tokens than `n_win`, as some pasted copies do.
    """

    def __init__(self, dim, num_heads, n_win, topk, lepe=torch.zeros_like, least=0):
        super().__init__()
        self.least = least
        self.dim, self.num_heads, self.n_win, self.topk = dim, num_heads, n_win, topk
        self.scale = dim**-0.5
        self.lepe = lepe
        self.qkv_linear = nn.Conv2d(dim, 3 * dim, 1)
        self.output_linear = nn.Conv2d(dim, dim, 1)

    def forward(self, x, ret_attn_mask=False):
        height, width = x.shape[-2:]
        rows, columns = self.n_win if isinstance(self.n_win, tuple) else (self.n_win, self.n_win)
        sides = (max(height // rows, self.least), max(width // columns, self.least))
        q, k, v = self.qkv_linear(x).chunk(3, 1)
        means = [
            F.avg_pool2d(t.detach(), sides, ceil_mode=True, count_include_pad=False).flatten(2)
            for t in (q, k)
        ]
        chosen = (means[0].transpose(1, 2) @ means[1]).topk(self.topk).indices
        counts = [-(-side // region_side) for side, region_side in zip((height, width), sides, strict=True)]
        padding = (0, counts[1] * sides[1] - width, 0, counts[0] * sides[0] - height)
        row, column = (torch.arange(n * s) // s for n, s in zip(counts, sides, strict=True))
        region = (row[:, None] * counts[1] + column).flatten()
        mask = torch.zeros(len(x), counts[0] * counts[1], counts[0] * counts[1], dtype=torch.bool)
        mask = mask.scatter(2, chosen, True)[:, region][:, :, region].unsqueeze(1)
        heads = [F.pad(t, padding).flatten(2).unflatten(1, (self.num_heads, -1)).mT for t in (q, k, v)]
        out = F.scaled_dot_product_attention(*heads, attn_mask=mask, scale=self.scale)
        out = out.mT.flatten(1, 2).unflatten(2, (counts[0] * sides[0], -1))[:, :, :height, :width]
        return self.output_linear(out + self.lepe(v))


class Block(nn.Module):
    """A user's block around an attention."""

    def __init__(self, attn):
        super().__init__()
        self.norm = nn.LayerNorm(12)
        self.attn = attn

    def forward(self, x):
        return x + self.attn(self.norm(x))


class AuthorsBlock(nn.Module):
    """The authors' block of BiFormer, with an empty layer in its MLP."""

    def __init__(self, dim, attn):
        super().__init__()
        self.pos_embed = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = attn
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(dim, 3 * dim), nn.Identity(), nn.GELU(), nn.Linear(3 * dim, dim))
        self.drop_path = nn.Identity()

    def forward(self, x):
        x = (x + self.pos_embed(x)).permute(0, 2, 3, 1)
        x = x + self.attn(self.norm1(x))
        return (x + self.mlp(self.norm2(x))).permute(0, 3, 1, 2)

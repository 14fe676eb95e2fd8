"""Replaces the attention in a model that somebody else wrote, and compares the two.

python docs/examples/replace_in_a_model.py
"""

import copy
import time
from collections.abc import Callable

import torch
from einops import rearrange
from torch import Tensor, nn

from bra_triton import replace_attention


class Router(nn.Module):
    """Chooses the regions whose mean keys are most similar to a region's mean query."""

    def __init__(self, topk: int, scale: float) -> None:
        super().__init__()
        self.topk, self.scale, self.emb = topk, scale, nn.Identity()

    def forward(self, query: Tensor, key: Tensor) -> Tensor:
        """Maps means `(N, P, dim)` to region numbers `(N, P, topk)`."""
        logits = (self.emb(query) * self.scale) @ self.emb(key).mT
        return logits.topk(self.topk, dim=-1).indices


class BiLevelAttention(nn.Module):
    """A paste of the original, as models in the wild have it: it gathers the chosen keys and values."""

    def __init__(self, dim: int, num_heads: int = 8, n_win: int = 7, topk: int = 4) -> None:
        super().__init__()
        self.dim, self.num_heads, self.n_win, self.topk = dim, num_heads, n_win, topk
        self.scale = dim**-0.5
        self.router = Router(topk, self.scale)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.wo = nn.Linear(dim, dim)
        self.lepe = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def forward(self, x: Tensor) -> Tensor:
        """Attends over `(N, H, W, dim)`."""
        cut = {"j": self.n_win, "i": self.n_win}
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        lepe = self.lepe(v.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        q, k, v = (rearrange(t, "n (j h) (i w) c -> n (j i) (h w) c", **cut) for t in (q, k, v))
        chosen = self.router(q.mean(2).detach(), k.mean(2).detach())
        image = torch.arange(len(x), device=x.device)[:, None, None]
        k, v = (rearrange(t[image, chosen], "n p k s c -> n p (k s) c") for t in (k, v))
        q, k, v = (rearrange(t, "n p s (m c) -> n p m s c", m=self.num_heads) for t in (q, k, v))
        out = (q * self.scale @ k.mT).softmax(-1) @ v
        out = rearrange(out, "n (j i) m (h w) c -> n (j h) (i w) (m c)", h=x.shape[1] // self.n_win, **cut)
        return self.wo(out + lepe)


class SomebodysModel(nn.Module):
    """Two blocks over a map of 56 x 56 tokens."""

    def __init__(self, dim: int = 64) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, dim, 4, stride=4)
        self.blocks = nn.ModuleList(BiLevelAttention(dim, num_heads=2) for _ in range(2))
        self.head = nn.Linear(dim, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Maps `(N, 3, 224, 224)` to logits `(N, 10)`."""
        x = self.stem(images).permute(0, 2, 3, 1)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x.mean((1, 2)))


def seconds(step: Callable[[], object], device: str) -> float:
    """The time of one call, after one to warm up."""
    for _ in range(2):
        start = time.perf_counter()
        step()
        if device == "cuda":
            torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    """Prints what was replaced, how far outputs differ, and what a training step takes before and after."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    original = SomebodysModel().to(device)
    model = copy.deepcopy(original)
    print(replace_attention(model))

    model.load_state_dict(original.state_dict(), strict=True)  # the keys are the same
    images = torch.randn(2, 3, 224, 224, device=device)
    difference = (model(images) - original(images)).abs().max().item()
    print(f"largest difference of the outputs: {difference:.1e}")
    for name, net in (("before", original), ("after", model)):
        took = seconds(lambda net=net: net(images).sum().backward(), device)
        print(f"training step {name}: {1e3 * took:.0f} ms on {device}")


if __name__ == "__main__":
    main()

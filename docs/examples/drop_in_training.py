"""Trains a small classifier with bi-level routing attention; needs no GPU and takes seconds.

Every image holds two squares, each in one of three colours, somewhere in noise; the class says whether their
colours are the same.

    python docs/examples/drop_in_training.py
"""

import argparse

import torch
from torch import Tensor, nn

from bra_triton import BiLevelRoutingAttention

DIM = 32


class Classifier(nn.Module):
    """Convolutions down to a map of 8 x 8 tokens, attention over 4 x 4 regions of it, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, DIM, 4, stride=4), nn.GELU(), nn.Conv2d(DIM, DIM, 3, padding=1), nn.GELU()
        )
        self.norm = nn.LayerNorm(DIM)
        self.attention = BiLevelRoutingAttention(DIM, num_heads=1, n_win=4, topk=4)
        self.head = nn.Sequential(nn.LayerNorm(DIM), nn.Linear(DIM, DIM), nn.GELU(), nn.Linear(DIM, 2))

    def forward(self, images: Tensor) -> Tensor:
        """Maps `(N, 3, 32, 32)` to logits `(N, 2)`."""
        x = self.stem(images).permute(0, 2, 3, 1)  # the attention takes maps as (N, H, W, C)
        x = x + self.attention(self.norm(x))
        return self.head(x.amax((1, 2)))


def draw(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images `(count, 3, 32, 32)` and their classes `(count,)`."""
    images = 0.3 * torch.randn(count, 3, 32, 32, generator=generator)
    colours = torch.randint(3, (count, 2), generator=generator)
    places = torch.randint(7, (count, 2, 2), generator=generator)
    for image, (first, second), (one, other) in zip(images, colours, places, strict=True):
        image[first, 4 * one[0] : 4 * one[0] + 4, 4 * one[1] : 4 * one[1] + 4] += 3
        image[second, 4 * other[0] : 4 * other[0] + 4, 4 * other[1] : 4 * other[1] + 4] += 3
    return images, (colours[:, 0] == colours[:, 1]).long()


def main() -> None:
    """Trains, and prints the loss and the share of right answers on images never seen."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--steps", type=int, default=100)
    steps = parser.parse_args().steps
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = Classifier().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(steps):
        images, classes = (tensor.to(device) for tensor in draw(64, generator))
        loss = nn.functional.cross_entropy(model(images), classes)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 20 == 0 or step == steps - 1:
            print(f"step {step:3}  loss {loss.item():.3f}")
    images, classes = (tensor.to(device) for tensor in draw(500, generator))
    model.eval()
    with torch.no_grad():
        right = (model(images).argmax(1) == classes).float().mean().item()
    print(f"right on 500 new images: {right:.1%}")


if __name__ == "__main__":
    main()

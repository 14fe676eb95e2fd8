"""Trains on maps of changing sizes and prints how much memory the process holds: it must not grow.

    python -m tests.soak --steps 2000

Every size has its own signature, for which the caches of calls and of plans keep entries.
"""

import argparse
import random
import sys

import psutil
import torch
from torch import nn

from bra_triton import BiLevelRoutingAttention

# Growth that is not a leak: the allocator's arenas, and caches that are not full yet.
ALLOWED_MIB = 16


def soak(steps, backend="torch", most_side=24):
    """Resident memory in MiB after each tenth of the steps; the first tenth fills the caches."""
    torch.manual_seed(0)
    chance = random.Random(0)
    # Few enough that the first tenth of the steps meets most of them.
    sizes = [(chance.randint(1, 3), *(chance.randint(4, most_side) for _ in "hw")) for _ in range(40)]
    model = nn.Sequential(
        BiLevelRoutingAttention(32, 2, 4, auto_pad=True, backend=backend),
        BiLevelRoutingAttention(
            32, 2, 4, auto_pad=True, soft_routing=True, diff_routing=True, backend=backend
        ),
    )
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    resident = []
    for step in range(steps):
        loss = model(torch.randn(*chance.choice(sizes), 32)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % (steps // 10) == 0:
            resident.append(psutil.Process().memory_info().rss / 2**20)
    return resident


def main():
    """Prints the resident memory; returns the exit status."""
    parser = argparse.ArgumentParser("python -m tests.soak", description=__doc__.split("\n\n")[0])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--backend", default="torch")
    options = parser.parse_args()
    resident = soak(options.steps, options.backend)
    growth = resident[-1] - resident[0]
    print("MiB after each tenth of the steps:", *(f"{mib:.0f}" for mib in resident))
    print(f"{options.steps} steps, growth since the first tenth {growth:.1f} MiB, allowed {ALLOWED_MIB}")
    return int(growth > ALLOWED_MIB)


if __name__ == "__main__":
    sys.exit(main())

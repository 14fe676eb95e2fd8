"""Two processes get the gradients of one, with DDP and with FSDP. The two processes run this file, too."""

import os
import subprocess
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from bra_triton import BiLevelRoutingAttention, NCHWBiLevelRoutingAttention

WEIGHED = {"soft_routing": True, "diff_routing": True, "param_routing": True}
POOLED = {"kv_downsample_mode": "conv", "kv_downsample_ratio": 2}


class _Model(nn.Module):
    """All kinds of parameters: projections, LePE, the router's layer, the pooling's convolution."""

    def __init__(self) -> None:
        super().__init__()
        numbers = {"num_heads": 2, "n_win": 2, "topk": 2, "backend": "torch"}
        self.plain = BiLevelRoutingAttention(16, **numbers, auto_pad=True)
        self.full = BiLevelRoutingAttention(16, **numbers, **WEIGHED, **POOLED, auto_pad=True)
        self.nchw = NCHWBiLevelRoutingAttention(16, **numbers)

    def forward(self, x: Tensor) -> Tensor:
        return self.nchw(self.full(self.plain(x)).permute(0, 3, 1, 2))


def _main(rank: int, store: str) -> None:
    """Runs one of the two processes: exit status 0 if all gradients agree, else another status."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    torch.manual_seed(0)
    x, model, sharded = torch.randn(4, 9, 7, 16), _Model(), _Model()  # 9 x 7 needs padding
    sharded.load_state_dict(model.state_dict())
    model(x).square().mean().backward()
    expected = {name: value.grad for name, value in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    mesh = init_device_mesh("cpu", (2,))
    for module in (*sharded.children(), sharded):
        fully_shard(module, mesh=mesh)
    for replica in (DistributedDataParallel(model), sharded):
        replica(x[2 * rank : 2 * rank + 2]).square().mean().backward()
    for name, gradient in expected.items():
        # PyTorch 2.8 adds up the processes' gradients over Gloo and does not divide, for linear layers too.
        shards = sharded.get_parameter(name).grad.full_tensor() / (2 if torch.__version__ < (2, 9) else 1)
        # DDP and FSDP add the gradients of the batch's halves last: rounding of float32 gives up to 1e-6.
        for kind, actual in (("DDP", model.get_parameter(name).grad), ("FSDP", shards)):
            error = (actual - gradient).norm() / gradient.norm()
            assert error < 1e-5, (kind, name, error)
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # at a normal exit gloo's threads may abort the process, although all checks passed


def test_two_processes_have_the_gradients_of_one_and_are_warned_of_no_strides(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "always", __file__]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path / "store")],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    for process in processes:
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output
        assert "strides" not in output


if __name__ == "__main__":
    _main(int(sys.argv[1]), sys.argv[2])

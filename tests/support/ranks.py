"""What `test_distributed` runs in each of its processes: a model with rules under DDP and FSDP, on gloo.

``torchrun --nproc-per-node=2 ranks.py FOLDER [slow]``; what every scenario found is written to
``FOLDER/RANK.pt``. With ``slow``, the scenarios of `parallel` run too.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import freegrad_fx as fg

WORLD = 2
WIDTH = 600  # so that each of the first two layers fills a bucket of 1 MB
TABLE: dict[str, Any] = {"relu": fg.rules.fast_sigmoid(slope=2.0), "params": fg.rules.scale(s=3.0)}


# The calls of the ReLU are in different buckets
PLACES = fg.RuleTable([
    fg.on("relu", call=1).backward("fast_sigmoid", slope=5.0),
    fg.on("relu").backward("fast_sigmoid", slope=2.0),
    fg.on(parameter="second.*").backward("scale", s=3.0),
])  # fmt: skip


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.second = nn.Linear(WIDTH, WIDTH)
        self.third = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.third(torch.relu(self.second(torch.relu(self.first(x)))))


def make() -> Net:
    torch.manual_seed(0)
    return Net()


def sample(rank: int) -> Tensor:
    return torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(rank))


def gradients(run: Callable[[Tensor], Tensor], model: nn.Module, rank: int) -> dict[str, Tensor]:
    run(sample(rank)).square().sum().backward()
    found = {}
    for name, parameter in model.named_parameters():
        g = parameter.grad
        found[name] = g.full_tensor() if isinstance(g, DTensor) else g
        parameter.grad = None
    return found


def ddp(rank: int, backend: str | None, table: dict[str, Any] = TABLE) -> dict[str, Any]:
    gm = fg.transform(make(), table)
    model = DistributedDataParallel(gm, bucket_cap_mb=1)
    counter = CompileCounterWithBackend(backend or "eager")
    run = model if backend is None else torch.compile(model, backend=counter)
    found = [gradients(run, gm, rank) for _ in range(2)]  # buckets are built anew after the first
    return {"gradients": found[1], "first": found[0], "graphs": counter.frame_count}


def ddp_behind(rank: int) -> dict[str, Any]:
    """The model itself, with the pass behind the compiler: the optimizer hands it bucket by bucket."""
    net = make()
    counter = CompileCounterWithBackend("aot_eager")
    backend = fg.backend(PLACES, inner=counter)
    run = torch.compile(DistributedDataParallel(net, bucket_cap_mb=1), backend=backend)
    found = [gradients(run, net, rank) for _ in range(2)]
    sites = [decision.site.name for decision in backend.report(net).with_action("rewrite")]
    return {
        "gradients": found[1],
        "first": found[0],
        "graphs": counter.frame_count,
        "sites": sites,
    }


def fsdp(
    rank: int, parts: bool, backend: str | None, table: dict[str, Any] = TABLE
) -> dict[str, Any]:
    gm = fg.transform(make(), table)
    if parts:
        fully_shard(gm.first)
        fully_shard(gm.second)
    fully_shard(gm)
    run = gm if backend is None else torch.compile(gm, backend=backend)
    return {"gradients": gradients(run, gm, rank)}


def sharded_before(rank: int) -> dict[str, Any]:
    model = make()
    fully_shard(model)
    gm = fg.transform(model, TABLE)
    return {"gradients": gradients(gm, gm, rank)}


TOGETHER: dict[str, Any] = {"params": fg.rules.clip_norm(max_norm=1.0, over="all")}


def learnt(rank: int, wrap: Callable[[nn.Module], nn.Module]) -> dict[str, Any]:
    """A slope that the rule learns: its gradient, and the mean of those that each sample gives in one process."""

    def transformed() -> nn.Module:
        slope = nn.Parameter(
            torch.tensor([2.0])
        )  # fully_shard takes no parameter without dimensions
        return fg.transform(make(), {"relu": fg.rules.fast_sigmoid(slope=slope)})

    gm = transformed()
    each = [gradients(gm, gm, r) for r in range(WORLD)]
    mean = {name: torch.stack([g[name] for g in each]).mean(0) for name in each[0]}
    sharded = transformed()
    return {"gradients": gradients(wrap(sharded), sharded, rank), "expected": mean}


ACTIVATIONS = {"relu": TABLE["relu"]}
SCENARIOS: dict[str, Callable[[int], dict[str, Any]]] = {
    "DDP": lambda rank: ddp(rank, None),
    "DDP, eager back end": lambda rank: ddp(rank, "eager"),
    "DDP, compiled": lambda rank: ddp(rank, "aot_eager"),
    "DDP, rules behind the compiler": ddp_behind,
    "FSDP": lambda rank: fsdp(rank, False, None),
    "FSDP, compiled": lambda rank: fsdp(rank, False, "aot_eager"),
    "FSDP of parts, activations": lambda rank: fsdp(rank, True, None, ACTIVATIONS),
    "FSDP of parts": lambda rank: fsdp(rank, True, None),
    "FSDP of parts, compiled": lambda rank: fsdp(rank, True, "aot_eager"),
    "FSDP, then transform": sharded_before,
    "DDP, learnt": lambda rank: learnt(rank, DistributedDataParallel),
    "FSDP, learnt": lambda rank: learnt(rank, fully_shard),
    "DDP, together": lambda rank: ddp(rank, None, TOGETHER),
    "FSDP, together": lambda rank: fsdp(rank, False, None, TOGETHER),
}


# Most of the compiled ones: together they take as long as all others
SLOW = {
    *("DDP, eager back end", "DDP, compiled", "FSDP, compiled", "FSDP of parts, compiled"),
    *("DDP, learnt", "FSDP, learnt"),
}
SLOW |= {"DDP", "DDP, together", "FSDP, together"}


def main(folder: Path, slow: bool) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    scenarios: dict[str, Callable[[], Any]] = {
        name: partial(scenario, rank)
        for name, scenario in SCENARIOS.items()
        if (name in SLOW) is slow
    }
    if slow:
        import parallel

        scenarios |= parallel.SCENARIOS
    results: dict[str, Any] = {}
    for name, scenario in scenarios.items():
        torch._dynamo.reset()
        try:
            results[name] = scenario()
        except Exception:
            results[name] = {"error": traceback.format_exc()}
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), "slow" in sys.argv[2:])

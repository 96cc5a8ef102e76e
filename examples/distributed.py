"""One table in several processes: the trained weights are those of one process.

    python examples/distributed.py [--quick] [--epochs N]

starts two processes on this machine. On many machines, start it on each of them with PyTorch's `torchrun`:

    torchrun --nnodes=2 --nproc-per-node=4 --rdzv-backend=c10d --rdzv-endpoint=HOST:29400 examples/distributed.py

The network has activations with a surrogate gradient, and gradients of weights that are scaled. Every way of
distributing it starts from the same weights, and each process takes its part of every batch:

    one process            the whole batch, for comparison
    DDP, transform         DistributedDataParallel(transform(model, rules))
    FSDP, transform        fully_shard on each block of the transformed model, and on the model
    FSDP, use              the sharded model itself, in a block of use(rules, model=model)

The data are scikit-learn's digits; nothing is downloaded.
"""

import argparse
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist
import torch.nn.functional as F
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.run import main as torchrun
from torch.nn.parallel import DistributedDataParallel

import freegrad_fx as fg
from _data import Data, load_digits
from _options import count

console = Console()

RULES = fg.RuleTable(
    [
        fg.on("relu").backward("fast_sigmoid", slope=5.0),
        fg.on("params", module="blocks.*").backward("scale", s=0.5),
    ]
)


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = (
            nn.LayerNorm(width),
            nn.Linear(width, 2 * width),
            nn.Linear(2 * width, width),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.relu(self.up(self.norm(x))))


class Net(nn.Module):
    def __init__(self, width: int = 64, depth: int = 3) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


Prepared = tuple[nn.Module, AbstractContextManager[object]]
"""What is called, and the context of the call."""


def alone(model: Net) -> Prepared:
    return fg.transform(model, RULES), nullcontext()


def data_parallel(model: Net) -> Prepared:
    return DistributedDataParallel(fg.transform(model, RULES)), nullcontext()


def sharded(model: nn.Module) -> nn.Module:
    blocks = model.get_submodule("blocks")
    for block in blocks.children():
        fully_shard(block)
    return fully_shard(model)


def transformed_and_sharded(model: Net) -> Prepared:
    return sharded(fg.transform(model, RULES)), nullcontext()


def sharded_in_a_block(model: Net) -> Prepared:
    return sharded(model), fg.use(RULES, model=model)


WAYS: dict[str, Callable[[Net], Prepared]] = {
    "one process": alone,
    "DDP, transform": data_parallel,
    "FSDP, transform": transformed_and_sharded,
    "FSDP, use": sharded_in_a_block,
}


def trained(way: str, data: Data, epochs: int) -> tuple[list[Tensor], float]:
    """The weights after the training, and the accuracy on the held-out set."""
    torch.manual_seed(0)
    model, context = WAYS[way](Net())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    part = (
        slice(None) if way == "one process" else slice(dist.get_rank(), None, dist.get_world_size())
    )
    order = torch.Generator().manual_seed(0)
    size = 32 * dist.get_world_size()
    for _ in range(epochs):
        for batch in torch.randperm(len(data.train_labels), generator=order).split(size):
            if len(batch) < size:
                continue  # so that all processes have parts of the same size
            with context:
                scores = model(data.train_inputs[batch[part]])
            optimizer.zero_grad()
            F.cross_entropy(scores, data.train_labels[batch[part]]).backward()
            optimizer.step()
    with torch.no_grad(), context:
        guesses = model(data.held_out_inputs).argmax(dim=1)
    weights = [whole(parameter.detach()) for parameter in model.parameters()]
    return weights, (guesses == data.held_out_labels).float().mean().item()


def whole(parameter: Tensor) -> Tensor:
    """A parameter with all its shards."""
    return parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter


def compared(epochs: int) -> Table:
    """Train in all ways, and compare the weights with those of one process."""
    data = load_digits()
    table = Table("way", box=box.SIMPLE_HEAD)
    for heading in ("held-out accuracy, %", "largest difference of a weight"):
        table.add_column(heading, justify="right")
    expected: list[Tensor] = []
    for way in WAYS:
        weights, accuracy = trained(way, data, epochs)
        expected = expected or weights
        pairs = zip(weights, expected, strict=True)
        difference = max((a - b).abs().max().item() for a, b in pairs)
        table.add_row(way, f"{100 * accuracy:.2f}", f"{difference:.1e}")
    return table


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a few seconds: 1 epoch")
    parser.add_argument("--epochs", type=count, help="of training (default: 5)")
    chosen = parser.parse_args()
    chosen.epochs = chosen.epochs or (1 if chosen.quick else 5)
    return chosen


def main() -> None:
    chosen = options()
    if not dist.is_torchelastic_launched():
        torchrun(["--standalone", "--nproc-per-node=2", __file__, *sys.argv[1:]])
        return
    # The network is small: a second thread helps little, and slows down on a busy machine.
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    table = compared(chosen.epochs)
    if dist.get_rank() == 0:
        console.rule(f"{dist.get_world_size()} processes, {chosen.epochs} epochs")
        console.print(table)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

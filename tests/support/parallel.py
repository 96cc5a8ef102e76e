"""What `test_parallel` runs in its processes: each way to distribute a model, with each way to give it rules.

Every scenario returns the gradients of this process by the names of the parameters in `Net`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    SplitPoint,
    pipeline,
)
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

import freegrad_fx as fg

WORLD, WIDTH, BLOCKS, MICRO = 2, 8, 4, 4
MAX_NORM = 0.05

RULES = fg.RuleTable([
    fg.on("relu").backward("fast_sigmoid", slope=2.0),
    fg.on(parameter="*up.weight").backward("clip_norm", max_norm=MAX_NORM),
    fg.on("params").backward("scale", s=3.0),
])  # fmt: skip
JOINT: dict[str, Any] = {"params": fg.rules.clip_norm(max_norm=MAX_NORM, over="all")}

Wrap = Callable[[nn.Module], nn.Module]
Gradients = dict[str, Tensor | None]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))


class Net(nn.Module):
    """Blocks, and a layer that no forward uses."""

    def __init__(self, blocks: int = BLOCKS) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.spare = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def make(blocks: int = BLOCKS) -> Net:
    torch.manual_seed(0)
    return Net(blocks)


def sample(number: int) -> Tensor:
    return torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(number))


def loss_of(y: Tensor, target: Tensor | None = None) -> Tensor:
    return y.square().sum()


def gradients(model: nn.Module, prefix: str = "") -> Gradients:
    found: Gradients = {}
    for name, parameter in model.named_parameters():
        g = parameter.grad
        found[prefix + name] = g.full_tensor() if isinstance(g, DTensor) else g
    return found


# ---- The ways to give rules: each returns the model, and a call of it with the rules -------------

Given = tuple[nn.Module, Callable[..., Tensor]]


def transformed(model: nn.Module, wrap: Wrap, rules: Any = RULES) -> Given:
    gm = fg.transform(model, rules)
    return gm, wrap(gm)


def transformed_after(model: nn.Module, wrap: Wrap, rules: Any = RULES) -> Given:
    gm = fg.transform(wrap(model), rules)
    return gm, gm


def transformed_and_compiled(model: nn.Module, wrap: Wrap, rules: Any = RULES) -> Given:
    gm = fg.transform(model, rules)
    return gm, torch.compile(wrap(gm), backend="aot_eager")


def in_block(model: nn.Module, wrap: Wrap, rules: Any = RULES) -> Given:
    wrapped = wrap(model)
    block = fg.use(rules, model=model)

    def run(*args: Any) -> Tensor:
        with block:
            return wrapped(*args)

    return model, run


def compiled(model: nn.Module, wrap: Wrap, rules: Any = RULES) -> Given:
    return model, fg.compile(wrap(model), rules, backend="aot_eager")


def exported(model: nn.Module, wrap: Wrap, rules: Any = RULES) -> Given:
    gm = fg.transform(model, rules, example_inputs=(sample(0),))
    return gm, wrap(gm)


# ---- The ways to distribute ----------------------------------------------------------------------


def data_parallel(**options: Any) -> Wrap:
    return lambda model: DistributedDataParallel(model, find_unused_parameters=True, **options)


def static_graph(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(model, static_graph=True)


def sharded(model: nn.Module) -> nn.Module:
    return fully_shard(model)


def sharded_by_blocks(model: Any) -> nn.Module:
    for block in model.blocks:
        fully_shard(block)
    return fully_shard(model)


def sharded_by_layers(model: Any) -> nn.Module:
    for block in model.blocks:
        fully_shard(block.up)
    return fully_shard(model)


def tensor_parallel(model: nn.Module) -> nn.Module:
    plan: dict[str, Any] = {"blocks.*.up": ColwiseParallel(), "blocks.*.down": RowwiseParallel()}
    return parallelize_module(model, init_device_mesh("cpu", (WORLD,)), plan)


# ---- Scenarios -----------------------------------------------------------------------------------


def one_step(
    give: Callable[..., Given],
    wrap: Wrap,
    rank: int | None = None,
    rules: Any = RULES,
    blocks: int = BLOCKS,
) -> Gradients:
    """A forward and a backward; with the sample of the process, or with the first one if a rank is given."""
    model, run = give(make(blocks), wrap, rules)
    loss_of(run(sample(torch.distributed.get_rank() if rank is None else rank))).backward()
    return gradients(model)


def accumulated(give: Callable[..., Given], wrap: Wrap) -> Gradients:
    """Two backwards, of which only the second communicates."""
    wrapped: list[Any] = []
    model, run = give(make(), lambda m: wrapped.append(wrap(m)) or wrapped[0])
    rank = torch.distributed.get_rank()
    for last in (False, True):
        with ExitStack() as stack:
            if hasattr(wrapped[0], "no_sync"):
                stack.enter_context(ExitStack() if last else wrapped[0].no_sync())
            else:
                wrapped[0].set_requires_gradient_sync(last)
            loss_of(run(sample(rank + WORLD * last))).backward()
    return gradients(model)


def several_steps(give: Callable[..., Given], wrap: Wrap) -> Gradients:
    """The parameters after two steps of an optimizer."""
    model, run = give(make(), wrap)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for step in range(2):
        optimizer.zero_grad()
        loss_of(run(sample(torch.distributed.get_rank() + WORLD * step))).backward()
        optimizer.step()
    return {
        name: parameter.full_tensor() if isinstance(parameter, DTensor) else parameter.detach()
        for name, parameter in model.named_parameters()
    }


def micro_batches() -> Tensor:
    return torch.cat([sample(number) for number in range(MICRO)])


def stages(rules: Any, give: Any, schedule: Any) -> Gradients:
    """The stages of this process, each a block of the model, in a schedule of micro-batches.

    Args:
        rules: The rules of a block of `use` around the schedule, or None.
        give: Returns the module of a stage for a block of the model.
        schedule: The class of the schedule.
    """
    net = make()
    rank = torch.distributed.get_rank()
    given = {n: give(net.blocks[n]) for n in (rank, rank + WORLD)}
    run = [PipelineStage(module, n, BLOCKS, CPU) for n, module in given.items()]
    plan = schedule(run, MICRO, loss_fn=loss_of, scale_grads=False)
    with ExitStack() as stack:
        if rules is not None:
            for module in given.values():
                stack.enter_context(fg.use(rules, model=module))
        step(plan)
    found: Gradients = {}
    for n in given:
        found |= gradients(net.blocks[n], f"blocks.{n}.")
    return found


CPU = torch.device("cpu")


def step(plan: Any) -> None:
    if torch.distributed.get_rank() == 0:
        plan.step(micro_batches())
    else:
        plan.step(target=torch.zeros(4 * MICRO, WIDTH))


def split_and_transformed() -> Gradients:
    """PyTorch splits the model, and each process transforms its stage."""
    rank = torch.distributed.get_rank()
    pipe = pipeline(make(), (sample(0),), split_spec={"blocks.2": SplitPoint.BEGINNING})
    part = fg.transform(copy.deepcopy(pipe.get_stage_module(rank)), RULES)
    stage = PipelineStage(part, rank, WORLD, CPU)
    step(Schedule1F1B(stage, MICRO, loss_fn=loss_of, scale_grads=False))
    return gradients(part)


SCENARIOS: dict[str, Callable[[], Gradients]] = {
    "transform, DDP, unused parameters": lambda: one_step(transformed, data_parallel()),
    "transform, DDP, static graph": lambda: one_step(transformed, static_graph),
    "transform, DDP, accumulated": lambda: accumulated(transformed, data_parallel()),
    "use, DDP": lambda: one_step(in_block, data_parallel(bucket_cap_mb=1e-3)),
    "use, DDP, accumulated": lambda: accumulated(in_block, data_parallel()),
    "compile, DDP": lambda: one_step(compiled, data_parallel(), blocks=1),
    "transform, blocks sharded": lambda: one_step(transformed, sharded_by_blocks),
    "transform, blocks sharded, compiled": lambda: one_step(
        transformed_and_compiled, sharded_by_blocks, blocks=1
    ),
    "transform, blocks sharded, accumulated": lambda: accumulated(transformed, sharded_by_blocks),
    "transform, blocks sharded, steps": lambda: several_steps(transformed, sharded_by_blocks),
    "use, sharded": lambda: one_step(in_block, sharded),
    "use, layers sharded": lambda: one_step(in_block, sharded_by_layers),
    "use, blocks sharded, accumulated": lambda: accumulated(in_block, sharded_by_blocks),
    "use, blocks sharded, steps": lambda: several_steps(in_block, sharded_by_blocks),
    "compile, blocks sharded": lambda: one_step(compiled, sharded_by_blocks, blocks=1),
    "transform, tensor parallel": lambda: one_step(transformed, tensor_parallel, 0),
    "tensor parallel, transform": lambda: one_step(transformed_after, tensor_parallel, 0),
    "use, tensor parallel": lambda: one_step(in_block, tensor_parallel, 0),
    "compile, tensor parallel": lambda: one_step(compiled, tensor_parallel, 0, blocks=1),
    "transform, pipeline": lambda: stages(
        None, lambda block: fg.transform(block, RULES), ScheduleInterleavedZeroBubble
    ),
    "use, pipeline": lambda: stages(RULES, lambda block: block, ScheduleInterleavedZeroBubble),
    "compile, pipeline": lambda: stages(
        None,
        lambda block: fg.compile(block, RULES, backend="aot_eager"),
        ScheduleInterleaved1F1B,  # PyTorch refuses compiled stages in the other one
    ),
    "pipeline, transform": split_and_transformed,
    "transform, layers sharded": lambda: one_step(transformed, sharded_by_layers),
    "example_inputs, blocks sharded": lambda: one_step(exported, sharded_by_blocks),
    "transform, blocks sharded, joint": lambda: one_step(
        transformed, sharded_by_blocks, rules=JOINT
    ),
    "use, blocks sharded, joint": lambda: one_step(in_block, sharded_by_blocks, rules=JOINT),
    "use, tensor parallel, joint": lambda: one_step(in_block, tensor_parallel, 0, rules=JOINT),
    "blocks sharded, transform": lambda: one_step(transformed_after, sharded_by_blocks),
    "tensor parallel, example_inputs": lambda: one_step(
        lambda model, wrap, rules: exported(wrap(model), lambda m: m, rules), tensor_parallel, 0
    ),
}

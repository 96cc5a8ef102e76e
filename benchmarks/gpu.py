"""``python -m benchmarks.gpu``: the rules on a GPU: whether they are right, times, and peak memory.

Each line is a check, with its result, or a measurement. The exit status is 1 if a check fails. It is made to take less
than five minutes. On a CPU, or with ``--quick``, everything runs with small sizes; on a CPU without streams, CUDA
graphs and peak memory.
"""

from __future__ import annotations

import argparse
import copy
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import freegrad_fx as fg

from ._cases import RULES, torchvision_models
from ._measure import compare
from .memory import Llama, ViT

__all__ = ["Line", "Setting", "lines", "main"]

HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Setting:
    """Where and how large.

    Attributes:
        device: The device.
        quick: Whether all sizes are small.
    """

    device: torch.device
    quick: bool

    @property
    def cuda(self) -> bool:
        """Whether the device is a GPU of CUDA."""
        return self.device.type == "cuda"

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.cuda:
            torch.cuda.synchronize(self.device)


@dataclass(frozen=True)
class Line:
    """A check or a measurement.

    Attributes:
        name: What it is.
        result: What was found.
        passed: Whether a check passes; None for a measurement.
    """

    name: str
    result: str
    passed: bool | None = None

    def __str__(self) -> str:
        mark = {True: "ok", False: "FAILED", None: ""}[self.passed]
        return f"{mark:6} {self.name}: {self.result}"


def lines(setting: Setting) -> Iterator[Line]:
    """All checks and measurements. An error in one of them is a failure of it."""
    for part in (_rules, _models, _streams, _graphs, _sharded, _times, _peaks):
        try:
            yield from part(setting)
        except Exception as error:
            traceback.print_exc()
            name = (part.__doc__ or "").strip().rstrip(".")
            yield Line(name, f"{type(error).__name__}: {error}".partition("\n")[0], False)


# --- checks ---


def _rules(setting: Setting) -> Iterator[Line]:
    """The gradients of all rules of one input, on the device and on the CPU."""
    for dtype in (torch.float32, *HALF):
        wrong, count = [], 0
        for name in RULES[:: 4 if setting.quick else 1]:
            rule = fg.get(name)
            bound = rule.parameters.keys() <= rule.bound.keys()
            if rule.declaration.random or not (bound and rule.keeps_shape):
                continue
            count += 1
            x = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
            here, there = (_at_tanh(rule, x.to(place)) for place in (setting.device, "cpu"))
            # a kernel can round differently; where a rule jumps, few entries can be on the other side
            limit = 16 * torch.finfo(dtype).eps * (1 + there.abs())
            if ((here.cpu() - there).abs() > limit).double().mean() > 1e-3:
                wrong.append(name)
        yield Line(
            f"{count} rules in {_named(dtype)}", ", ".join(wrong) or "as on the CPU", not wrong
        )


def _at_tanh(rule: fg.Rule, x: Tensor) -> Tensor:
    x = x.requires_grad_()
    out = fg.ops.decoupled(torch.tanh(fg.ops.stop_gradient(x)), x, rule=rule)
    grad = torch.linspace(-1, 1, x.numel()).view(x.shape).to(x)
    return torch.autograd.grad(out, x, grad)[0].detach()


class _ConvNet(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(width, width, 3)
        self.act, self.pool = nn.LeakyReLU(0.1), nn.MaxPool2d(3, 2, 1)
        self.mean, self.head = nn.AvgPool2d(2), nn.Linear(width, 10)
        self.conv.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(self.pool(self.stem(x).relu()))
        return self.head(self.mean(self.act(x)).mean((2, 3)))  # type: ignore[no-any-return]


def _small(setting: Setting) -> list[tuple[str, nn.Module, Tensor]]:
    torch.manual_seed(0)
    width = 8 if setting.quick else 64
    made = [
        ("convolutions", _ConvNet(width), torch.randn(4, 3, 32, 32)),
        ("Llama", Llama(2, 8 * width, 4, 16 * width, 100), torch.randint(100, (4, 32))),
        ("ViT", ViT(64, 2, 12 * width, 6), torch.randn(4, 3, 64, 64)),
    ]
    return [(name, model.to(setting.device), x.to(setting.device)) for name, model, x in made]


EXACT = fg.tables.save_memory(relu=True, frozen=True)


def _models(setting: Setting) -> Iterator[Line]:
    """The gradients of models with save_memory and natively, in all precisions, also with channels last."""
    for name, model, x in _small(setting):
        truth = _gradients(model.double(), x.double() if x.is_floating_point() else x)
        orders = [torch.contiguous_format]
        orders += [torch.channels_last] if name == "convolutions" else []
        for dtype in (torch.float32, *HALF):
            for order in orders:
                given = x.to(dtype) if x.is_floating_point() else x
                given = given.to(memory_format=order) if given.dim() == 4 else given
                one = copy.deepcopy(model).to(dtype).to(memory_format=order)
                native, found = (_gradients(run, given) for run in (one, fg.transform(one, EXACT)))
                ours, theirs = _distance(found, truth), _distance(native, truth)
                last = ", channels last" if order is torch.channels_last else ""
                yield Line(
                    f"{name} in {_named(dtype)}{last}",
                    f"error {ours:.1e}, natively {theirs:.1e}",
                    ours <= 2 * theirs + 4 * torch.finfo(dtype).eps,
                )


def _gradients(run: nn.Module, x: Tensor) -> list[Tensor]:
    loss = run(x).float().square().mean()
    return [*torch.autograd.grad(loss, [p for p in run.parameters() if p.requires_grad])]


def _distance(found: list[Tensor], expected: list[Tensor]) -> float:
    pairs = [(a.double(), b.double()) for a, b in zip(found, expected, strict=True)]
    return float(
        sum((a - b).square().sum() for a, b in pairs).sqrt()
        / sum(b.square().sum() for _, b in pairs).sqrt()
    )


def _streams(setting: Setting) -> Iterator[Line]:
    """A step on a stream of its own."""
    if not setting.cuda:
        return
    for name, model, x in _small(setting):
        gm = fg.transform(model, EXACT)
        expected, stream = _gradients(gm, x), torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            found = _gradients(gm, x)
        torch.cuda.current_stream().wait_stream(stream)
        error = _distance(found, expected)
        yield Line(f"{name} on another stream", f"difference {error:.1e}", error < 1e-5)


def _graphs(setting: Setting) -> Iterator[Line]:
    """Steps compiled with CUDA graphs."""
    for name, model, x in _small(setting)[: 1 if setting.quick else None]:
        gm = fg.transform(model, EXACT)
        how = {"mode": "reduce-overhead"} if setting.cuda else {"backend": "aot_eager"}
        compiled, expected = torch.compile(gm, **how), _gradients(gm, x)
        for _ in range(3):  # the first runs record
            found = [grad.clone() for grad in _gradients(compiled, x)]
        error, text = _distance(found, expected), " with CUDA graphs" if setting.cuda else ""
        yield Line(f"{name}, compiled{text}", f"difference {error:.1e}", error < 1e-4)


def _sharded(setting: Setting) -> Iterator[Line]:
    """A model under FSDP2 on one device."""
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    name, model, x = _small(setting)[1]
    gm = fg.transform(model, EXACT)
    expected = _gradients(gm, x)
    kind = "nccl" if setting.cuda else "gloo"
    distributed.init_process_group(kind, store=distributed.HashStore(), rank=0, world_size=1)
    try:
        fully_shard(gm, mesh=init_device_mesh(setting.device.type, (1,)))
        gm(x).float().square().mean().backward()
        found = [p.grad.full_tensor() for p in gm.parameters() if p.requires_grad]
    finally:
        distributed.destroy_process_group()
    error = _distance(found, expected)
    yield Line(f"{name} under FSDP2", f"difference {error:.1e}", error < 1e-5)


# --- measurements ---


def _large(setting: Setting) -> list[tuple[str, nn.Module, Tensor, Any]]:
    """Models with their inputs, and rules for their activations; in a quick run, small models take their places."""
    size, batch = (32, 2) if setting.quick else (224, 64)
    resnet: nn.Module = _ConvNet(8) if setting.quick else torchvision_models().resnet50()
    vit = ViT(32, 1, 48, 6) if setting.quick else ViT(224, 12, 384, 6)
    x = torch.randn(batch, 3, size, size, device=setting.device)
    dtype = torch.float32 if setting.quick else torch.bfloat16
    return [
        (name, model.to(setting.device, dtype), x.to(dtype), rules)
        for name, model, rules in (
            ("resnet50", resnet, {"relu": "d(ReLU)"}),
            ("ViT-S", vit, {"gelu": fg.rules.few_bit(bits=3)}),
        )
    ]


def _step(model: nn.Module, x: Tensor, setting: Setting) -> Callable[[], None]:
    def step() -> None:
        for parameter in model.parameters():
            parameter.grad = None
        model(x).float().square().mean().backward()
        setting.synchronize()

    return step


def _times(setting: Setting) -> Iterator[Line]:
    """The times of training steps, with rules over natively."""
    for name, model, x, rules in _large(setting):
        for compiled in (False,) if setting.quick else (False, True):
            wrap = torch.compile if compiled else _as_is
            steps = {
                "native": _step(wrap(model), x, setting),
                "rule": _step(wrap(fg.transform(model, rules)), x, setting),
                "save_memory": _step(
                    wrap(fg.transform(model, fg.tables.save_memory())), x, setting
                ),
            }
            seconds, least = (0.1, 1) if setting.quick else (6.0, 10)
            found = compare(steps, seconds=seconds, least=least)
            ratios = [
                f"{n} × {found.ratio(n, 'native').median:.3f}" for n in steps if n != "native"
            ]
            how = "compiled" if compiled else "eager"
            took = f"{1e3 * found.seconds('native'):.1f} ms natively"
            yield Line(f"a step of {name}, {how}", f"{took}; {', '.join(ratios)}")


def _as_is(model: nn.Module) -> nn.Module:
    return model


def _peaks(setting: Setting) -> Iterator[Line]:
    """Peak memory of training steps; on a CPU, what is kept for the backward."""
    for name, model, x, rules in _large(setting):
        tables = {
            "save_memory": fg.tables.save_memory(),
            "save_memory(relu=True)": fg.tables.save_memory(relu=True),
            "few_bit and save_memory": fg.RuleTable.of(rules) + fg.tables.save_memory(),
        }
        if name != "ViT-S":
            del tables["few_bit and save_memory"]
        else:
            del tables["save_memory(relu=True)"]
        native = _peak(model, x, setting)
        for table, given in tables.items():
            found = _peak(fg.transform(model, given), x, setting)
            what = "peak memory" if setting.cuda else "bytes kept"
            yield Line(
                f"{what} of {name}, {table}",
                f"{found / 2**20:.1f} MiB, × {found / native:.3f} of native",
            )


def _peak(model: nn.Module, x: Tensor, setting: Setting) -> int:
    if not setting.cuda:
        return fg.memory(model, x).kept
    step = _step(model, x, setting)
    step()
    torch.cuda.reset_peak_memory_stats(setting.device)
    step()
    return torch.cuda.max_memory_allocated(setting.device)


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def main(arguments: list[str] | None = None) -> int:
    """Run everything, and print it."""
    parser = argparse.ArgumentParser(description=__doc__)
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default, help=f"the device; here {default}")
    parser.add_argument("--quick", action="store_true", help="small sizes; always on a CPU")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    setting = Setting(device, options.quick or device.type == "cpu")
    name = torch.cuda.get_device_name(device) if setting.cuda else "a CPU"
    print(f"torch {torch.__version__} on {name}")
    failed = False
    for line in lines(setting):
        print(line, flush=True)
        failed = failed or line.passed is False
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())

"""``python -m benchmarks.gpu``: the rules on a GPU: whether they are right, times, and peak memory.

Each line is a check, with its result, or a measurement. The exit status is 1 if a check fails. It is made to take less
than five minutes. On a CPU, or with ``--quick``, everything runs with small sizes; on a CPU without streams, CUDA
graphs and peak memory.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import freegrad_fx as fg

from ._cases import torchvision_models
from ._gpu_rules import RULES, differences
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


def lines(setting: Setting, only: Sequence[str] = ()) -> Iterator[Line]:
    """The checks and measurements of some parts, by default of all. An error in one of them is a failure of it."""
    for part in parts():
        if only and part.__name__.strip("_") not in only:
            continue
        start = time.perf_counter()
        try:
            # without TF32, so that single precision on a GPU is that of a CPU; steps are timed with it
            with torch.backends.cudnn.flags(allow_tf32=part is _times):
                yield from part(setting)
        except Exception as error:
            traceback.print_exc()
            name = (part.__doc__ or "").strip().rstrip(".")
            yield Line(name, f"{type(error).__name__}: {error}".partition("\n")[0], False)
        yield Line(part.__name__.strip("_"), f"took {time.perf_counter() - start:.0f} s")


def parts() -> tuple[Callable[[Setting], Iterator[Line]], ...]:
    """The parts, in the order in which they run."""
    return _rules, _models, _streams, _graphs, _sharded, _peaks, _times


# --- checks ---


def _rules(setting: Setting) -> Iterator[Line]:
    """The gradients of all rules, on the device and on the CPU."""
    for number, dtype in enumerate((torch.float32, *HALF)):
        rules = RULES[number::16] if setting.quick else RULES
        wrong = [text for rule in rules for text in differences(rule, setting.device, dtype)]
        found = "; ".join(wrong) or "as on the CPU, and random ones the same for one seed"
        yield Line(f"{len(rules)} rules in {_named(dtype)}", found, not wrong)


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
        (
            "Llama",
            Llama(1 if setting.quick else 2, 8 * width, 4, 16 * width, 100),
            torch.randint(100, (4, 32)),
        ),
        ("ViT", ViT(64, 1 if setting.quick else 2, 12 * width, 6), torch.randn(4, 3, 64, 64)),
    ]
    return [(name, model.to(setting.device), x.to(setting.device)) for name, model, x in made]


EXACT = fg.tables.save_memory(frozen=True, recompute=8)
# Rules that save something of their own, beside those of the table.
ACTIVATIONS = fg.RuleTable(
    [
        fg.on("relu", optional=True).backward("rectangular"),
        fg.on("silu", optional=True).backward("arctan"),
        fg.on("gelu", optional=True).backward(fg.rules.few_bit(bits=3)),
    ]
)


def _models(setting: Setting) -> Iterator[Line]:
    """The gradients of models with save_memory and natively, in all precisions, also with channels last."""
    for name, model, x in _small(setting):
        truth = _gradients(copy.deepcopy(model).double(), _as(x, torch.float64))
        last = name == "convolutions"
        for dtype in (torch.float32, *HALF)[:: 2 if setting.quick else 1]:
            for order in (torch.contiguous_format, torch.channels_last)[: 2 if last else 1]:
                one = copy.deepcopy(model).to(dtype).to(memory_format=order)
                given = _as(x, dtype)
                given = given.to(memory_format=order) if last else given
                what = _named(dtype) + (", channels last" if order is torch.channels_last else "")
                yield _beside_native(f"{name} in {what}", one, given, truth, dtype)
        for dtype in HALF[: 1 if setting.quick else 2]:
            with torch.autocast(setting.device.type, dtype):
                what = f"{name} under autocast to {_named(dtype)}"
                yield _beside_native(what, model, x, truth, dtype)


def _beside_native(
    what: str, model: nn.Module, x: Tensor, truth: list[Tensor], dtype: torch.dtype
) -> Line:
    native, found = (_gradients(run, x) for run in (model, fg.transform(model, EXACT)))
    ours, theirs = _distance(found, truth), _distance(native, truth)
    good = ours <= 2 * theirs + 4 * torch.finfo(dtype).eps  # False for NaN, too
    return Line(what, f"error {ours:.1e}, natively {theirs:.1e}", good)


def _as(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype) if x.is_floating_point() else x


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
    """Steps on a stream of their own."""
    if not setting.cuda:
        return
    for name, model, x in _small(setting):
        gm = fg.transform(model, ACTIVATIONS + EXACT)
        expected, stream = _gradients(gm, x), torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            found = _gradients(gm, x)
        torch.cuda.current_stream().wait_stream(stream)
        error = _distance(found, expected)
        yield Line(f"{name} on another stream", f"difference {error:.1e}", error < 1e-5)


def _graphs(setting: Setting) -> Iterator[Line]:
    """Steps compiled with CUDA graphs, on inputs that change."""
    from torch._dynamo.utils import counters

    for name, model, x in _small(setting)[: 1 if setting.quick else None]:
        gm = fg.transform(model, ACTIVATIONS + EXACT)
        how = {"mode": "reduce-overhead"} if setting.cuda else {"backend": "aot_eager"}
        compiled, inputs = torch.compile(gm, **how), (x, x.flip(0))
        expected = [_gradients(gm, given) for given in inputs]
        counters.clear()
        errors = [
            _distance([grad.clone() for grad in _gradients(compiled, given)], wanted)
            for _ in range(3)  # the first runs record
            for given, wanted in zip(inputs, expected, strict=True)
        ]
        skipped = counters["inductor"]["cudagraph_skips"] if setting.cuda else 0
        text = " with CUDA graphs" if setting.cuda else ""
        result = f"difference {max(errors):.1e}"
        if skipped:
            result += f"; Inductor made no CUDA graph, {skipped} times"
        good = all(error < 1e-4 for error in errors) and not skipped
        yield Line(f"{name}, compiled{text}", result, good)


def _sharded(setting: Setting) -> Iterator[Line]:
    """A model under FSDP2 on one device, in single precision and with parameters in bfloat16."""
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    name, model, x = _small(setting)[1]
    expected = _gradients(fg.transform(model, ACTIVATIONS + EXACT), x)
    kind = "nccl" if setting.cuda else "gloo"
    distributed.init_process_group(kind, store=distributed.HashStore(), rank=0, world_size=1)
    try:
        for dtype, limit in ((None, 1e-5), (torch.bfloat16, 5e-2)):
            gm = fg.transform(copy.deepcopy(model), ACTIVATIONS + EXACT)
            mesh = init_device_mesh(setting.device.type, (1,))
            fully_shard(gm, mesh=mesh, mp_policy=MixedPrecisionPolicy(param_dtype=dtype))
            gm(x).float().square().mean().backward()
            found = [p.grad.full_tensor() for p in gm.parameters() if p.requires_grad]
            error = _distance(found, expected)
            what = f"{name} under FSDP2" + (f" in {_named(dtype)}" if dtype else "")
            yield Line(what, f"difference {error:.1e}", error < limit)
    finally:
        distributed.destroy_process_group()


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


COMPILED_LIMIT = 1.01  # of the native time


def _times(setting: Setting) -> Iterator[Line]:
    """The times of training steps, with rules over natively."""
    for name, model, x, rules in _large(setting):
        tables = {"rule": rules, "save_memory": fg.tables.save_memory()}
        for compiled in (False,) if setting.quick else (False, True):
            wrap = torch.compile if compiled else _as_is
            steps = {"native": _step(wrap(model), x, setting)}
            for table, given in [*tables.items()][
                : 1 if compiled else None
            ]:  # compiling takes long
                steps[table] = _step(wrap(fg.transform(model, given)), x, setting)
            seconds, least = (0.1, 1) if setting.quick else (4.0, 10)
            found = compare(steps, seconds=seconds, least=least)
            ratios = [
                f"{n} × {found.ratio(n, 'native').median:.3f}" for n in steps if n != "native"
            ]
            if compiled:
                ratios.append(f"the target is {COMPILED_LIMIT}")
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
    names = [part.__name__.strip("_") for part in parts()]
    parser.add_argument("--only", nargs="+", choices=names, default=(), help="the parts to run")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    setting = Setting(device, options.quick or device.type == "cpu")
    name = torch.cuda.get_device_name(device) if setting.cuda else "a CPU"
    print(f"torch {torch.__version__} on {name}")
    failed = False
    for line in lines(setting, options.only):
        print(line, flush=True)
        failed = failed or line.passed is False
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())

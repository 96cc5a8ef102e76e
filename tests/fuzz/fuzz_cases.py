"""One case of the fuzzer: a program, a table and a way in, tried against the original and the oracle."""

from __future__ import annotations

import contextlib
import copy
import pickle
import random
import re
import traceback
import types
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

import freegrad_fx as fg
from fuzz_doors import (
    NAMES_A_DOOR,
    REFUSALS,
    WARNING,
    as_table,
    block,
    kept_whole,
    lost,
    open_door,
    register_own,
    skipped,
)
from fuzz_generator import Generator
from fuzz_oracle import Oracle
from fuzz_programs import Program, load, make, sample, unload
from fuzz_tables import Table, random_table

TOLERANCES = {torch.float64: 1e-9, torch.float32: 2e-4, torch.bfloat16: 6e-2}


@dataclass(frozen=True)
class Case:
    """What is tried.

    Attributes:
        program: The program.
        table: The table.
        door: The way in.
        steps: For each call, the mode, the seed of the inputs, and whether they require gradients.
        captured_in: The mode at the capture.
        flipped: A path whose mode is the other one.
        carried: ``"deepcopy"`` or ``"pickle"``: what the result goes through first.
        second: Whether second derivatives are compared.
    """

    program: Program
    table: Table
    door: str = "symbolic"
    steps: tuple[tuple[bool, int, bool], ...] = ((True, 1, True), (False, 2, True))
    captured_in: bool = True
    flipped: str | None = None
    carried: str = ""
    second: bool = False

    def __str__(self) -> str:
        entries = "\n".join(f"  {entry}" for entry in self.table.entries)
        how = ", ".join(
            f"{name}={getattr(self, name)!r}"
            for name in ("steps", "captured_in", "flipped", "carried", "second")
        )
        return (
            f"{self.program.source}\n# door: {self.door}; dtype: {self.program.dtype}; {how}\n"
            f"# inputs: x{''.join(f', {n} ({h})' for n, h in self.program.inputs)}, 3 by 4\n"
            f"# table:\n{entries}\n# block: {self.table.block}"
        )


@dataclass(frozen=True)
class Outcome:
    """What a case came to.

    Attributes:
        kind: ``"ok"``, ``"invalid"`` (the original fails), ``"refused"``, ``"said"`` (a loss that the product reports),
            or ``"failure"``.
        detail: The reason.
        acted: How many operations and parameters got rules.
    """

    kind: str
    detail: str = ""
    acted: int = 0


def random_case(seed: int, door: str) -> Case:
    r = random.Random(f"{seed} {door}")
    program = Generator(r.randrange(2**32), risky=0.04 if r.random() < 0.95 else 1.0).program()
    table = random_table(r.randrange(2**32), program)
    if door in ("compile", "backend"):
        table = replace(table, block=None)
        if not table.entries:
            return random_case(seed + 2**40, door)
    calls = tuple((r.random() < 0.6, r.randrange(5), r.random() < 0.9) for _ in range(3))
    eager = door in ("symbolic", "export", "use")
    paths = [
        line.split(" = ")[0][5:]
        for line in program.classes[-1].init
        if line.startswith("self.part")
    ]
    return Case(
        program,
        table,
        door,
        calls if eager else calls[:2],
        r.random() < 0.5,
        r.choice(["norm", *paths]) if door == "symbolic" and r.random() < 0.15 else None,
        r.choice(("deepcopy", "pickle")) if eager and door != "use" and r.random() < 0.15 else "",
        eager and not _reads_y(table) and program.dtype == "float64" and r.random() < 0.15,
    )


def _reads_y(table: Table) -> bool:
    """Whether a rule of a table reads the output of the operation."""
    rules = [*(e.rules or () for e in table.entries), *([table.block[0]] if table.block else [])]
    return any(name == "fuzz_xy" for bound in rules for name, _ in bound)


# --- a run ---


@dataclass
class Run:
    outputs: list[Any]
    gradients: dict[str, Tensor | None]
    second: dict[str, Tensor | None]
    state: dict[str, Any]
    random: Tensor
    error: str = ""


def _tensors(value: Any) -> Iterator[Any]:
    """The leaves of an output; numbers and None too."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from _tensors(item)
    elif isinstance(value, tuple | list):
        yield type(value).__name__
        for item in value:
            yield from _tensors(item)
    else:
        yield value


def _state(model: nn.Module) -> dict[str, Any]:
    """Buffers, and plain attributes of the modules."""
    found: dict[str, Any] = {}
    for path, module in model.named_modules():
        for name, value in {**module._buffers, **vars(module)}.items():
            if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
                found[f"{path}.{name}"] = value.detach().clone()
            elif name in ("steps", "seen", "flag") or (name == "kept" and value is None):
                found[f"{path}.{name}"] = copy.copy(value)
    return found


def _run(
    call: Any,
    model: nn.Module,
    args: Sequence[Tensor],
    kwargs: dict[str, Tensor],
    second: bool,
    oracle: Any = None,
) -> Run:
    torch.default_generator.manual_seed(11)
    run = Run([], {}, {}, {}, torch.empty(0))
    try:
        output = call(args, kwargs)
        run.random, run.state = torch.get_rng_state(), _state(model)
        run.outputs = [v.detach().clone() if isinstance(v, Tensor) else v for v in _tensors(output)]
        run.outputs += [
            t.detach().clone() for t in (*args, *kwargs.values())
        ]  # may be written into
        run.outputs += [v.requires_grad for v in _tensors(output) if isinstance(v, Tensor)]
        loss: Any = 0.0
        generator = torch.Generator().manual_seed(5)
        for value in _tensors(output):
            if isinstance(value, Tensor) and value.requires_grad:
                weights = torch.randn(value.shape, generator=generator, dtype=torch.float64).to(
                    value.dtype
                )
                loss = loss + (value * weights).sum()
        if not isinstance(loss, Tensor):
            return run
        leaves = {
            f"input {i}": t for i, t in enumerate((*args, *kwargs.values())) if t.requires_grad
        }
        named = dict(model.named_parameters())
        leaves |= {n.removeprefix("_orig_mod."): p for n, p in named.items() if p.requires_grad}
        grads = torch.autograd.grad(
            loss, [*leaves.values()], create_graph=second, allow_unused=True
        )
        run.gradients = dict(zip(leaves, grads, strict=True))
        if oracle is not None and not second:
            run.gradients = oracle.of_parameters(run.gradients)
        if second:
            seconds = [g for g in run.gradients.values() if g is not None and g.requires_grad]
            if seconds:
                total = sum(
                    (g.double() * torch.linspace(-1, 1, g.numel()).view_as(g)).sum()
                    for g in seconds
                )
                again = torch.autograd.grad(total, [*leaves.values()], allow_unused=True)
                run.second = dict(zip(leaves, again, strict=True))
    except Exception as error:
        if isinstance(error, REFUSALS):
            raise
        run.error = f"{type(error).__name__}: {error}"
        run.__dict__["where"] = traceback.format_exc()
    return run


# --- comparisons ---


def _differs(actual: Any, expected: Any, exact: bool, tolerance: float = 0.0) -> str:
    if isinstance(actual, Tensor) != isinstance(expected, Tensor):
        return f"{actual} instead of {expected}"
    if not isinstance(actual, Tensor):
        same = actual == expected
        return "" if same else f"{actual!r} instead of {expected!r}"
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        return f"{actual.dtype} {tuple(actual.shape)} instead of {expected.dtype} {tuple(expected.shape)}"
    same_bits = torch.equal(actual.nan_to_num(7.0), expected.nan_to_num(7.0))
    if same_bits and torch.equal(actual.isnan(), expected.isnan()):
        return ""
    if exact:
        return f"{actual.flatten()[:8].tolist()} instead of {expected.flatten()[:8].tolist()}"
    scale = max(1.0, float(expected.abs().nan_to_num(0.0).max()) if expected.numel() else 1.0)
    rounding = max(TOLERANCES.get(expected.dtype, 0.0), tolerance)
    close = torch.allclose(actual, expected, rtol=rounding, atol=rounding * scale, equal_nan=True)
    return (
        ""
        if close
        else f"{actual.flatten()[:8].tolist()} instead of {expected.flatten()[:8].tolist()}"
    )


def _difference(
    actual: Run, expected: Run, oracle: Run, native: bool, changed: bool, tolerance: float
) -> str:
    """What tells a result from the original (forward, state) and from the oracle (gradients)."""
    if actual.error:
        return f"raises {actual.error}"
    reference = oracle if changed else expected
    if len(actual.outputs) != len(reference.outputs):
        return "another structure of outputs"
    for index, (mine, own) in enumerate(zip(actual.outputs, reference.outputs, strict=True)):
        if found := _differs(mine, own, exact=not changed, tolerance=tolerance):
            return f"output {index}: {found}"
    for name, own in reference.state.items():
        if name in actual.state and (
            found := _differs(actual.state[name], own, exact=not changed, tolerance=tolerance)
        ):
            return f"state {name}: {found}"
    if not torch.equal(actual.random, reference.random):
        return "the random numbers drawn are others"
    wanted = expected if native else oracle
    for what in ("gradients", "second"):
        mine_all, own_all = getattr(actual, what), getattr(wanted, what)
        for name, own in own_all.items():
            mine = mine_all.get(name)
            if (mine is None) != (own is None):
                present = mine if own is None else own
                if (native and what == "gradients") or bool((present != 0).any()):
                    return f"{what} of {name}: {mine} instead of {own}"
            elif own is not None and (
                found := _differs(mine, own, exact=native, tolerance=tolerance)
            ):
                return f"{what} of {name}: {found}"
    return ""


def _set_mode(model: nn.Module, training: bool, flipped: str | None) -> None:
    model.train(training)
    if flipped:
        with contextlib.suppress(AttributeError):
            model.get_submodule(flipped).train(not training)


def check(case: Case) -> Outcome:
    """Try a case."""
    module = load(case.program)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            outcome = _check(case, module, caught)
        return outcome
    finally:
        unload(module)
        if case.door in ("compile", "backend"):
            torch._dynamo.reset()


def _check(case: Case, module: types.ModuleType, caught: list[Any]) -> Outcome:
    register_own()
    program, namespace = case.program, module.__dict__
    try:
        plain, watched, model = (make(program, module) for _ in range(3))
        _set_mode(model, case.captured_in, None)
        as_table(case.table, namespace)
        args, kwargs = sample(program, 0, False)
        torch.default_generator.manual_seed(0)
        copy.deepcopy(plain)(*args, **kwargs)
    except REFUSALS as error:
        return Outcome("invalid", f"table: {error}")
    except Exception as error:
        return Outcome("invalid", f"{type(error).__name__}: {error}"[:150])
    before = _fingerprint(model)
    random_state = torch.get_rng_state()
    try:
        result = open_door(case.door, model, case.table, namespace, args, kwargs)
    except REFUSALS as error:
        return _refused(error)
    except Exception:
        return Outcome("failure", "the door raises\n" + traceback.format_exc())
    # torch.compile sets what it needs on the model itself
    if case.door not in ("compile", "backend") and _fingerprint(model) != before:
        return Outcome("failure", "the original was changed")
    if not torch.equal(random_state, torch.get_rng_state()):
        return Outcome("failure", "the capture drew random numbers")
    if case.carried == "deepcopy":
        result = copy.deepcopy(result)
    elif case.carried == "pickle":
        try:
            result = pickle.loads(pickle.dumps(result))
        except Exception as error:
            if not _pickles(plain):
                return Outcome("invalid", "the original does not pickle")
            return Outcome("failure", f"does not pickle: {error}")
    without = skipped(result, case.door)
    names = [name for name, _ in plain.named_parameters()]
    found = lost(result, case.door) + [
        f"{n}: {why}" for n, why in without.items() if n not in names
    ]
    if found:
        return Outcome("said", found[0])
    oracle = Oracle(watched, case.table, namespace, kept_whole(result, case.door))
    softmax = any("softmax" in e.op for e in case.table.entries)
    if case.door == "export" and softmax and "F.gumbel_softmax" in program.source:
        return Outcome("said", "torch.export opens gumbel_softmax: its softmax is a site")
    gradient_inside = not case.table.is_native and "autograd.grad(" in program.source
    if gradient_inside and _reads_y(case.table):
        return Outcome("said", "a rule that reads the output is differentiated twice")
    # A forward that is replaced changes the outputs, and so does a rule where the forward computes a gradient
    changed = gradient_inside or any(e.forward for e in case.table.entries)
    tolerance = TOLERANCES[torch.float32] if ".float()" in str(program.classes) else 0.0
    acted = 0
    for number, (training, seed, grad) in enumerate(case.steps):
        for each in (plain, watched, result):
            _set_mode(each, training, case.flipped)
        inputs = [sample(program, seed, grad) for _ in range(3)]
        # A graph has the code of a checkpoint in it, which then runs once: batch norms are not updated again in the
        # backward. torch.compile keeps checkpoints.
        eager = case.door in ("symbolic", "export")
        with oracle.no_checkpoints() if eager else contextlib.nullcontext():
            expected = _run(lambda a, k: plain(*a, **k), plain, *inputs[0], case.second)
        reference = _run(
            lambda a, k: oracle(a, k, case.second), watched, *inputs[1], case.second, oracle
        )
        with block(case.table, case.door, result, namespace) as used:
            try:
                actual = _run(lambda a, k: result(*a, **k), result, *inputs[2], case.second)
            except REFUSALS as error:
                return _refused(error)
        if used is not None:
            without = {d.site.name: str(d.reason) for d in fg.report(used).with_action("skip")}
        # Of a graph the report says what is lost, as data; behind torch.compile, warnings do
        said = [str(w.message) for w in caught if isinstance(w.message, WARNING) and not eager]
        if said := [text for text in said if "the entry" not in text]:
            return Outcome("said", said[0])
        if reference.error and not expected.error:
            return Outcome("invalid", f"oracle: {reference.error}"[:200])
        if expected.error and (actual.error or reference.error or case.table.is_native):
            if case.table.is_native and not actual.error:
                return Outcome(
                    "failure", f"call {number}: natively {expected.error}; no error here"
                )
            return Outcome("ok" if number else "invalid", expected.error[:150], acted)
        if unruled := [n for n in without if reference.gradients.get(n) is not None]:
            return Outcome("said", f"{unruled[0]}: {without[unruled[0]]}")
        acted += oracle.acted + sum(
            e is not None and e.rules is not None for e in oracle.of_parameter.values()
        )
        if "modified by an inplace operation" in actual.error and (
            used is not None or _reads_y(case.table)
        ):
            return Outcome(
                "said", "PyTorch: an output that a rule reads is written into later", acted
            )
        if found := _difference(
            actual, expected, reference, case.table.is_native, changed, tolerance
        ):
            if actual.error:
                found += "\n" + actual.__dict__["where"]
            return Outcome("failure", f"call {number}: {found}", acted)
    return Outcome("ok", acted=acted)


def _pickles(model: nn.Module) -> bool:
    try:
        pickle.loads(pickle.dumps(model))
    except Exception:
        return False
    return True


def _refused(error: Exception) -> Outcome:
    text = str(error)
    if not any(name in text for name in NAMES_A_DOOR):
        return Outcome("failure", f"a refusal that names no way in: {type(error).__name__}: {text}")
    return Outcome("refused", f"{type(error).__name__}: {text}")


def _fingerprint(model: nn.Module) -> list[Any]:
    found: list[Any] = []
    for path, module in model.named_modules(remove_duplicate=False):
        for name, value in vars(module).items():
            items = value.items() if isinstance(value, dict) else [("", value)]
            found += [
                (
                    path,
                    name,
                    key,
                    id(item),
                    item.tolist() if isinstance(item, Tensor) else repr(item)[:40],
                )
                for key, item in items
            ]
    return found


def kind_of(outcome: Outcome) -> str:
    """The outcome without what differs from case to case, for counting."""
    text = (
        outcome.detail.strip().split("\n")[0] if outcome.kind != "failure" else outcome.detail[:100]
    )
    text = re.sub(
        r"fuzz_case_\d+|'[^']*'|\d[\d.e+-]*|\b(part|act|box|listed|again)[\w.]*", "_", text
    )
    return f"{outcome.kind}: {text[:110]}"

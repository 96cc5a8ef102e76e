"""Random rule tables, as data that the oracle and the product each read in their own way.

Nothing here knows the product: `fuzz_doors` writes a table as the product's, `fuzz_oracle` matches it by itself.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from fuzz_programs import Program

Bound = tuple[str, tuple[tuple[str, float], ...]]
"""A rule's name and its parameters."""


@dataclass(frozen=True)
class Entry:
    """One entry: what it selects, and the rules whose composition it gives; None is the native backward."""

    rules: tuple[Bound, ...] | None
    op: tuple[str, ...] = ()
    module: str | None = None
    type: str | None = None
    parameter: str | None = None
    call: int | tuple[int | None, int | None] | None = None
    forward: str | None = None
    save: str | None = None


@dataclass(frozen=True)
class Table:
    """The entries, and a block around each call: its rule and scope, for models with ambient sites."""

    entries: tuple[Entry, ...]
    block: tuple[tuple[Bound, ...], str] | None = None

    @property
    def size(self) -> int:
        fields = sum(sum(v is not None and v != () for v in vars(e).values()) for e in self.entries)
        return fields + 5 * (self.block is not None)

    @property
    def is_native(self) -> bool:
        return self.block is None and all(e.rules is None and not e.forward for e in self.entries)


# Numbers that bfloat16 has, so that a bound is the same bound in every dtype.
ANYWHERE: tuple[Bound, ...] = (
    ("scale", (("s", 0.5),)), ("scale", (("s", -2.0),)), ("reverse", (("alpha", 0.75),)), ("straight_through", ()),
    ("d(Linear)", ()), ("d(ReLU)", ()), ("rectangular", (("a", -0.75), ("b", 0.5))), ("triangular", (("width", 1.5),)),
    ("clip_value", (("max_value", 0.25),)), ("clip_norm", (("max_norm", 0.5), ("eps", 1e-12))),
    ("clipped_straight_through", (("bound", 0.5),)), ("fast_sigmoid", (("slope", 2.0),)), ("arctan", (("alpha", 2.0),)),
    ("guided", ()), ("noise", (("sigma", 0.0),)), ("centralize", (("dim", -1),)), ("fuzz_x", (("k", 0.5),)),
)  # fmt: skip
WITH_OUTPUT: tuple[Bound, ...] = (("fuzz_xy", (("k", 0.25),)),)
SMOOTH = frozenset(
    {"scale", "reverse", "straight_through", "d(Linear)", "arctan", "fuzz_x", "noise", "centralize"}
)
MASKED = frozenset({"d(ReLU)", "rectangular", "clipped_straight_through", "guided"})
OPS = ("relu", "relu", "gelu", "tanh", "sigmoid", "silu", "leaky_relu", "elu", "softmax", "prelu", "hardtanh",
       "clamp", "abs", "sign", "round", "celu", "mish", "softplus", "relu6", "log_softmax")  # fmt: skip
GROUPS = ("activations", "activations", "softmax", "quantizers")
MODULES = (
    "",
    "*",
    "part0*",
    "part*",
    "*act*",
    "act0",
    "act1",
    "*.act0",
    "box*",
    "*.1",
    "listed.*",
    "again*",
)
PARAMETERS = (
    "*",
    "*.weight",
    "fc.*",
    "*.bias",
    "part0.*",
    "fc2.weight",
    "slope",
    "scale",
    "part*.fc.weight",
)
FORWARDS = ("tanh", "relu", "heaviside", "sign", "sigmoid")


def random_table(seed: int, program: Program) -> Table:
    """A table for a program: of wide entries, narrow ones, and some that match nothing."""
    r = random.Random(seed)
    kind = r.random()
    if kind < 0.06:
        return Table((Entry(None, op=("all",)),))
    blocks = [c.name for c in program.classes[:-1]]
    entries = tuple(_entry(r, blocks) for _ in range(r.choice((1, 2, 2, 3, 4))))
    if r.random() < 0.4:
        entries += (Entry(_rules(r, "activation"), op=("activations",)),)
    if kind < 0.2:
        scope = r.choice(("activations", "activations", "params", "all"))
        kept = entries if r.random() < 0.3 else ()
        return Table(kept, (_rules(r, scope), scope))
    return Table(entries)


def _rules(r: random.Random, where: str) -> tuple[Bound, ...]:
    rules = tuple(r.choice(ANYWHERE) for _ in range(r.choice((1, 1, 1, 1, 2, 3))))
    if where == "activation" and r.random() < 0.15:
        return (
            *WITH_OUTPUT,
            *rules[1:],
        )  # what reads the output has to be the first of a composition
    return rules


def _entry(r: random.Random, blocks: Sequence[str]) -> Entry:
    kind = r.random()
    if kind < 0.22:  # parameters
        rules = None if r.random() < 0.2 else _rules(r, "params")
        how = r.random()
        if how < 0.6:
            forward = r.choice(FORWARDS) if rules and r.random() < 0.15 else None
            return Entry(rules, parameter=r.choice(PARAMETERS), forward=forward)
        if how < 0.8:
            return Entry(rules, op=("params",), module=r.choice(MODULES))
        return Entry(
            rules, op=("params",), type=r.choice(("nn.Linear", "nn.PReLU", "nn.LayerNorm", *blocks))
        )
    if kind < 0.3:
        return Entry(_rules(r, "all"), op=("all",), module=r.choice(MODULES))
    rules = None if r.random() < 0.15 else _rules(r, "activation")
    if kind < 0.4:
        return Entry(rules, type=r.choice(("nn.ReLU", "nn.GELU", "nn.Tanh", "nn.Linear", *blocks, *blocks)),
                     module=r.choice(MODULES) if r.random() < 0.3 else None)  # fmt: skip
    entry = Entry(
        rules,
        op=(r.choice(GROUPS),) if r.random() < 0.35 else tuple({r.choice(OPS) for _ in range(r.choice((1, 1, 2)))}),
        module=r.choice(MODULES) if r.random() < 0.5 else None,
        call=r.choice((0, 1, (1, None), (None, 1))) if r.random() < 0.2 else None,
    )  # fmt: skip
    if rules and r.random() < 0.12:
        return replace(entry, op=("relu",), forward=r.choice(FORWARDS))
    if rules and len(rules) == 1 and rules[0][0] in MASKED and r.random() < 0.5:
        return replace(entry, save=r.choice(("mask", "bits")))
    return entry


def smaller(table: Table) -> Iterator[Table]:
    """Tables with one thing less each."""
    if table.block is not None:
        yield replace(table, block=None)
        rules, scope = table.block
        for index in range(len(rules)) if len(rules) > 1 else ():
            yield replace(table, block=(rules[:index] + rules[index + 1 :], scope))
    for index, entry in enumerate(table.entries):
        if len(table.entries) > 1 or table.block is not None:
            yield replace(table, entries=table.entries[:index] + table.entries[index + 1 :])

        def put(instead: Entry, at: int = index) -> Table:
            return replace(table, entries=(*table.entries[:at], instead, *table.entries[at + 1 :]))

        for name in ("module", "call", "forward", "save"):
            if getattr(entry, name) is not None:
                yield put(replace(entry, **{name: None}))
        if len(entry.op) > 1:
            yield from (put(replace(entry, op=(op,))) for op in entry.op)
        if entry.rules and len(entry.rules) > 1:
            for at in range(len(entry.rules)):
                yield put(replace(entry, rules=entry.rules[:at] + entry.rules[at + 1 :]))
        if entry.rules and entry.rules != (("scale", (("s", 0.5),)),):
            yield put(replace(entry, rules=(("scale", (("s", 0.5),)),), save=None))

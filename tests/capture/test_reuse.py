"""Reuse, names and provenance: sites can be told apart, are named after the model, and say where they come from.

Cases 2 and 3.
"""

from __future__ import annotations

import copy
import inspect
import json
import os
import pickle
import subprocess
import sys
from collections import OrderedDict
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

import freegrad_fx as fg
from freegrad_fx.graph.provenance import origin
from places import IMPORTABLE
from side_by_side import (
    RULE,
    Net,
    build,
    captured_or_refused,
    check_capture,
    difference,
    sample,
    traced_plainly,
    what_plain_tracing_gets_wrong,
)
from sweep import NATIVE


def sites(model: nn.Module, rules: Any = RULE) -> list[str]:
    return [decision.site.name for decision in fg.explain(model, rules).decisions]


# --- one module, many calls ---


class ThreeCalls(Net):
    """Case 2."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.f(x))
        x = self.act(self.g(x)) + x
        return self.act(self.f(x) - 0.1)


class Recurrent(Net):
    def forward(self, x: Tensor) -> Tensor:
        h = torch.zeros_like(x)
        for _ in range(4):
            h = self.act(self.f(x) + self.g(h))
        return h


class Block(Net):
    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.f(x))
        x = F.relu(self.g(x))
        return F.relu(x - 0.1)


class BlocksTwice(Net):
    """Calls of functions in a module that is itself called twice; a block listed twice."""

    def make(self) -> None:
        self.block = Block()
        shared = nn.Sequential(nn.Linear(6, 6), nn.ReLU())
        self.blocks = nn.ModuleList([shared, shared, nn.Sequential(nn.Linear(6, 6), nn.ReLU())])

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(self.block(x))
        for block in self.blocks:
            x = block(x)
        return x


class Tied(Net):
    """One activation under three names, in a list and in a plain list."""

    def make(self) -> None:
        self.same, self.layers, self.plain = self.act, nn.ModuleList([self.act]), [self.act]
        self.tied = nn.Linear(6, 6)
        self.tied.weight = self.f.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.f(x)) - 0.1
        x = self.same(self.tied(x)) - 0.1
        x = self.layers[0](x) - 0.1
        return self.plain[0](self.g(x))


class Recursive(nn.Module):
    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        self.f, self.act = nn.Linear(6, 6), nn.ReLU()
        self.inner = Recursive(depth - 1) if depth else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.f(x))
        return x if self.inner is None else self.inner(x)


class Nested(Net):
    def make(self) -> None:
        self.by_name = nn.ModuleDict(
            {"a": nn.ModuleList([nn.Sequential(OrderedDict(inner=nn.ReLU()))]), "b": nn.ReLU()}
        )

    def forward(self, x: Tensor) -> Tensor:
        for module in self.by_name.values():
            x = module[0](self.f(x)) if isinstance(module, nn.ModuleList) else module(self.g(x))
        return x


EXPECTED = {
    ThreeCalls: ["act:relu[0]", "act:relu[1]", "act:relu[2]"],
    Recurrent: ["act:relu[0]", "act:relu[1]", "act:relu[2]", "act:relu[3]"],
    BlocksTwice: [
        "block.act:relu[0]",
        "block:relu[0]",
        "block:relu[1]",
        "block.act:relu[1]",
        "block:relu[2]",
        "block:relu[3]",
        "blocks.0.1:relu[0]",
        "blocks.0.1:relu[1]",
        "blocks.2.1:relu[0]",
    ],
    Tied: ["act:relu[0]", "act:relu[1]", "act:relu[2]", "act:relu[3]"],
    Recursive: [
        "act:relu[0]",
        "inner.act:relu[0]",
        "inner.inner.act:relu[0]",
        "inner.inner.inner.act:relu[0]",
    ],
    Nested: ["by_name.a.0.inner:relu[0]", "by_name.b:relu[0]"],
}
KINDS = pytest.mark.parametrize("kind", EXPECTED, ids=lambda kind: kind.__name__)


@pytest.mark.sampled(3)
@KINDS
def test_every_call_is_a_site_of_its_own_and_has_its_gradient(kind: type[nn.Module]) -> None:
    gm = check_capture(kind)
    assert [d.site.name for d in fg.report(gm).decisions] == EXPECTED[kind]
    assert sites(build(kind)) == EXPECTED[kind]


@KINDS
def test_sites_keep_their_names_in_copies_and_in_the_graph(kind: type[nn.Module]) -> None:
    gm = fg.transform(build(kind), RULE)
    for copied in (gm, copy.deepcopy(gm), pickle.loads(pickle.dumps(gm))):
        nodes = [node for node in copied.graph.nodes if node.target is fg.ops.decoupled]
        assert [node.kwargs["site"] for node in nodes] == EXPECTED[kind]


def test_tied_modules_stay_tied() -> None:
    model = build(Tied)
    gm = fg.transform(model, RULE)
    for copied in (gm, copy.deepcopy(gm), pickle.loads(pickle.dumps(gm))):
        assert copied.act is copied.same is copied.layers[0]
        assert copied.f.weight is copied.tied.weight
    assert gm.act is gm.plain[0]
    assert gm.act is not model.act


def test_plain_traces_and_exchanged_modules_cannot_tell_calls_apart() -> None:
    """A module exchanged is exchanged for each of its calls; and a plain trace shares the modules of the original."""
    model = build(ThreeCalls)
    gm = traced_plainly(model, exchange=False)
    assert [node.target for node in gm.graph.nodes if node.target == "act"] == ["act"] * 3
    assert gm.act is model.act


# --- modules that are no submodules ---


class MakesAReLU(Net):
    """Case 3."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.ReLU()(self.f(x))


class MakesASequential(Net):
    def forward(self, x: Tensor) -> Tensor:
        return nn.Sequential(nn.ReLU(), nn.Dropout(0.2), nn.ReLU(inplace=True))(self.f(x))


class HoldsModulesInAList(Net):
    """Not registered."""

    def make(self) -> None:
        self.held = [nn.ReLU(), nn.Tanh()]

    def forward(self, x: Tensor) -> Tensor:
        return self.held[1](self.held[0](self.f(x)))


class HoldsALayerInAList(Net):
    """As a decoder that must not be in the state_dict is held."""

    def make(self) -> None:
        self.held = [nn.Linear(6, 6)]

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.held[0](self.f(x)))


class MakesAnActivationInAPart(Net):
    def make(self) -> None:
        self.part = MakesAReLU()

    def forward(self, x: Tensor) -> Tensor:
        return nn.ReLU(inplace=True)(self.part(x) - 0.1)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (MakesAReLU, ["<root>:relu[0]"]),
        (MakesASequential, ["<root>:relu[0]", "<root>:relu[1]"]),
        (HoldsModulesInAList, ["<root>:relu[0]"]),
        (MakesAnActivationInAPart, ["part:relu[0]", "<root>:relu[0]"]),
    ],
)
def test_modules_made_in_a_forward_are_sites_of_their_caller(
    kind: type[nn.Module], expected: list[str]
) -> None:
    modes = (False,) if kind is MakesASequential else (True, False)
    gm = check_capture(kind, modes=modes)
    relus = [d.site.name for d in fg.report(gm).decisions if d.site.op == "relu"]
    assert relus == expected


def test_a_dropout_made_in_a_forward_drops_in_every_mode() -> None:
    """A module that is made anew is in training, whatever the model is in."""
    original, gm = build(MakesASequential), fg.transform(build(MakesASequential), NATIVE)
    for training in (True, False):
        assert difference(original.train(training), gm.train(training)) == ""


def test_a_layer_that_is_not_registered_is_kept_or_refused_in_words() -> None:
    gm, refusal = captured_or_refused(build(HoldsALayerInAList))
    if gm is None:
        assert "not registered" in refusal
        return
    assert difference(build(HoldsALayerInAList), gm) == ""


@pytest.mark.parametrize("kind", [MakesAReLU, HoldsModulesInAList, MakesAnActivationInAPart])
def test_a_plain_trace_refuses_modules_that_are_no_submodules(kind: type[nn.Module]) -> None:
    assert what_plain_tracing_gets_wrong(kind).startswith("refuses")


# --- names ---

NAMES = [
    "a-b", "1", "x y", "class", "in", "None", "self", "x", "é", "relu", "torch", "print", "_x", "f_1",
    "stop_gradient", "training2",
]  # fmt: skip
GRAPH_MODULE_S = ["graph", "code", "meta", "variants", "itself", "recompile", "print_readable"]


class WithCounter(Net):
    def make(self) -> None:
        self.w = nn.Parameter(torch.randn(6))
        self.register_buffer("n", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.n = self.n + 1
        return F.dropout(F.relu(self.f(x) * self.w + self.n), 0.5, self.training)


class Named(Net):
    """Everything that has a name has the same one."""

    name = ""

    def make(self) -> None:
        name = self.name
        self.modules_ = nn.ModuleDict({name: nn.ReLU()}) if name not in dir(nn.ModuleDict) else None
        self.parts = nn.Module()
        self.parts.add_module(name, WithCounter())
        self.tensors, self.buffers_ = nn.Module(), nn.Module()
        self.tensors.register_parameter(name, nn.Parameter(torch.randn(6)))
        self.buffers_.register_buffer(name, torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.modules_ is None else self.modules_[self.name](x)
        x = getattr(self.parts, self.name)(x - 0.1)
        x = x * getattr(self.tensors, self.name) + getattr(self.buffers_, self.name)
        return F.relu(self.f(x))


@pytest.mark.sampled(4)
@pytest.mark.parametrize("name", NAMES)
def test_odd_names(name: str) -> None:
    gm = check_capture(type("Named", (Named,), {"name": name}))
    expected = [f"modules_.{name}:relu[0]", f"parts.{name}:relu[0]", "<root>:relu[0]"]
    assert [d.site.name for d in fg.report(gm).decisions] == expected
    assert f"parts.{name}.n" in gm.state_dict()


class NamedAtTheRoot(Net):
    name = ""

    def make(self) -> None:
        self.add_module(self.name, nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return getattr(self, self.name)(self.f(x))


@pytest.mark.sampled(4)
@pytest.mark.parametrize("name", [*NAMES, *GRAPH_MODULE_S])
def test_odd_names_at_the_root_are_taken_or_refused(name: str) -> None:
    make = type("NamedAtTheRoot", (NamedAtTheRoot,), {"name": name})
    gm, refusal = captured_or_refused(build(make))
    if gm is None:
        assert name in GRAPH_MODULE_S
        assert name in refusal
        assert "Rename" in refusal
        return
    check_capture(make)


class InSequential(nn.Sequential):
    pass


@pytest.mark.parametrize("name", GRAPH_MODULE_S)
def test_the_remedy_for_a_refused_name_works(name: str) -> None:
    make = type("NamedAtTheRoot", (NamedAtTheRoot,), {"name": name})
    check_capture(lambda: nn.Sequential(make()))


def test_a_plain_trace_is_wrong_about_keywords_as_names() -> None:
    make = type("Named", (Named,), {"name": "in"})
    assert what_plain_tracing_gets_wrong(make).startswith("refuses: SyntaxError")


# --- where a site comes from ---


class Spelled(Net):
    def make(self) -> None:
        self.part = Block()

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.f(x))
        x = helper(x)
        x = self.part(x)
        x += 1
        x = x.relu()
        return nn.functional.gelu(x)


def helper(x: Tensor) -> Tensor:
    return torch.relu(x - 0.1)


def line_of(owner: Any, text: str) -> str:
    lines, first = inspect.getsourcelines(owner)
    return f"{__file__}:{first + next(i for i, line in enumerate(lines) if text in line)}"


def test_every_site_knows_the_line_that_calls_it() -> None:
    decisions = fg.explain(build(Spelled), RULE).decisions
    assert [(d.site.path, d.site.source) for d in decisions] == [
        ("act", line_of(Spelled, "self.act(")),
        ("", line_of(helper, "torch.relu(")),
        ("part.act", line_of(Block, "self.act(")),
        ("part", line_of(Block, "F.relu(self.g")),
        ("part", line_of(Block, "F.relu(x - 0.1)")),
        ("", line_of(Spelled, "x.relu()")),
        ("", line_of(Spelled, "gelu(x)")),
    ]


def test_every_node_knows_its_owner_and_line_and_so_do_its_copies() -> None:
    gm = fg.transform(build(Spelled), RULE)
    seen = []
    for copied in (gm, copy.deepcopy(gm), pickle.loads(pickle.dumps(gm))):
        nodes = [n for n in copied.graph.nodes if n.op not in ("placeholder", "output", "get_attr")]
        assert all(origin(node).source.startswith(__file__) for node in nodes)
        seen.append([(node.name, origin(node)) for node in nodes])
    assert seen[0] == seen[1] == seen[2]
    owners = {origin(node).owner for node in gm.graph.nodes if node.name.startswith("relu")}
    assert owners == {"", "part"}


def test_inserted_nodes_have_the_meta_of_the_operation_they_surround() -> None:
    gm = fg.transform(build(Spelled), RULE)
    for node in gm.graph.nodes:
        if node.target is fg.ops.decoupled:
            operation = node.args[0]
            stop = next(a for a in operation.all_input_nodes if a.target is fg.ops.stop_gradient)
            for inserted in (stop, node):
                assert origin(inserted) == origin(operation)
                for key in ("nn_module_stack", "stack_trace"):
                    assert inserted.meta.get(key) == operation.meta.get(key)


def test_the_owner_path_is_torch_s_own_module_stack() -> None:
    """`nn_module_stack` is what other passes read; it is absent on operations of the root."""
    gm = fg.transform(build(Spelled), NATIVE)
    for node in gm.graph.nodes:
        stack = node.meta.get("nn_module_stack")
        if node.op == "call_function":
            owner = list(stack.values())[-1][0] if stack else ""
            assert origin(node).owner == owner


# --- stable names ---

SCRIPT = """
import json, sys
sys.path[:0] = json.loads(sys.argv[1])
from tests.capture import test_reuse
print(json.dumps(test_reuse.names_of_everything()))
"""


def names_of_everything() -> dict[str, Any]:
    found = {}
    for kind in (*EXPECTED, Spelled, MakesAnActivationInAPart, WithCounter):
        gm = fg.transform(build(kind), RULE)
        found[kind.__name__] = [
            [[node.name for node in variant.graph.nodes] for variant in gm.variants],
            [str(node.target) for node in gm.graph.nodes if node.op != "call_function"],
            sites(build(kind)),
            list(gm.state_dict()),
        ]
    return found


@pytest.mark.slow
def test_names_are_the_same_in_every_process() -> None:
    paths = json.dumps(IMPORTABLE)
    seed = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"
    process = subprocess.run(
        [sys.executable, "-c", SCRIPT, paths],
        env={**os.environ, "PYTHONHASHSEED": seed},
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr[-2000:]
    assert json.loads(process.stdout.splitlines()[-1]) == names_of_everything()


def test_names_are_the_same_in_every_capture_of_a_process() -> None:
    model = build(BlocksTwice)
    names = [[node.name for node in fg.transform(model, RULE).graph.nodes] for _ in range(3)]
    assert names[0] == names[1] == names[2]


def test_a_capture_of_a_capture_has_the_same_sites() -> None:
    for kind, expected in EXPECTED.items():
        assert sites(fg.transform(build(kind), NATIVE)) == expected


def test_the_graph_computes_what_other_tracers_see() -> None:
    """The ATen graph of the transformed model, natively, is that of the original."""
    model = build(ThreeCalls)
    gm = fg.transform(model, NATIVE)

    def aten(m: nn.Module) -> list[str]:
        return [str(node.target) for node in make_fx(m)(sample()).graph.nodes]

    assert aten(gm) == aten(model)

"""`CapturedModule`: which of its graphs runs, its class, and its copies, with graphs made by hand."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import freegrad_fx as fg
from freegrad_fx.capture.captured import CapturedModule, Variant, sets_grad_mode


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer1, self.layer10 = nn.Linear(2, 2), nn.Linear(2, 2)
        self.unused = nn.Parameter(torch.ones(1))
        self.register_buffer("passing", torch.zeros(1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return x

    def only_here(self) -> str:
        return "a method of the model"


def calls(function: Any) -> fx.Graph:
    graph = fx.Graph()
    graph.output(graph.call_function(function, (graph.placeholder("x"),)))
    return graph


def captured(*variants: Variant, root: nn.Module | None = None) -> CapturedModule:
    return CapturedModule.build(root or Model(), variants, "Name")


X = torch.tensor([4.0])


def of(flags: dict[str, bool], function: Any) -> Variant:
    return Variant(flags, calls(function))


# --- variants ---


@pytest.mark.parametrize(
    ("flags", "label"),
    [
        ({}, ""),
        ({"": True}, "train"),
        ({"a": False}, "eval"),
        ({"a": True, "b.c": True}, "train"),
        ({"a": False, "b": False}, "eval"),
        ({"": True, "a.b": False}, "root=train, a.b=eval"),
    ],
)
def test_the_label_of_a_variant_is_its_mode_or_its_flags(
    flags: dict[str, bool], label: str
) -> None:
    assert Variant(flags, fx.Graph()).label == label


def test_a_single_graph_runs_in_every_mode() -> None:
    module = captured(of({}, torch.sqrt))
    assert module(X).item() == module.eval()(X).item() == 2.0


def test_a_call_runs_the_graph_of_the_flags() -> None:
    module = captured(of({"": True}, torch.sqrt), of({"": False}, torch.neg))
    assert [module.train(on)(X).item() for on in (True, False, True)] == [2.0, -4.0, 2.0]
    for on, graph in zip((True, False), module.variants, strict=True):
        assert module.train(on).graph is graph.graph
        assert ("torch.sqrt" in module.code) == on


def test_the_flags_are_those_of_the_modules_at_the_paths() -> None:
    module = captured(
        of({"layer1": True, "layer10": True}, torch.sqrt),
        of({"layer1": False, "layer10": True}, torch.neg),
        of({"layer1": False, "layer10": False}, torch.square),
    )
    assert module(X).item() == 2.0
    module.layer1.eval()
    assert module(X).item() == -4.0
    module.layer10.eval()
    assert module(X).item() == 16.0
    module.layer1.train()
    with pytest.raises(
        fg.CaptureError, match=r"layer1=eval, layer10=train; eval\. It is called with"
    ):
        module(X)


def test_a_new_graph_replaces_the_one_that_would_run() -> None:
    module = captured(of({"": True}, torch.sqrt), of({"": False}, torch.neg))
    before = type(module)
    module.eval().graph = calls(torch.square)
    assert (module(X).item(), module.train()(X).item()) == (16.0, 2.0)
    assert [variant.flags for variant in module.variants] == [{"": True}, {"": False}]
    assert type(module) is not before  # compiled code trusts a class to stay as it is


def test_a_graph_that_sets_the_grad_mode_restores_it_where_it_raises() -> None:
    def fail(x: Tensor) -> Tensor:
        raise RuntimeError("in the graph")

    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.call_function(torch._C._set_grad_enabled, (False,))
    graph.output(graph.call_function(fail, (x,)))
    assert sets_grad_mode(graph)
    assert not sets_grad_mode(calls(torch.sqrt))
    with pytest.raises(RuntimeError, match="in the graph"):
        captured(Variant({}, graph))(X)
    assert torch.is_grad_enabled()


# --- the class and the state ---


def test_the_class_has_the_name_and_the_methods_of_the_model() -> None:
    module = captured(of({}, torch.sqrt))
    assert type(module).__name__ == "Name"
    assert isinstance(module, Model)
    assert module.only_here() == "a method of the model"
    assert module.itself is module


@pytest.mark.parametrize("again", ["captured", "traced"])
def test_the_class_of_another_graph_module_is_not_inherited_from(again: str) -> None:
    root = captured(of({}, torch.sqrt)) if again == "captured" else fx.symbolic_trace(Model())
    module = captured(of({}, torch.neg), root=root)
    assert not isinstance(module, type(root))
    assert isinstance(module, Model) == (again == "captured")
    assert module(X).item() == -4.0


def test_the_state_is_that_of_the_model() -> None:
    root = Model()
    module = captured(of({}, torch.sqrt), root=root)
    assert dict(module.named_parameters()).keys() == dict(root.named_parameters()).keys()
    assert all(a is b for a, b in zip(module.parameters(), root.parameters(), strict=True))
    assert list(module.state_dict()) == list(root.state_dict())
    assert "passing" not in module.state_dict()


@pytest.mark.parametrize("name", ["code", "graph", "meta", "recompile", "_variants"])
def test_a_member_with_a_name_that_graph_modules_reserve_is_refused(name: str) -> None:
    root = Model()
    root.register_buffer(name, torch.zeros(1))
    with pytest.raises(
        fg.CaptureError, match=rf"Model has members named {name}, which are reserved"
    ):
        captured(of({}, torch.sqrt), root=root)


# --- copies ---


@pytest.mark.parametrize(
    ("copied", "shares"),
    [
        (copy.copy, True),
        (copy.deepcopy, False),
        (lambda module: pickle.loads(pickle.dumps(module)), False),
    ],
    ids=["copy", "deepcopy", "pickle"],
)
def test_a_copy_has_graphs_of_its_own_and_runs_the_same(copied: Any, shares: bool) -> None:
    module = captured(of({"": True}, torch.sqrt), of({"": False}, torch.neg))
    other = copied(module)
    assert type(other).__name__ == "Name"
    assert other.only_here() == "a method of the model"
    assert [other.train(on)(X).item() for on in (True, False)] == [2.0, -4.0]
    assert (other.unused is module.unused) == shares
    assert [v.flags for v in other.variants] == [v.flags for v in module.variants]
    assert all(a.graph is not b.graph for a, b in zip(other.variants, module.variants, strict=True))
    other.eval().graph = calls(torch.square)
    assert module.eval()(X).item() == -4.0


def test_scripting_is_refused_with_the_remedy() -> None:
    with pytest.raises(RuntimeError, match="Script the original model"):
        captured(of({}, torch.sqrt)).__prepare_scriptable__()


class Hooked(nn.Module):
    """Keeps the handle of a hook of a part."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(2, 2)
        self.handle = self.fc.register_forward_pre_hook(double)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.fc(x))


def double(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
    return (args[0] * 2,)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_the_handle_of_a_hook_removes_that_of_the_same_copy(copied: Any) -> None:
    model, x = Hooked(), torch.randn(3, 2)
    gm = fg.transform(model, {"relu": "reverse"})
    again = copied(gm)
    again.handle.remove()
    assert torch.equal(again(x / 2), gm(x / 4))
    assert torch.equal(gm(x), model(x))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.fc(x))


class Tripled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 3


def test_a_part_that_is_exchanged_for_another_class_runs_or_is_refused() -> None:
    """As LoRA and quantization exchange layers. A graph would use the parameters of the new part, and skip its code."""
    x = torch.randn(3, 2)
    model, plain = nn.Sequential(Block()), nn.Sequential(Block())
    gm = fg.transform(model, {"relu": "reverse"})
    exported = fg.transform(model, {"relu": "reverse"}, example_inputs=(x,))
    for one in (plain, gm, exported):
        one[0].fc = Tripled(2, 2)
        one[0].fc.load_state_dict(model[0].fc.state_dict())
    plain.load_state_dict(model.state_dict())
    assert torch.equal(gm(x), plain(x))
    with pytest.raises(fg.CaptureError, match=r"0\.fc .*was a torch.nn.*Linear.*for a .*Tripled"):
        exported(x)
    exported[0].fc = nn.Linear(2, 2)  # of the class that the graph knows
    assert exported(x).shape == x.shape
    gm[0] = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(fg.CaptureError, match=r"0 of this transformed model was a .*Block"):
        gm(x)

"""What is done to a model after it was transformed: copies, files, traces, compilers, functorch, dtypes, devices.

Each keeps the rule. What "kept" means is decided by a model written by hand, never by the transformed one.
"""

from __future__ import annotations

import copy
import io
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

import freegrad_fx as fg
import models
import runs
from models import Branching, BranchingByHand, Smooth, SmoothByHand, naive
from places import IMPORTABLE
from runs import assert_same_forward, differs, run

# Not the defaults: a copy that loses the parameters fails too.
RULES = {
    "relu": fg.rules.rectangular(a=-0.8, b=1.2),
    "tanh": fg.compose(fg.rules.scale(s=0.5), fg.rules.fast_sigmoid(slope=2.0)),
}
RELU = naive(F.relu, models.rectangular(-0.8, 1.2))
TANH = naive(torch.tanh, lambda grad, x: models.fast_sigmoid(2.0)(grad * 0.5, x))

PAIRS = {
    "one graph": (Smooth, lambda: SmoothByHand(RELU, TANH)),
    "two graphs": (Branching, lambda: BranchingByHand(RELU, TANH)),
}
BOTH = pytest.mark.parametrize("pair", PAIRS)
MODES = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


def make(pair: str) -> tuple[nn.Module, nn.Module]:
    """A model, and the one written by hand, with the same numbers in other tensors."""
    original, by_hand = (make() for make in PAIRS[pair])
    by_hand.load_state_dict(original.state_dict())
    return original, by_hand


def sample(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(4, 6, generator=torch.Generator().manual_seed(2)).to(dtype)


def assert_kept(survivor: nn.Module, by_hand: nn.Module) -> None:
    """The survivor, in the mode it is in, has the forward and the gradients of the model written by hand."""
    by_hand.train(survivor.training)
    x = sample(next(by_hand.parameters()).dtype)
    actual, expected = run(survivor, x), run(by_hand, x)
    assert_same_forward(actual, expected)
    # Gradients may be added up in another order; in half precision that shows.
    rounding = {} if x.dtype.itemsize > 2 else {"rtol": 0.02, "atol": 0.002}
    for name, gradient in expected.gradients.items():
        torch.testing.assert_close(actual.gradients[name], gradient, **rounding)


@BOTH
@MODES
def test_the_rules_make_a_difference_here(pair: str, training: bool) -> None:
    """Without this, nothing below proves anything."""
    original, by_hand = make(pair)
    native = run(original.train(training), sample())
    assert differs(run(by_hand.train(training), sample()), native)
    assert_same_forward(run(fg.transform(original, RULES), sample()), native)


def test_the_second_model_has_two_graphs() -> None:
    assert len(fg.transform(Branching(), RULES).variants) == 2


# --- copies and files ---


def in_a_file(gm: nn.Module, **how: Any) -> nn.Module:
    file = io.BytesIO()
    torch.save(gm, file)
    file.seek(0)
    return torch.load(file, weights_only=False, **how)


def pickled(gm: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(gm))


WAYS: dict[str, Callable[[Any], nn.Module]] = {
    "nothing": lambda gm: gm,
    "copy.copy": copy.copy,
    "copy.deepcopy": copy.deepcopy,
    "deepcopy of a deepcopy": lambda gm: copy.deepcopy(copy.deepcopy(gm)),
    "pickle": pickled,
    "pickle, twice": lambda gm: pickled(pickled(gm)),
    "pickle of a deepcopy": lambda gm: pickled(copy.deepcopy(gm)),
    "deepcopy of a pickle": lambda gm: copy.deepcopy(pickled(gm)),
    "torch.save": in_a_file,
    "pickle in a container": lambda gm: pickled(nn.ModuleDict({"model": gm}))["model"],
    "deepcopy in a container": lambda gm: copy.deepcopy(nn.Sequential(gm))[0],
    "recompile": lambda gm: (gm.recompile(), gm)[1],
    "graph set again": lambda gm: (setattr(gm, "graph", gm.graph), gm)[1],
}


@pytest.mark.sampled(4)
@pytest.mark.parametrize("way", WAYS)
@BOTH
def test_copies_keep_the_rules(pair: str, way: str) -> None:
    original, by_hand = make(pair)
    survivor = WAYS[way](fg.transform(original, RULES))
    for training in (True, False, True):
        assert_kept(survivor.train(training), by_hand)


@pytest.mark.sampled(4)
@pytest.mark.parametrize("way", WAYS)
@BOTH
def test_copies_keep_the_report_and_the_state(pair: str, way: str) -> None:
    gm = fg.transform(make(pair)[0], RULES)
    text, names = str(fg.report(gm)), list(gm.state_dict())
    survivor = WAYS[way](gm)
    assert str(fg.report(survivor)) == text
    assert list(survivor.state_dict()) == names
    assert list(gm.state_dict()) == names
    assert type(survivor).__name__ == type(gm).__name__ == PAIRS[pair][0].__name__


@BOTH
def test_a_deepcopy_is_apart(pair: str) -> None:
    original, by_hand = make(pair)
    gm = fg.transform(original, RULES)
    survivor = copy.deepcopy(gm)
    with torch.no_grad():
        for parameter in survivor.parameters():
            parameter.zero_()
    survivor.eval()
    assert gm.training
    assert_kept(gm, by_hand)


@pytest.mark.sampled(4)
@pytest.mark.parametrize("way", ["copy.copy", "copy.deepcopy"])
@pytest.mark.parametrize("edited", ["original", "copy"])
@BOTH
def test_what_is_done_to_the_graphs_of_one_leaves_the_other_as_it_is(
    pair: str, edited: str, way: str
) -> None:
    original, by_hand = make(pair)
    gm = fg.transform(original, RULES)
    survivor = WAYS[way](gm)
    if edited == "original":
        gm, survivor = survivor, gm
    for variant in survivor.variants:
        for node in variant.graph.find_nodes(op="call_function", target=fg.ops.decoupled):
            node.replace_all_uses_with(node.args[0])
            variant.graph.erase_node(node)
    survivor.recompile()
    assert not any(n.target is fg.ops.decoupled for n in survivor.graph.nodes)
    gm.recompile()
    for training in (True, False):
        assert_kept(gm.train(training), by_hand)


IN_ANOTHER_PROCESS = """
import sys
import torch
from runs import run

gm = torch.load(sys.argv[1], weights_only=False)
x = torch.load(sys.argv[2])
seen = [run(gm.train(training), x) for training in (True, False)]
torch.save([each.gradients for each in seen], sys.argv[3])
"""


@pytest.mark.slow
@pytest.mark.sampled(3)
@BOTH
def test_torch_load_in_another_process(pair: str, tmp_path: Path) -> None:
    original, by_hand = make(pair)
    files = [str(tmp_path / name) for name in ("model", "input", "gradients")]
    torch.save(fg.transform(original, RULES), files[0])
    torch.save(sample(), files[1])
    # Nothing there imports freegrad_fx but what was saved.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(IMPORTABLE)}
    subprocess.run(
        [sys.executable, "-c", IN_ANOTHER_PROCESS, *files], check=True, env=environment, timeout=120
    )
    for training, gradients in zip((True, False), torch.load(files[2]), strict=True):
        expected = run(by_hand.train(training), sample()).gradients
        for name, gradient in expected.items():
            torch.testing.assert_close(gradients[name], gradient)


@BOTH
def test_state_dict_goes_round(pair: str, tmp_path: Path) -> None:
    original, by_hand = make(pair)
    torch.save(fg.transform(original, RULES).state_dict(), tmp_path / "state")
    other = PAIRS[pair][0]()
    gm = fg.transform(other, RULES)
    gm.load_state_dict(torch.load(tmp_path / "state"), strict=True)
    assert_kept(gm, by_hand)
    fresh = PAIRS[pair][0]()
    fresh.load_state_dict(gm.state_dict(), strict=True)
    assert_kept(fg.transform(fresh, RULES), by_hand)


@BOTH
def test_state_dict_assigned(pair: str) -> None:
    original, by_hand = make(pair)
    gm = fg.transform(PAIRS[pair][0](), RULES)
    gm.load_state_dict(original.state_dict(), strict=True, assign=True)
    assert_kept(gm, by_hand)


# --- a second trace, a second transform ---


@BOTH
@MODES
def test_a_second_symbolic_trace_keeps_the_rules(pair: str, training: bool) -> None:
    """FX bakes the mode of the moment: of two graphs the traced one is kept."""
    original, by_hand = make(pair)
    gm = fg.transform(original, RULES).train(training)
    traced = torch.fx.symbolic_trace(gm)
    assert_kept(traced, by_hand)
    assert_kept(pickled(copy.deepcopy(traced)), by_hand)


@BOTH
def test_as_a_part_of_a_traced_model(pair: str) -> None:
    original, by_hand = make(pair)
    outer = nn.Sequential(fg.transform(original, RULES), nn.Identity())
    assert_kept_in_a_sequential(torch.fx.symbolic_trace(outer), by_hand)


def assert_kept_in_a_sequential(outer: nn.Module, by_hand: nn.Module) -> None:
    assert_kept(outer, nn.Sequential(by_hand, nn.Identity()))


@BOTH
@pytest.mark.parametrize("second", [RULES, "scale", {"activations": "reverse"}], ids=str)
def test_a_second_transform_changes_nothing(pair: str, second: Any) -> None:
    """Case 10: the first rules stay, and that is reported."""
    original, by_hand = make(pair)
    first = fg.transform(original, RULES)
    with pytest.warns(fg.FreegradWarning) as warned:
        gm = fg.transform(first, second)
    assert len(gm.variants) == len(first.variants)
    for training in (True, False):
        assert gm.train(training).code == first.train(training).code
        assert_kept(gm, by_hand)
    sites = len(fg.report(first).decisions)
    assert [d.action for d in fg.report(gm).decisions] == ["skip"] * sites
    assert all("already decoupled" in str(warning.message) for warning in warned)
    with pytest.raises(fg.PlanError, match="already decoupled"):
        fg.transform(first, second, strict=True)


@BOTH
def test_a_second_transform_adds_what_the_first_left(pair: str) -> None:
    original, by_hand = make(pair)
    first = fg.transform(original, {"relu": RULES["relu"], "tanh": None})
    assert_kept(fg.transform(first, {"tanh": RULES["tanh"]}), by_hand)
    other, _ = make(pair)
    other.load_state_dict(by_hand.state_dict())
    assert not differs(
        run(first, sample()), run(fg.transform(other, {"relu": RULES["relu"]}), sample())
    )


def test_a_model_with_a_transformed_part_keeps_its_rules() -> None:
    original, by_hand = make("one graph")
    outer = nn.Sequential(fg.transform(original, RULES), nn.Linear(3, 3), nn.ReLU())
    with pytest.warns(fg.FreegradWarning, match="already decoupled"):
        gm = fg.transform(outer, {"relu": "reverse"})
    relu = naive(F.relu, lambda grad, x: -grad)

    class Reference(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.add_module("0", by_hand)
            self.add_module("1", copy.deepcopy(outer[1]))

        def forward(self, x: Tensor) -> Tensor:
            return relu(self.get_submodule("1")(by_hand(x)))

    assert_kept(gm, Reference())


# --- compilers ---


@pytest.mark.sampled(2)
@BOTH
def test_compiled_in_one_piece(pair: str) -> None:
    original, by_hand = make(pair)
    compiled = torch.compile(fg.transform(original, RULES), fullgraph=True, backend="aot_eager")
    for training in (True, False):
        compiled.train(training)
        assert_kept_compiled(compiled, by_hand)


@pytest.mark.slow
@pytest.mark.inductor
def test_compiled_by_inductor() -> None:
    original, by_hand = make("one graph")
    compiled = torch.compile(fg.transform(original, RULES), fullgraph=True)
    assert_kept_compiled(compiled, by_hand)


def assert_kept_compiled(compiled: nn.Module, by_hand: nn.Module) -> None:
    by_hand.train(compiled.training)
    results = []
    for model in (compiled, by_hand):
        x = sample().requires_grad_()
        torch.manual_seed(1)
        output = model(x)
        leaves = [x, *model.parameters()]
        results.append([output, *torch.autograd.grad(runs.loss([output]), leaves)])
    for a, e in zip(*results, strict=True):
        torch.testing.assert_close(a, e)


# --- derivatives of derivatives, functorch ---


@BOTH
@MODES
def test_double_backward(pair: str, training: bool) -> None:
    original, by_hand = make(pair)
    second = []
    for model in (fg.transform(original, RULES).train(training), by_hand.train(training)):
        x = sample().requires_grad_()
        torch.manual_seed(1)
        leaves = [x, *model.parameters()]
        first = torch.autograd.grad(runs.loss([model(x)]), leaves, create_graph=True)
        second.append(torch.autograd.grad(runs.loss([g.tanh() for g in first]), leaves))
    for a, e in zip(*second, strict=True):
        torch.testing.assert_close(a, e)
    assert any(g.abs().max() > 0 for g in second[1][1:])


@pytest.mark.sampled(4)
@BOTH
@MODES
@pytest.mark.parametrize("outer", ["vmap(grad)", "grad", "jacrev", "grad(sum(vmap))"])
def test_functorch(pair: str, training: bool, outer: str) -> None:
    original, by_hand = make(pair)
    gm = fg.transform(original, RULES).train(training)
    by_hand.train(training)
    parameters = dict(gm.named_parameters())
    xs = sample()

    def sample_loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return runs.loss([functional_call(gm, parameters, (x[None],))[0]])

    def reference(x: Tensor) -> list[Tensor]:
        loss = runs.loss([by_hand(x[None])[0]])
        return list(torch.autograd.grad(loss, list(by_hand.parameters())))

    each = [reference(x) for x in xs]
    with torch.random.fork_rng():
        if outer == "vmap(grad)":
            actual = vmap(grad(sample_loss), in_dims=(None, 0))(parameters, xs)
            expected = [torch.stack(g) for g in zip(*each, strict=True)]
        elif outer == "grad":
            actual = grad(sample_loss)(parameters, xs[0])
            expected = each[0]
        elif outer == "jacrev":
            actual = torch.func.jacrev(sample_loss)(parameters, xs[0])
            expected = each[0]
        else:
            total = lambda p: vmap(sample_loss, in_dims=(None, 0))(p, xs).sum()  # noqa: E731
            actual = grad(total)(parameters)
            expected = [torch.stack(g).sum(0) for g in zip(*each, strict=True)]
    for a, e in zip(actual.values(), expected, strict=True):
        torch.testing.assert_close(a, e)


# --- devices and dtypes ---


@BOTH
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_another_dtype(pair: str, dtype: torch.dtype) -> None:
    original, by_hand = make(pair)
    before = {name: p.dtype for name, p in original.named_parameters()}
    survivor = copy.deepcopy(fg.transform(original, RULES)).to(dtype)
    for training in (True, False):
        assert_kept(survivor.train(training), by_hand.to(dtype))
    assert {name: p.dtype for name, p in original.named_parameters()} == before


@BOTH
def test_a_model_without_storage(pair: str) -> None:
    """From the meta device to the processor, by the state of another model."""
    original, by_hand = make(pair)
    with torch.device("meta"):
        gm = fg.transform(PAIRS[pair][0](), RULES)
    x = torch.empty(4, 6, device="meta", requires_grad=True)
    gm(x).sum().backward()
    assert x.grad is not None
    assert x.grad.shape == x.shape
    gm = copy.deepcopy(gm).to_empty(device="cpu")
    gm.load_state_dict(original.state_dict())
    for training in (True, False):
        assert_kept(gm.train(training), by_hand)


@BOTH
@MODES
def test_replicas(pair: str, training: bool) -> None:
    """Case 35: `nn.DataParallel` makes its copies with `__copy__`, and gives them other parameters."""
    original, by_hand = make(pair)
    gm = fg.transform(original, RULES).train(training)
    module = sys.modules["torch.nn.parallel.replicate"]

    def two(tensors: list[Tensor], devices: list[int], detach: bool = False) -> list[list[Tensor]]:
        return [[t.detach() * 1 if detach else t * 1 for t in tensors] for _ in devices]

    with mock.patch.multiple(
        module,
        _broadcast_coalesced_reshape=two,
        _get_device_index=lambda device, *_: device,
    ):
        replicas = nn.parallel.replicate(gm, [0, 1])
    xs = sample().chunk(2)
    x_leaves = [x.clone().requires_grad_() for x in (*xs, *xs)]
    results = []
    for models_, inputs in (
        (replicas, x_leaves[:2]),
        ([by_hand.train(training)] * 2, x_leaves[2:]),
    ):
        torch.manual_seed(1)
        outputs = [m(x) for m, x in zip(models_, inputs, strict=True)]
        owner = gm if models_ is replicas else by_hand
        gradients = torch.autograd.grad(runs.loss(outputs), [*inputs, *owner.parameters()])
        results.append([*outputs, *gradients])
    for a, e in zip(*results, strict=True):
        torch.testing.assert_close(a, e)

"""Nothing of a model is lost in its capture, and nothing of it is changed: state, hooks, parametrizations, methods.

Cases 20, 21 and 39. The original, called as often, is the oracle.
"""

from __future__ import annotations

import copy
import pickle
import random
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import freegrad_fx as fg
from side_by_side import (
    BACKWARD,
    RULE,
    THRICE,
    Make,
    Net,
    build,
    captured_or_refused,
    check_capture,
    contents,
    difference,
    nothing_is_left_behind,
    sample,
    traced_plainly,
    what_plain_tracing_gets_wrong,
)
from sweep import NATIVE, Interception

# --- state that the forward changes ---

STATEFUL: dict[str, Make] = {}


def stateful(kind: type[nn.Module]) -> type[nn.Module]:
    STATEFUL[kind.__name__] = kind
    return kind


@stateful
class CountsInPlace(Net):
    def make(self) -> None:
        self.register_buffer("n", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        self.n += 1
        return F.relu(self.f(x)) + self.n


@stateful
class CountsByMethod(Net):
    def make(self) -> None:
        self.register_buffer("n", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.f(x)) + self.n
        self.n.add_(1)
        return y


@stateful
class CountsByAssignment(Net):
    def make(self) -> None:
        self.register_buffer("n", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        self.n = self.n + 1
        return F.relu(self.f(x)) * self.n


@stateful
class CountsInAPart(Net):
    def make(self) -> None:
        self.part, self.other = CountsInPlace(), CountsByAssignment()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.other(self.part(self.part(x))))


@stateful
class AveragesInTraining(Net):
    def make(self) -> None:
        self.register_buffer("mean", torch.zeros(6), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        return F.relu(self.f(x) - self.mean)


@stateful
class AveragesWithoutGrad(Net):
    def make(self) -> None:
        self.register_buffer("mean", torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                self.mean.mul_(0.9).add_(x.mean(0) * 0.1)
        return F.relu(self.f(x) - self.mean)


@stateful
class CopiesIntoABuffer(Net):
    def make(self) -> None:
        self.register_buffer("last", torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.f(x) - self.last)
        self.last.copy_(x.detach().mean(0))
        return y


@stateful
class WritesARow(Net):
    def make(self) -> None:
        self.register_buffer("rows", torch.zeros(4, 6))

    def forward(self, x: Tensor) -> Tensor:
        self.rows[1:3] = x.detach()[:2]
        return F.relu(self.f(x) + self.rows)


@stateful
class HoldsATensor(Net):
    """An attribute that is a tensor and no buffer; two more in a list."""

    def make(self) -> None:
        self.t, self.more = torch.full((6,), 0.5), [torch.ones(6), torch.full((6,), 2.0)]

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.f(x) * self.t + self.more[0]) - self.more[1]


@stateful
class RemembersItsOutput(Net):
    def make(self) -> None:
        self.last: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.last = F.relu(self.f(x))
        return self.last * 2


@stateful
class Norms(Net):
    """Statistics that torch.nn keeps: a running average, a cumulative one, and a count."""

    def make(self) -> None:
        self.a, self.b = nn.BatchNorm1d(6), nn.BatchNorm1d(6, momentum=None)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.b(F.relu(self.a(self.f(x)))))


@stateful
class GoesThroughItsParameters(Net):
    """A penalty on all of them, none of them read by its name."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.f(x)) + sum(p.square().sum() for p in self.parameters())


@stateful
class LooksUpAParameter(Net):
    def forward(self, x: Tensor) -> Tensor:
        bias = dict(self.named_parameters())["f.bias"]
        return F.relu(self.f(x)) + bias + self._modules["g"].bias


@stateful
class ReadsDataOfAParameter(Net):
    def forward(self, x: Tensor) -> Tensor:
        w = self.f.weight
        y = F.linear(x, w.t().contiguous(), self.f.bias) / w.shape[0] ** 0.5 / w.numel()
        return F.relu(y) * w.detach().mean() + w.data.mean()


@stateful
class MakesConstants(Net):
    def forward(self, x: Tensor) -> Tensor:
        a = torch.zeros(6)
        a += 1
        a[2] = 5.0
        a.mul_(2)
        out = torch.empty(4, 6)
        out[:] = self.f(x)
        return F.relu(out * a + torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]) + torch.arange(6))


@stateful
class MakesRandomNumbers(Net):
    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.f(x) + torch.rand(6) + torch.randn(x.shape[0], 6))
        return y * torch.bernoulli(torch.full((6,), 0.5)) + torch.rand_like(x)


@stateful
class SwitchesGradOff(Net):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            y = F.relu(self.f(x))
            with torch.enable_grad():
                z = F.relu(self.g(y))
        with torch.set_grad_enabled(self.training):
            w = F.relu(self.f(x))
        return F.relu(self.f(x)) + y + z + w


@pytest.mark.sampled(4)
@pytest.mark.parametrize("name", STATEFUL)
def test_state_and_constants_are_the_original_s_call_after_call(name: str) -> None:
    check_capture(STATEFUL[name], *THRICE)


PLAINLY_WRONG = {
    "CountsInPlace": "the original was changed",
    "CountsByMethod": "the original was changed",
    "CountsByAssignment": "the original was changed",
    "CountsInAPart": "the original was changed",
    "AveragesInTraining": "output 0 differs",
    "AveragesWithoutGrad": "output 0 differs",
    "GoesThroughItsParameters": "the original was changed",
    "MakesRandomNumbers": "refuses",
    "SwitchesGradOff": "gradient of",
}


@pytest.mark.parametrize("name", PLAINLY_WRONG)
def test_a_plain_trace_is_wrong_about_state(name: str) -> None:
    assert PLAINLY_WRONG[name] in what_plain_tracing_gets_wrong(STATEFUL[name], *THRICE)


def test_an_attribute_that_the_forward_sets_is_set() -> None:
    model, other = build(RemembersItsOutput), build(RemembersItsOutput)
    gm = fg.transform(other, NATIVE)
    assert gm.last is None
    for seed in (2, 3):
        model(sample(seed))
        gm(sample(seed))
        assert torch.equal(gm.last, model.last)
    assert other.last is None


# --- Python state: no graph can keep it ---


class CountsInPython(Net):
    def make(self) -> None:
        self.k = 0

    def forward(self, x: Tensor) -> Tensor:
        self.k += 1
        return F.relu(self.f(x)) * self.k


class AppendsToAList(Net):
    def make(self) -> None:
        self.calls: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.calls.append(1)
        return F.relu(self.f(x)) * len(self.calls)


class CountsInADict(Net):
    def make(self) -> None:
        self.cfg = {"n": 0}

    def forward(self, x: Tensor) -> Tensor:
        self.cfg["n"] += 1
        return F.relu(self.f(x)) * self.cfg["n"]


class ChangesAPlainTensor(Net):
    def make(self) -> None:
        self.t = torch.zeros(6)

    def forward(self, x: Tensor) -> Tensor:
        self.t += 1
        return F.relu(self.f(x) + self.t)


class ReachesItsBuffersByBuffers(Net):
    def make(self) -> None:
        self.register_buffer("t", torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        for buffer in self.buffers():
            buffer.add_(1)
        return F.relu(self.f(x) + self.t)


class KeepsAMembrane(Net):
    """A number at first, a tensor from then on."""

    def make(self) -> None:
        self.mem: Any = 0.0

    def forward(self, x: Tensor) -> Tensor:
        self.mem = self.mem * 0.5 + self.f(x)
        return F.relu(self.mem)


IN_PYTHON = [
    CountsInPython, AppendsToAList, CountsInADict, ChangesAPlainTensor, ReachesItsBuffersByBuffers, KeepsAMembrane,
]  # fmt: skip


def inside(kind: type[nn.Module]) -> type[nn.Module]:
    class Outside(Net):
        def make(self) -> None:
            self.part = kind()

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.g(self.part(F.relu(x))))

    return Outside


@pytest.mark.parametrize("kind", IN_PYTHON)
def test_state_that_no_graph_keeps_is_refused_at_the_root_or_right(kind: type[nn.Module]) -> None:
    model = build(kind)
    before = contents(model)
    gm, refusal = captured_or_refused(model)
    assert contents(model) == before
    if gm is None:
        assert kind.__name__ in refusal
    else:
        assert difference(build(kind), gm, THRICE) == ""


@pytest.mark.parametrize("kind", [CountsInPython, AppendsToAList, CountsInADict, KeepsAMembrane])
def test_a_part_that_keeps_state_in_python_is_kept_whole(kind: type[nn.Module]) -> None:
    check_capture(inside(kind), *THRICE, whole=["part"])


@pytest.mark.parametrize("kind", [CountsInPython, AppendsToAList, ChangesAPlainTensor])
def test_a_plain_trace_bakes_state_kept_in_python(kind: type[nn.Module]) -> None:
    assert what_plain_tracing_gets_wrong(inside(kind), *THRICE)


# --- the original is left alone ---


class Nasty(Net):
    """Touches all that a forward can touch."""

    def make(self) -> None:
        self.t, self.cfg = torch.zeros(2), {"n": 0, "list": [1]}
        self.register_buffer("b", torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        self.t.add_(1)
        self.b.add_(1)
        self.cfg["n"] += 1
        self.cfg["list"].append(2)
        self.new = x
        self.f.note = "noted"
        return F.relu(self.f(x))


class NastyThenUntraceable(Nasty):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        torch.set_grad_enabled(False)
        return y if y.sum() > 0 else x


@pytest.mark.sampled(4)
@pytest.mark.parametrize("kind", [Nasty, NastyThenUntraceable, *IN_PYTHON])
@pytest.mark.parametrize("where", ["root", "part"])
def test_the_original_and_the_process_are_as_before(kind: type[nn.Module], where: str) -> None:
    model = build(kind if where == "root" else inside(kind))
    before = contents(model)
    with warnings.catch_warnings(), nothing_is_left_behind():
        warnings.simplefilter("ignore", fg.FreegradWarning)
        captured_or_refused(model, RULE)
    assert contents(model) == before


class LeavesGradOff(Net):
    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.f(x))
        torch.set_grad_enabled(False)
        return F.relu(self.f(x)) + y


class RaisesWhileGradIsOff(Net):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            y = self.f(x).view(5, 5)
        return F.relu(y)


@pytest.fixture
def _grad_on_again() -> Iterator[None]:
    yield
    torch.set_grad_enabled(True)


@pytest.mark.usefixtures("_grad_on_again")
def test_the_grad_mode_is_not_left_off_by_a_capture() -> None:
    fg.transform(LeavesGradOff(), RULE)
    assert torch.is_grad_enabled()


@pytest.mark.usefixtures("_grad_on_again")
def test_the_grad_mode_is_restored_where_a_call_raises() -> None:
    gm = fg.transform(RaisesWhileGradIsOff(), NATIVE)
    with pytest.raises(RuntimeError, match="shape"):
        gm(sample())
    assert torch.is_grad_enabled()


class DrawsNumbers(Net):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.f(x)) * random.random() + torch.rand(3).sum()


class DrawsNumbersThenUntraceable(DrawsNumbers):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y if y.sum() > 0 else x


class DrawsNumbersAndCounts(CountsInPython):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * random.random()


@pytest.mark.parametrize(
    ("kind", "where"),
    [
        (DrawsNumbers, "root"),
        (DrawsNumbers, "part"),
        (DrawsNumbersThenUntraceable, "root"),
        (DrawsNumbersThenUntraceable, "part"),
        (DrawsNumbersAndCounts, "root"),
        (DrawsNumbersAndCounts, "part"),
    ],
)
def test_numbers_drawn_on_the_trace_are_put_back(kind: type[nn.Module], where: str) -> None:
    model = build(kind if where == "root" else inside(kind))
    with nothing_is_left_behind():
        captured_or_refused(model, RULE)


class WritesIntoAListedTensor(Net):
    def make(self) -> None:
        self.log, self.named = [torch.zeros(6)], {"t": torch.zeros(6)}

    def forward(self, x: Tensor) -> Tensor:
        self.log[0].add_(1)
        self.named["t"] += 1
        return F.relu(self.f(x) + self.log[0] * self.named["t"])


@pytest.mark.parametrize("where", ["root", "part"])
def test_tensors_in_containers_are_not_written_into_by_a_capture(where: str) -> None:
    make = WritesIntoAListedTensor if where == "root" else inside(WritesIntoAListedTensor)
    model = build(make)
    before = contents(model)
    gm, _ = captured_or_refused(model)
    assert contents(model) == before
    assert gm is None or difference(build(make), gm, THRICE) == ""


class WithSettings(Net):
    def make(self) -> None:
        self.cfg: dict[str, Any] = {"scale": 2.0, "sizes": [1, 2]}
        self.same, self.tensors = self.cfg, [torch.ones(6)]

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.f(x) * self.cfg["scale"] + self.tensors[0])


def test_attributes_of_both_are_apart() -> None:
    model = build(WithSettings)
    gm = fg.transform(model, NATIVE)
    assert gm.cfg == model.cfg
    assert gm.cfg is not model.cfg
    assert gm.cfg["sizes"] is not model.cfg["sizes"]
    assert gm.cfg is gm.same
    assert gm.tensors[0] is model.tensors[0]  # tensors are shared
    check_capture(WithSettings)


# --- the original while another thread uses it ---


class Slow(Net):
    def forward(self, x: Tensor) -> Tensor:
        if type(x) is not Tensor:
            time.sleep(0.1)
        y = F.relu(F.linear(x, self.f.weight)) + torch.zeros(6)
        return y * (1 if self.training else 2) + F.dropout(x, 0.5, self.g.training)


class Doubles(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 7


class Other(Net):
    def make(self) -> None:
        self.register_buffer("n", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.n = self.n + 1
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            y = self.f(x)
        return Doubles.apply(F.relu(self.f(x))) + torch.ones(6) * self.training + y.float()


@pytest.mark.parametrize("which", ["the same model", "another model"])
def test_other_threads_run_models_during_a_capture(which: str) -> None:
    model = build(Slow).eval()
    used = model if which == "the same model" else build(Other).eval()
    x, failures, stop = sample(), [], threading.Event()
    expected = used(x)

    def work() -> None:
        while not stop.is_set():
            try:
                if not torch.equal(used(x), expected):
                    failures.append("another output")
                if used.training or used.f.training:
                    failures.append("another mode")
            except Exception as error:
                failures.append(repr(error))

    thread = threading.Thread(target=work)
    thread.start()
    try:
        gm = fg.transform(model, RULE)
    finally:
        stop.set()
        thread.join()
    assert not failures, failures[0]
    assert torch.equal(gm(x), model(x))


class DrawsInAPart(Net):
    """A submodule draws from PyTorch's generator without a traced tensor, another does not draw."""

    def make(self) -> None:
        self.parts = nn.ModuleList([Scaled(), nn.Sequential(Branches(), nn.ReLU())])

    def forward(self, x: Tensor) -> Tensor:
        for part in self.parts:
            x = part(x)
        return x


class Scaled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * random.random()


class Branches(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if self.training else x


def test_random_numbers_of_other_threads_are_not_those_of_the_capture() -> None:
    """They keep no module whole, and the generator is not set back under the other thread."""
    model, stop, drawn = build(DrawsInAPart), threading.Event(), []

    def work() -> None:
        while not stop.is_set():
            drawn.append(float(torch.rand((), dtype=torch.float64)))

    thread = threading.Thread(target=work)
    thread.start()
    try:
        report = fg.report(fg.transform(model, RULE))
    finally:
        stop.set()
        thread.join()
    assert [decision.site.path for decision in report.decisions] == ["parts.1.1"]
    assert [call.path for call in report.opaque] == ["parts.0"]
    assert len(set(drawn)) == len(drawn)


def test_two_threads_capture_at_once() -> None:
    same: list[bool] = []

    def work(make: Make) -> None:
        model = build_alone(make)
        gm = fg.transform(model, NATIVE).eval()
        same.append(torch.equal(gm(sample()), model.eval()(sample())))

    def build_alone(make: Make) -> nn.Module:
        return make()

    threads = [threading.Thread(target=work, args=(make,)) for make in (Slow, Net2, Slow, Net2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert same == [True] * 4


class Net2(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.f(x)) * (1 if self.training else 2)


# --- what a model holds beside its forward ---


class MyParameter(nn.Parameter):
    pass


class Everything(Net):
    """Unused, tied, frozen, empty, non-persistent and oddly named tensors, in an order of its own."""

    def make(self) -> None:
        self.register_buffer("z", torch.ones(2))
        self.register_buffer("scratch", torch.ones(6), persistent=False)
        self.register_buffer("nothing", None)
        self.register_parameter("none", None)
        self.unused = nn.Parameter(torch.ones(2))
        self.f.bias.requires_grad_(False)
        self.tied = nn.Linear(6, 6)
        self.tied.weight = self.f.weight
        self.mine = MyParameter(torch.randn(6))
        self.listed = nn.ParameterList([nn.Parameter(torch.randn(6)) for _ in range(2)])
        self.named = nn.ParameterDict({"a-b": nn.Parameter(torch.randn(6))})
        self.register_parameter("p-q", nn.Parameter(torch.randn(6)))
        self.never = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.tied(F.relu(self.f(x)))) + self.scratch
        for p in self.listed:
            x = x * p
        return F.relu(x * self.mine + self.named["a-b"] + getattr(self, "p-q"))


def test_every_tensor_is_there_in_its_order_and_the_same() -> None:
    check_capture(Everything)
    model = build(Everything)
    gm = fg.transform(model, RULE)
    assert list(gm.state_dict()) == list(model.state_dict())
    for group in ("named_parameters", "named_buffers", "named_modules"):
        mine, own = (dict(getattr(m, group)(remove_duplicate=False)) for m in (gm, model))
        assert list(mine) == list(own)
        if group != "named_modules":
            assert all(mine[name] is own[name] for name in own)
    assert gm.tied.weight is gm.f.weight is model.f.weight
    assert type(gm.mine) is MyParameter
    assert [p.requires_grad for p in gm.parameters()] == [
        p.requires_grad for p in model.parameters()
    ]
    assert gm.nothing is None
    assert gm.none is None
    assert not set(gm.modules()) & set(model.modules())
    optimizer = torch.optim.SGD(gm.parameters(), lr=1.0)
    assert len(optimizer.param_groups[0]["params"]) == len(list(model.parameters()))


def test_a_plain_trace_loses_tensors_and_shares_modules() -> None:
    model = build(Everything)
    gm = traced_plainly(model)
    assert list(gm.state_dict()) != list(model.state_dict())
    assert "unused" not in gm.state_dict()
    gm.eval()
    assert not model.f.training


def test_strict_loading_goes_both_ways() -> None:
    model = build(Everything)
    gm = fg.transform(model, RULE)
    torch.manual_seed(7)
    for source, target in (
        (Everything(), gm),
        (fg.transform(Everything(), RULE), build(Everything)),
    ):
        target.load_state_dict(source.state_dict(), strict=True)
        for name, tensor in source.state_dict().items():
            assert torch.equal(target.state_dict()[name], tensor)
    loaded = Everything()
    loaded.load_state_dict(model.state_dict())
    x = sample()
    assert torch.equal(gm(x), loaded(x))  # what was loaded into `gm` is in `model` too


class NormAct(nn.BatchNorm1d):
    """As timm has them: a norm with its activation inside."""

    def __init__(self, n: int) -> None:
        super().__init__(n)
        self.act, self.drop = nn.ReLU(inplace=True), nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = F.batch_norm(
            x,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            self.training,
            self.momentum,
        )
        return self.act(self.drop(x))


class HasNormAct(Net):
    def make(self) -> None:
        self.norm = NormAct(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.g(self.norm(self.f(x)))


def test_a_subclass_of_batch_norm_keeps_its_keys_and_is_opened() -> None:
    """Case 20."""
    gm = check_capture(HasNormAct)
    assert [d.site.path for d in fg.report(gm).decisions if d.site.op == "relu"] == ["norm.act"]
    assert list(gm.state_dict()) == list(HasNormAct().state_dict())
    assert isinstance(gm.norm, NormAct)


# --- what the class of a model adds ---


class WithExtraState(Net):
    def make(self) -> None:
        self.extra = {"a": 1}

    def get_extra_state(self) -> Any:
        return self.extra

    def set_extra_state(self, state: Any) -> None:
        self.extra = state

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.f(x))


class InAPart(Net):
    kind: Callable[[], nn.Module] = WithExtraState

    def make(self) -> None:
        self.part = type(self).kind()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.part(x))


@pytest.mark.parametrize("where", ["root", "part"])
def test_extra_state_is_saved_and_loaded(where: str) -> None:
    model = WithExtraState() if where == "root" else InAPart()
    gm = fg.transform(model, NATIVE)
    part = gm if where == "root" else gm.part
    assert list(gm.state_dict()) == list(model.state_dict())
    gm.load_state_dict(model.state_dict())
    key = next(key for key in gm.state_dict() if key.endswith("_extra_state"))
    assert gm.state_dict()[key] == {"a": 1}
    gm.load_state_dict({**model.state_dict(), key: {"a": 9}})
    assert part.extra == {"a": 9}
    model.load_state_dict(gm.state_dict())


class Versioned(Net):
    _version = 3

    def _load_from_state_dict(self, state: Any, prefix: str, *args: Any) -> None:
        state[prefix + "f.bias"] = torch.zeros(6)  # as older checkpoints are mended
        super()._load_from_state_dict(state, prefix, *args)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.f(x))


class RenamesItsKeys(Net):
    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        state = super().state_dict(*args, **kwargs)
        state["more"] = torch.ones(1)
        return state

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.f(x))


def test_methods_that_load_and_save_are_the_model_s() -> None:
    model = Versioned()
    gm = fg.transform(model, NATIVE)
    assert gm.state_dict()._metadata == model.state_dict()._metadata
    gm.load_state_dict(model.state_dict())
    assert not gm.f.bias.any()
    renamed = RenamesItsKeys()
    assert list(fg.transform(renamed, NATIVE).state_dict()) == list(renamed.state_dict())


def test_state_dict_hooks_are_kept() -> None:
    model = Net2()
    model._register_state_dict_hook(lambda module, state, *_: state.update(extra=torch.ones(1)))
    model.register_load_state_dict_pre_hook(lambda module, state, *_: state.pop("extra"))
    gm = fg.transform(model, NATIVE)
    assert list(gm.state_dict()) == list(model.state_dict())
    gm.load_state_dict(model.state_dict())


class KeepsANormInEval(Net):
    """As detection models freeze their backbones."""

    def make(self) -> None:
        self.norm = nn.BatchNorm1d(6)

    def train(self, mode: bool = True) -> KeepsANormInEval:
        super().train(mode)
        self.norm.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(F.relu(self.norm(self.f(x))), 0.5, self.training)


class PartKeepsANormInEval(InAPart):
    kind = KeepsANormInEval


@pytest.mark.parametrize("kind", [KeepsANormInEval, PartKeepsANormInEval])
def test_train_is_the_model_s_own(kind: type[nn.Module]) -> None:
    check_capture(kind, *THRICE)
    gm = fg.transform(build(kind), RULE)
    for copied in (gm, copy.deepcopy(gm), pickle.loads(pickle.dumps(gm))):
        copied.train()
        part = copied if kind is KeepsANormInEval else copied.part
        assert part.training
        assert not part.norm.training


def test_a_plain_trace_loses_train() -> None:
    assert what_plain_tracing_gets_wrong(KeepsANormInEval)


class WithMethods(Net):
    width = 6

    def make(self) -> None:
        self.cfg = {"depth": 2}

    @property
    def depth(self) -> int:
        return self.cfg["depth"]

    def head(self, x: Tensor) -> Tensor:
        return self.g(x) * self.width

    @classmethod
    def tiny(cls) -> WithMethods:
        return cls()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.f(x)))


def test_the_methods_and_the_class_of_a_model_are_there() -> None:
    model = build(WithMethods)
    gm = fg.transform(model, RULE)
    for copied in (gm, copy.deepcopy(gm), pickle.loads(pickle.dumps(gm))):
        assert isinstance(copied, WithMethods)
        assert isinstance(copied, fg.CapturedModule)
        assert isinstance(copied, torch.fx.GraphModule)
        assert (copied.width, copied.depth) == (6, 2)
        assert type(copied).__name__ == "WithMethods"
        assert torch.equal(copied.head(sample()), model.head(sample()))
    check_capture(WithMethods)


# --- parametrizations ---


class Symmetric(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return w.triu() + w.triu(1).T


class Rectified(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return F.relu(w)


class OwnWeight(Net):
    """A parametrization on a module of the user's own."""

    def make(self) -> None:
        self.w = nn.Parameter(torch.randn(6, 6))
        parametrize.register_parametrization(self, "w", Symmetric())

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x @ self.w)


class PartWithOwnWeight(InAPart):
    kind = OwnWeight


def with_layer(change: Callable[[nn.Module], Any]) -> Make:
    def make() -> nn.Module:
        model = Net2()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            change(model.f)
        return model

    return make


class ParametrizedActivation(Net):
    def make(self) -> None:
        self.p = nn.PReLU()
        parametrize.register_parametrization(self.p, "weight", Symmetric0())

    def forward(self, x: Tensor) -> Tensor:
        return self.p(self.f(x))


class Symmetric0(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return w * 0.5 + 0.25


PARAMETRIZED: dict[str, Make] = {
    "weight_norm": with_layer(parametrizations.weight_norm),
    "weight_norm, by hooks": with_layer(torch.nn.utils.weight_norm),
    "spectral_norm": with_layer(parametrizations.spectral_norm),
    "spectral_norm, by hooks": with_layer(torch.nn.utils.spectral_norm),
    "orthogonal": with_layer(parametrizations.orthogonal),
    "own": with_layer(lambda f: parametrize.register_parametrization(f, "weight", Symmetric())),
    "pruned": with_layer(lambda f: prune.l1_unstructured(f, "weight", amount=0.3)),
    "own, at the root": OwnWeight,
    "own, in a part": PartWithOwnWeight,
    "of an activation's slope": ParametrizedActivation,
}


@pytest.mark.sampled(4)
@pytest.mark.parametrize("name", PARAMETRIZED)
def test_parametrizations_are_computed_anew_at_each_call(name: str) -> None:
    make = PARAMETRIZED[name]
    check_capture(make, *THRICE)
    assert list(fg.transform(make(), RULE).state_dict()) == list(make().state_dict())


def test_an_activation_in_a_parametrization_is_a_site_or_reported() -> None:
    make = with_layer(lambda f: parametrize.register_parametrization(f, "weight", Rectified()))
    plan = fg.explain(make(), {"relu": RULE})
    opaque = [o.path for o in plan.opaque]
    assert len(plan.decisions) == 2 or any(path.startswith("f") for path in opaque), str(plan)
    assert difference(build(make), fg.transform(build(make), NATIVE), THRICE) == ""


def test_a_user_s_module_with_a_parametrization_is_looked_into() -> None:
    plan = fg.explain(PartWithOwnWeight(), {"relu": RULE})
    assert {d.site.path for d in plan.decisions} == {"part", ""}


@pytest.mark.parametrize("name", ["own, at the root"])
def test_a_plain_trace_is_wrong_about_parametrizations(name: str) -> None:
    model = build(PARAMETRIZED[name])
    try:
        gm = traced_plainly(model)
    except Exception:
        return
    assert list(gm.state_dict()) != list(model.state_dict())


# --- hooks ---

Hook = Callable[[nn.Module, list[str]], Any]


def _gradients(grads: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    return tuple(None if g is None else g * 5 for g in grads)


HOOKS: dict[str, Hook] = {
    "forward": lambda m, log: m.register_forward_hook(
        lambda m, args, out: (log.append("forward"), out * 2)[1]
    ),
    "forward, with keywords": lambda m, log: m.register_forward_hook(
        lambda m, args, kwargs, out: (log.append("forward"), out * 2)[1], with_kwargs=True
    ),
    "forward, even after an error": lambda m, log: m.register_forward_hook(
        lambda m, args, out: log.append("forward"), always_call=True
    ),
    "before forward": lambda m, log: m.register_forward_pre_hook(
        lambda m, args: (log.append("before"), (args[0] * 3,))[1]
    ),
    "before forward, with keywords": lambda m, log: m.register_forward_pre_hook(
        lambda m, args, kwargs: (log.append("before"), ((args[0] * 3,), kwargs))[1],
        with_kwargs=True,
    ),
    "backward": lambda m, log: m.register_full_backward_hook(
        lambda m, grad_in, grad_out: (log.append("backward"), _gradients(grad_in))[1]
    ),
    "before backward": lambda m, log: m.register_full_backward_pre_hook(
        lambda m, grad_out: (log.append("before backward"), _gradients(grad_out))[1]
    ),
}


class Container(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.f(x))


class Hooked(Net):
    def make(self) -> None:
        self.part = Container()

    def forward(self, x: Tensor) -> Tensor:
        y = self.part(x)
        return self.act(self.g(y) if self.training else y)


def hooked(path: str, kind: str) -> tuple[nn.Module, list[str]]:
    log: list[str] = []
    model = build(Hooked)
    HOOKS[kind](model.get_submodule(path), log)
    return model, log


@pytest.mark.sampled(6)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("kind", HOOKS)
@pytest.mark.parametrize("path", ["", "part.f", "g"], ids=["root", "leaf in a part", "leaf"])
def test_hooks_on_leaves_and_the_root_fire_as_before(path: str, kind: str, training: bool) -> None:
    """Cases 21 and 39."""
    for rules, reference in ((NATIVE, None), (RULE, Interception(BACKWARD))):
        original, expected = hooked(path, kind)
        model, log = hooked(path, kind)
        gm = fg.transform(model, rules).train(training)
        assert not log, "a hook ran on the trace"
        assert difference(original.train(training), gm, THRICE, reference) == ""
        assert log == expected
        if path != "g" or training:
            assert log


@pytest.mark.sampled(3)
@pytest.mark.parametrize("kind", HOOKS)
def test_hooks_on_a_container_are_kept(kind: str) -> None:
    original, expected = hooked("part", kind)
    model, log = hooked("part", kind)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        gm = fg.transform(model, NATIVE)
    assert not log, "a hook ran on the trace"
    assert not caught
    assert difference(original, gm) == ""
    assert log == expected


@pytest.mark.sampled(4)
@pytest.mark.parametrize("kind", HOOKS)
@pytest.mark.parametrize("path", ["act", "part.act"])
def test_hooks_on_a_rewritten_activation_are_kept(path: str, kind: str) -> None:
    original, expected = hooked(path, kind)
    model, log = hooked(path, kind)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        gm = fg.transform(model, RULE)
    assert not log, "a hook ran on the trace"
    found = difference(original, gm, THRICE[:1], Interception(BACKWARD))
    assert not caught
    assert log == expected != []
    assert found == ""


@pytest.mark.sampled(3)
@pytest.mark.parametrize("kind", HOOKS)
def test_hooks_on_a_native_activation_fire(kind: str) -> None:
    original, expected = hooked("act", kind)
    model, log = hooked("act", kind)
    gm = fg.transform(model, NATIVE)
    assert difference(original, gm, THRICE) == ""
    assert log == expected
    assert log


def test_a_plain_trace_loses_the_hooks_of_the_root() -> None:
    model, log = hooked("", "forward")
    original, _ = hooked("", "forward")
    assert difference(original.eval(), traced_plainly(model.eval(), exchange=False)) != ""
    assert not log


# --- devices and dtypes ---


class FollowsItsInput(Net):
    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.f(x) * torch.ones(6, dtype=x.dtype, device=x.device)) + x.new_zeros(6)
        return y.to(x.device) + torch.tensor(1.0)


def test_meta_models_are_captured_and_filled_later() -> None:
    with torch.device("meta"):
        model = FollowsItsInput()
    gm = fg.transform(model, RULE)
    assert gm(torch.zeros(4, 6, device="meta")).device.type == "meta"
    assert gm.f.weight is model.f.weight
    original = build(FollowsItsInput)
    gm.to_empty(device="cpu")
    gm.load_state_dict(original.state_dict())
    assert difference(original, gm, reference=Interception(BACKWARD)) == ""


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_cast_after_the_capture_reaches_what_the_forward_makes(dtype: torch.dtype) -> None:
    original, gm = build(FollowsItsInput).to(dtype), fg.transform(build(FollowsItsInput), NATIVE)
    x = sample().to(dtype)
    assert torch.equal(gm.to(dtype)(x), original(x))
    assert gm(x).dtype == original(x).dtype

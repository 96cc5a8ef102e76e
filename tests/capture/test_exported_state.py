"""What a forward changes besides its result, in the capture from example inputs: kept, or refused with a remedy.

The original is the oracle: it is called beside the captured model several times, and a refused model beside what the
named way makes of it.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections import deque
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import freegrad_fx as fg
from side_by_side import THRICE, Net, build, contents, difference, nothing_is_left_behind, sample
from sweep import NATIVE

Change = Callable[[Any, Tensor], Tensor | None]


@pytest.fixture(autouse=True, scope="module")
def _imported() -> None:
    """The first export imports Dynamo, which changes PyTorch for good."""
    fg.transform(nn.ReLU(), NATIVE, example_inputs=(sample(),))


def net(prepare: Callable[[Any], None], change: Change) -> type[nn.Module]:
    """A model whose forward changes something between its layers."""

    class Changing(Net):
        def make(self) -> None:
            prepare(self)

        def forward(self, x: Tensor) -> Tensor:
            h = self.act(self.f(x))
            factor = change(self, h)
            return self.g(h) if factor is None else self.g(h) * factor

    return Changing


def renewed(prepare: Callable[[Any], None], change: Change) -> Callable[[], nn.Module]:
    """Models whose containers are not shared between them."""

    def make() -> nn.Module:
        return copy.deepcopy(build(net(prepare, change)))

    return make


class Counter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("n", torch.zeros(6))


class CountsItself(Counter):
    def forward(self, x: Tensor) -> Tensor:
        self.n = self.n + 1
        return x * self.n


def sub(model: Any) -> None:
    model.sub = Counter()


def count(model: Any, h: Tensor) -> Tensor:
    model.sub.n = model.sub.n + 1
    return model.sub.n


def set_sub(**values: Any) -> Callable[[Any], None]:
    def prepare(model: Any) -> None:
        model.sub = Counter()
        for name, value in values.items():
            setattr(model.sub, name, value)

    return prepare


def keep(name: str, value: Callable[[Any, Tensor], Any]) -> Change:
    """Assigns an attribute of the submodule, which it reads only afterwards."""

    def change(model: Any, h: Tensor) -> None:
        setattr(model.sub, name, value(model.sub, h))

    return change


def moving(model: Any, h: Tensor) -> Tensor:
    model.sub.mean = 0.5 * model.sub.mean + h.detach().mean(0)
    return model.sub.mean


def swapped(model: Any, h: Tensor) -> Tensor:
    model.sub.n, model.sub.mean = model.sub.mean, model.sub.n + 1
    return model.sub.n


def in_place(model: Any, h: Tensor) -> Tensor:
    model.sub.mean.add_(1)
    return model.sub.mean


def by_the_table(model: Any, h: Tensor) -> Tensor:
    model.sub._buffers["n"] = model.sub._buffers["n"] + 1
    return model.sub.n


def only_in_training(model: Any, h: Tensor) -> Tensor:
    if model.training:
        model.sub.n = model.sub.n + 1
    return model.sub.n


KEPT: dict[str, tuple[Callable[[Any], None], Change]] = {
    "a buffer of a submodule": (sub, count),
    "a buffer, by the table": (sub, by_the_table),
    "a buffer, in one mode": (sub, only_in_training),
    "a tensor attribute": (set_sub(mean=torch.zeros(6)), moving),
    "a tensor attribute, in place": (set_sub(mean=torch.zeros(6)), in_place),
    "two that change places": (set_sub(mean=torch.ones(6)), swapped),
    "a result, with its gradient": (sub, keep("seen", lambda _, h: h * 2)),
    "a result over None": (set_sub(seen=None), keep("seen", lambda _, h: h)),
    "results in containers": (sub, keep("seen", lambda _, h: [h, {"x": (h + 1, h.detach())}])),
    "a result of another shape": (set_sub(seen=torch.ones(1)), keep("seen", lambda _, h: h)),
}


def state(model: nn.Module) -> list[Any]:
    """The buffers and tensor attributes of a model, with whether they have a gradient."""
    found = []
    for module in model.modules():
        for name, value in {**vars(module), **dict(module.named_buffers(recurse=False))}.items():
            if name in ("n", "mean", "seen"):
                leaves = torch.utils._pytree.tree_leaves(value)
                found += [(name, v.tolist(), v.requires_grad) for v in leaves]
    return found


@pytest.mark.sampled(4)
@pytest.mark.parametrize("kind", KEPT)
def test_what_is_assigned_is_kept(kind: str) -> None:
    make = renewed(*KEPT[kind])
    for training in (True, False):
        original, model = make().train(training), make().train(training)
        before = contents(model)
        with nothing_is_left_behind():
            gm = fg.transform(model, NATIVE, example_inputs=(sample(),))
        assert contents(model) == before
        for given in THRICE:
            assert not difference(original, gm, (given,))
            assert sorted(state(gm), key=str) == sorted(state(original), key=str)
        assert not fg.report(gm).lost


def test_a_module_that_assigns_its_own_buffer_and_is_shared() -> None:
    class Twice(Net):
        def make(self) -> None:
            self.one = CountsItself()
            self.two = self.one

        def forward(self, x: Tensor) -> Tensor:
            return self.two(F.relu(self.f(self.one(x))))

    original, model = build(Twice), build(Twice)
    gm = fg.transform(model, NATIVE, example_inputs=(sample(),))
    assert not difference(original, gm, THRICE)
    assert torch.equal(gm.one.n, torch.full((6,), 6.0))


def test_a_number_that_is_only_written_is_a_warning() -> None:
    make = net(set_sub(rows=None), keep("rows", lambda _, h: h.shape[1]))
    with pytest.warns(fg.FreegradWarning, match=r"lost: sub: attribute 'rows': .* assigns"):
        gm = fg.transform(build(make), NATIVE, example_inputs=(sample(),))
    assert not difference(build(make), gm)
    assert gm.sub.rows is None


# --- what is refused, with the way that takes the model ---


class Helper:
    def __init__(self) -> None:
        self.n, self.last, self.all = 0, torch.zeros(6), [1]


class Slotted:
    __slots__ = ("n",)

    def __init__(self) -> None:
        self.n = 0


def helper(model: Any) -> None:
    model.helper = Helper()


def slotted(model: Any) -> None:
    model.helper = Slotted()


def _count_helper(model: Any, h: Tensor) -> Tensor:
    model.helper.n += 1
    return h.detach() * model.helper.n


def _store_in_helper(model: Any, h: Tensor) -> Tensor:
    model.helper.last = model.helper.last + 1
    return model.helper.last


def _append_in_helper(model: Any, h: Tensor) -> Tensor:
    model.helper.all.append(2)
    return h.detach() * len(model.helper.all)


def _first_call(model: Any, h: Tensor) -> Tensor:
    if model.sub.seen is None:
        model.sub.seen = torch.zeros(6)
    model.sub.seen = model.sub.seen + 1
    return model.sub.seen


def _comes_into_being(model: Any, h: Tensor) -> Tensor:
    model.sub.new = getattr(model.sub, "new", 0) + torch.ones(6)
    return model.sub.new


def _grows(model: Any, h: Tensor) -> Tensor:
    model.sub.seen = torch.cat([model.sub.seen, h.detach()])
    return model.sub.seen.sum(0)


def _grows_and_asks_only_for_the_size(model: Any, h: Tensor) -> Tensor:
    size = model.sub.seen.shape[0]
    model.sub.seen = torch.cat([model.sub.seen, h.detach()])
    return h.detach() * size


def _item(model: Any, h: Tensor) -> Tensor:
    model.sub.d["n"] += 1
    model.sub.d["h"] = model.sub.d["h"] + 1
    return model.sub.d["h"] * model.sub.d["n"]


def _append(model: Any, h: Tensor) -> Tensor:
    model.sub.d.append(h.detach())
    return h.detach() * len(model.sub.d)


def _in_a_list(model: Any, h: Tensor) -> Tensor:
    model.sub.d[0].add_(1)
    return model.sub.d[0]


def _tuple(model: Any, h: Tensor) -> Tensor:
    model.sub.d = (model.sub.d[0] + 1, 3)
    return model.sub.d[0]


def _number(model: Any, h: Tensor) -> Tensor:
    model.sub.d += 1
    return h.detach() * model.sub.d


def _modules_change_places(model: Any, h: Tensor) -> None:
    model.f, model.g = model.g, model.f


def _freeze(model: Any, h: Tensor) -> None:
    model.g.weight.requires_grad_(not model.g.weight.requires_grad)


def _grad(model: Any, h: Tensor) -> None:
    model.g.weight.grad = torch.ones(6, 6)


def _data(model: Any, h: Tensor) -> None:
    model.g.weight.data = model.g.weight.data * 0.5


def _hook_of_a_module(model: Any, h: Tensor) -> None:
    model.g.register_forward_hook(lambda module, inputs, output: output * 2)


REFUSED: dict[str, tuple[Callable[[Any], None], Change]] = {
    "a number in a helper": (helper, _count_helper),
    "a number in a helper with slots": (slotted, _count_helper),
    "a tensor in a helper": (helper, _store_in_helper),
    "a list in a helper": (helper, _append_in_helper),
    "None, then a tensor": (set_sub(seen=None), _first_call),
    "an attribute that comes into being": (sub, _comes_into_being),
    "a tensor that grows": (set_sub(seen=torch.zeros(0, 6)), _grows),
    "a tensor that grows, its size": (
        set_sub(seen=torch.zeros(0, 6)),
        _grows_and_asks_only_for_the_size,
    ),
    "items of a dict": (set_sub(d={"n": 0, "h": torch.ones(6)}), _item),
    "a list": (set_sub(d=[]), _append),
    "a deque": (set_sub(d=deque()), _append),
    "a tensor in a list": (set_sub(d=[torch.zeros(6)]), _in_a_list),
    "a tuple": (set_sub(d=(torch.zeros(6), 3)), _tuple),
    "a number": (set_sub(d=0), _number),
    "submodules": (sub, _modules_change_places),
    "whether a parameter is trained": (sub, _freeze),
    "a gradient": (sub, _grad),
    "the data of a parameter": (sub, _data),
    "hooks of a module": (sub, _hook_of_a_module),
}
# Dynamo says it itself, or takes long; the models are refused here all the same
NOT_RUN = (
    *("a number", "a deque", "a tensor that grows", "hooks of a module", "a list"),
    "whether a parameter is trained",
)


@pytest.mark.sampled(4)
@pytest.mark.parametrize("kind", REFUSED)
def test_what_a_graph_would_lose_is_refused_with_the_way_that_takes_it(kind: str) -> None:
    make = renewed(*REFUSED[kind])
    model = make()
    before = contents(model)
    with (
        nothing_is_left_behind(),
        pytest.raises(fg.CaptureError, match=r"freegrad_fx\.compile") as caught,
    ):
        fg.transform(model, NATIVE, example_inputs=(sample(),))
    assert contents(model) == before
    assert "without example_inputs" not in str(caught.value)
    if kind not in NOT_RUN:
        torch._dynamo.reset()
        found = difference(make(), _compiled(model))
        assert not found


class Renamed(nn.Module):
    """A compiled model with the parameter names of the model."""

    def __init__(self, model: nn.Module, compiled: Any) -> None:
        super().__init__()
        self.__dict__["compiled"] = compiled
        self._parameters, self._buffers = model._parameters, model._buffers
        self._modules = model._modules

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.compiled(*args, **kwargs)


def _compiled(model: nn.Module) -> nn.Module:
    return Renamed(model, fg.compile(model, NATIVE, backend="eager"))


# --- hooks and gradients in the forward ---


class HooksTensor(Net):
    def forward(self, x: Tensor) -> Tensor:
        h = self.f(x)
        h.register_hook(lambda grad: -grad)
        return self.act(h)


class ClipsTheGradient(Net):
    def forward(self, x: Tensor) -> Tensor:
        if self.f.weight._post_accumulate_grad_hooks is None:
            self.f.weight.register_post_accumulate_grad_hook(lambda p: p.grad.clamp_(-1, 1))
        return self.act(self.f(x))


class RetainsGrad(Net):
    def forward(self, x: Tensor) -> Tensor:
        h = self.f(x)
        h.retain_grad()
        return self.act(h)


class HooksNode(Net):
    def forward(self, x: Tensor) -> Tensor:
        h = self.f(x)
        if h.grad_fn is not None:
            h.grad_fn.register_hook(lambda ins, outs: None)
        return self.act(h)


class HooksSeveral(Net):
    def forward(self, x: Tensor) -> Tensor:
        h = self.f(x)
        torch.autograd.graph.register_multi_grad_hook([h], lambda grads: None)
        return self.act(h)


class PacksSaved(Net):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t * 0.5, lambda t: t):
            return self.act(self.f(x)).tanh()


class Backward(Net):
    def forward(self, x: Tensor) -> Tensor:
        self.act(self.g(x)).sum().backward()
        return self.act(self.f(x))


class Reentrant(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.g(checkpoint(self.act, self.f(x), use_reentrant=True))


class Penalty(Net):
    """Symbolic tracing keeps this."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        (grad,) = torch.autograd.grad(self.act(self.f(x)).sum(), x, create_graph=True)
        return grad


HOOKS = {
    HooksTensor: "register_hook",
    ClipsTheGradient: "register_post_accumulate_grad_hook",
    RetainsGrad: "retain_grad",
    HooksNode: "grad_fn",
    HooksSeveral: "register_multi_grad_hook",
    PacksSaved: "saved_tensors_hooks",
    Backward: "backward",
    Reentrant: "use_reentrant",
    Penalty: r"autograd\.grad",
}


@pytest.mark.sampled(4)
@pytest.mark.parametrize("make", HOOKS)
def test_hooks_and_gradients_are_refused_with_the_way_that_takes_them(
    make: type[nn.Module],
) -> None:
    model = build(make)
    with nothing_is_left_behind(), pytest.raises(fg.CaptureError, match=HOOKS[make]) as caught:
        fg.transform(model, NATIVE, example_inputs=(sample(),))
    found = re.search("without example_inputs|freegrad_fx.compile", str(caught.value))
    assert found is not None
    assert (found[0] == "without example_inputs") == (make is Penalty)
    if make is Penalty:
        assert not difference(build(make), fg.transform(build(make), NATIVE))
    elif make in (HooksTensor, PacksSaved, Reentrant):
        torch._dynamo.reset()
        model, grads = build(make), []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for one in (model, _compiled(model)):
                one(sample()).square().sum().backward()
                grads.append([p.grad for p in (*model.f.parameters(), *model.g.parameters())])
                model.zero_grad()
        assert str(grads[0]) == str(grads[1])


def test_other_checkpoints_are_kept() -> None:
    class Checkpointed(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.g(checkpoint(self.act, self.f(x), use_reentrant=False))

    gm = fg.transform(build(Checkpointed), NATIVE, example_inputs=(sample(),))
    assert not difference(build(Checkpointed), gm)


class Pyramid(Counter):
    """Replaces a list at each call, which grows, and a dict of another module."""

    def __init__(self) -> None:
        super().__init__()
        self.levels = [torch.zeros(1)]
        self.found: dict[str, Tensor] = {}

    def build(self, h: Tensor) -> None:
        self.levels = [h]
        for _ in range(2):
            self.levels.append(self.levels[-1].tanh())


class Searches(Net):
    def make(self) -> None:
        self.pyramid = Pyramid()

    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.f(x))
        self.pyramid.build(h)
        self.pyramid.found = {"mean": h.mean(0)}
        out: Tensor = sum(self.pyramid.levels) + self.pyramid.found["mean"]
        return self.g(out)


class ReadsItFirst(Searches):
    def forward(self, x: Tensor) -> Tensor:
        last: Tensor = self.pyramid.levels[-1]
        return super().forward(x) + last.mean()


def test_a_container_that_is_replaced_at_each_call_is_assigned() -> None:
    model = build(Searches)
    before = contents(model)
    gm: Any = fg.transform(model, NATIVE, example_inputs=(sample(),))
    assert contents(model) == before
    for x in (sample(), sample(3)):
        assert torch.equal(gm(x), model(x))
        assert type(gm.pyramid.levels) is list
        for one, other in zip(gm.pyramid.levels, model.pyramid.levels, strict=True):
            assert torch.equal(one, other)
        assert torch.equal(gm.pyramid.found["mean"], model.pyramid.found["mean"])
    assert fg.verify(model, gm, sample()).ok


def test_a_container_that_is_read_before_it_is_replaced_is_refused() -> None:
    with pytest.raises(fg.CaptureError, match=r"changes Python state .*'levels'"):
        fg.transform(build(ReadsItFirst), NATIVE, example_inputs=(sample(),))

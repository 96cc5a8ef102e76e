"""Rules on the parameters of modules that are kept whole: nothing is known of their code but what it computes.

The reference is the model itself: its gradients, times the factor of a rule that multiplies.
"""

from __future__ import annotations

import copy
import functools
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

import freegrad_fx as fg
from freegrad_fx.ops import calls
from parameter_models import floats

X = floats(4, 6)
REVERSE = {"params": fg.rules.reverse(alpha=2.0)}
Gradients = dict[str, Tensor | None]


class Whole(nn.Module):
    """Branches on its data, and so is kept whole."""

    def __init__(self) -> None:
        super().__init__()
        self.gain, self.fc = nn.Parameter(torch.randn(6)), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 1e6 else self.body(x)

    def body(self, x: Tensor) -> Tensor:
        return self.fc(x) * self.gain


class Doubled(nn.Module):
    """A parametrization."""

    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def plain(whole: Whole) -> None:
    pass


def hooked(whole: Whole) -> None:
    whole.register_forward_hook(lambda module, inputs, output: None)


def hooked_inside(whole: Whole) -> None:
    whole.fc.register_forward_hook(lambda module, inputs, output: None)


def parametrized(whole: Whole) -> None:
    parametrize.register_parametrization(whole.fc, "weight", Doubled())


def keeping_a_method(whole: Whole) -> None:
    whole.method = whole.body


KINDS = [plain, hooked, hooked_inside, parametrized, keeping_a_method]
every_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)


def around(whole: Whole, kind: Callable[[Whole], None] = plain) -> nn.Sequential:
    """A model with a module that is kept whole, which something is done to."""
    torch.manual_seed(0)
    kind(whole)
    model = nn.Sequential(nn.Linear(6, 6), whole)
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter.copy_(floats(*parameter.shape) + 0.1 * number)
    return model


def transformed(model: nn.Module, rules: Any = REVERSE, **options: Any) -> nn.Module:
    # Hooks of a module are kept where it is said beforehand that it stays whole
    return fg.transform(model, rules, leaf_modules=[Whole], **options)


def accumulated(model: nn.Module) -> Gradients:
    model.zero_grad()
    model(X).square().sum().backward()
    return {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}


def assert_reversed(gm: nn.Module, model: nn.Module) -> None:
    native, ruled = accumulated(model), accumulated(gm)
    for name, gradient in native.items():
        assert torch.equal(ruled[name], -2 * gradient), name


def assert_reads_binary(model: nn.Module, name: str) -> None:
    """One parameter is read through `binarize`, and has the gradient of the model whose parameter is binary."""
    entry = fg.on(parameter=name, forward="binarize")
    gm = transformed(model, fg.RuleTable([entry.backward("straight_through")]))
    binary = copy.deepcopy(model)
    with torch.no_grad():
        parameter = binary.get_parameter(name)
        parameter.copy_(torch.where(parameter >= 0, 1.0, -1.0))
    assert torch.equal(gm(X), binary(X))
    expected, actual = accumulated(binary), accumulated(gm)
    for key, gradient in expected.items():
        assert torch.equal(actual[key], gradient), key


# --- threads ---


@every_kind
def test_threads_that_run_one_model_at_once_do_not_meet_in_it(kind: Any) -> None:
    model = around(Whole(), kind)
    gm = transformed(model)
    parameters, own = list(model.parameters()), dict(gm.named_parameters())

    def gradients(model: nn.Module) -> tuple[Tensor, ...]:
        return torch.autograd.grad(model(X).square().sum(), parameters)

    native, right = gradients(model), []

    def work() -> None:
        for _ in range(10):
            pairs = zip(gradients(gm), native, strict=True)
            right.append(all(torch.equal(actual, -2 * g) for actual, g in pairs))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert right == [True] * 40
    assert all(p is own[name] for name, p in gm.named_parameters())


class Announced:
    """A lock that tells when a thread has to wait for it."""

    def __init__(self) -> None:
        self.lock, self.waited_for = threading.RLock(), threading.Event()

    def __enter__(self) -> None:
        if not self.lock.acquire(blocking=False):
            self.waited_for.set()
            self.lock.acquire()

    def __exit__(self, *_: object) -> None:
        self.lock.release()


def test_a_module_is_changed_for_one_thread_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second thread begins inside of the forward of the first, which goes on once that waits, or reads as well."""
    lock = Announced()
    monkeypatch.setattr(calls, "_swapping", lock)
    first_is_done = threading.Event()
    threads: list[threading.Thread] = []
    found: dict[str, float] = {}

    def call(name: str, value: float) -> None:
        weight = torch.full((1, 1), value)
        found[name] = calls.call_with(module, {"weight": weight}, torch.ones(1, 1)).item()

    def second_meets_first(module: nn.Module, inputs: Any) -> None:
        if threads:  # this is the second one
            lock.waited_for.set()
            assert first_is_done.wait(60)
            return
        threads.append(threading.Thread(target=call, args=("second", 3.0)))
        threads[0].start()
        assert lock.waited_for.wait(60)

    module = nn.Linear(1, 1, bias=False)
    own = module.weight
    # With hooks it is not called as a view
    module.register_forward_pre_hook(second_meets_first)
    module.register_forward_hook(lambda *_: first_is_done.set())
    call("first", 2.0)
    threads[0].join(60)
    assert found == {"first": 2.0, "second": 3.0}
    assert module.weight is own


def test_an_error_in_the_forward_leaves_the_parameters_where_they_are() -> None:
    class Fails(Whole):
        def body(self, x: Tensor) -> Tensor:
            raise ArithmeticError("no")

    for kind in KINDS:
        gm = transformed(around(Fails(), kind))
        before = dict(gm.named_parameters())
        with pytest.raises(ArithmeticError):
            gm(X)
        assert all(p is before[name] for name, p in gm.named_parameters())


# --- checkpoints inside of the module ---


class Checkpointed(Whole):
    def __init__(self, reentrant: bool, depth: int = 1) -> None:
        super().__init__()
        self.reentrant, self.depth = reentrant, depth

    def body(self, x: Tensor) -> Tensor:
        part: Callable[[Tensor], Tensor] = self.fc
        for _ in range(self.depth):
            part = functools.partial(checkpoint, part, use_reentrant=self.reentrant)
        return part(x) * self.gain


@pytest.mark.sampled(4)
@every_kind
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("depth", [1, 2])
def test_what_a_checkpoint_runs_again_has_the_rules(kind: Any, reentrant: bool, depth: int) -> None:
    model = around(Checkpointed(reentrant, depth), kind)
    assert_reversed(transformed(model), model)


@pytest.mark.sampled(4)
@every_kind
@pytest.mark.parametrize("reentrant", [False, True])
def test_another_thread_may_run_the_backward(kind: Any, reentrant: bool) -> None:
    model = around(Checkpointed(reentrant), kind)
    native = accumulated(model)
    gm = transformed(model)
    model.zero_grad()
    losses = [gm(X).square().sum() for _ in range(8)]

    def work() -> None:
        torch.autograd.backward(losses.pop())
        gm(X)

    threads = [threading.Thread(target=work) for _ in losses]
    for thread in threads:
        thread.start()
        thread.join()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, 8 * -2 * native[name])


@every_kind
def test_threads_that_run_checkpoints_do_not_meet_in_the_model(kind: Any) -> None:
    model = around(Checkpointed(reentrant=False), kind)
    gm = transformed(model)
    parameters = list(model.parameters())
    inputs = [floats(4, 6) * (1 + number) for number in range(4)]

    def gradients(model: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(model(x).square().sum(), parameters)

    native, right = [gradients(model, x) for x in inputs], []

    def work(x: Tensor, expected: tuple[Tensor, ...]) -> None:
        for _ in range(10):
            pairs = zip(gradients(gm, x), expected, strict=True)
            right.append(all(torch.equal(actual, -2 * g) for actual, g in pairs))

    threads = [
        threading.Thread(target=work, args=pair) for pair in zip(inputs, native, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert right == [True] * 40


@every_kind
@pytest.mark.parametrize("reentrant", [False, True])
def test_what_a_checkpoint_runs_again_reads_the_weights_through_their_forward(
    kind: Any, reentrant: bool
) -> None:
    original = kind is parametrized
    name = "1.fc.parametrizations.weight.original" if original else "1.fc.weight"
    assert_reads_binary(around(Checkpointed(reentrant), kind), name)


def test_the_old_checkpoint_cannot_share_a_parameter_with_what_is_outside_of_it() -> None:
    class Twice(Checkpointed):
        def body(self, x: Tensor) -> Tensor:
            return super().body(self.fc(x))

    model = around(Twice(reentrant=False))
    assert_reversed(transformed(model), model)
    # It starts a backward of its own for each of its uses, and the rule wants their sum
    gm = transformed(around(Twice(reentrant=True)))
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        accumulated(gm)


# --- what the module sees of itself ---


@pytest.mark.sampled(3)
@every_kind
def test_a_parameter_is_one_for_code_that_asks(kind: Any) -> None:
    class Asks(Whole):
        def body(self, x: Tensor) -> Tensor:
            factor = 2 if isinstance(self.gain, nn.Parameter) else 3
            assert len(list(self.parameters())) == 3
            return super().body(x) * factor

    model = around(Asks(), kind)
    gm = transformed(model)
    assert torch.equal(gm(X), model(X))
    assert_reversed(gm, model)


@every_kind
def test_what_the_forward_assigns_is_there_afterwards(kind: Any) -> None:
    class Remembers(Whole):
        def __init__(self) -> None:
            super().__init__()
            self.calls, self.seen = 0, []
            self.register_buffer("mean", torch.zeros(6))

        def body(self, x: Tensor) -> Tensor:
            self.calls += 1
            self.seen.append(len(x))
            self.mean.add_(x.detach().mean(0))
            self.cache = super().body(x)
            self.fc.last = self.calls
            return self.cache

    gm = transformed(around(Remembers(), kind))
    whole = gm.get_submodule("1")
    calls = whole.calls
    for call in (1, 2):
        result = gm(X)
        assert whole.calls == whole.fc.last == calls + call
        assert whole.cache is result
        assert whole.seen[-1] == 4
    expected = copy.deepcopy(whole.mean)
    gm(X)
    assert not torch.equal(whole.mean, expected)


@every_kind
def test_what_the_forward_builds_at_its_first_call_is_built_once(kind: Any) -> None:
    class Builds(Whole):
        def __init__(self) -> None:
            super().__init__()
            self.last, self.shift, self.spare = None, None, 0

        def body(self, x: Tensor) -> Tensor:
            if self.last is None:
                self.last = nn.Linear(6, 6)
                self.shift = nn.Parameter(torch.ones(6))
                self.found = None
                del self.spare
            return self.last(super().body(x)) + self.shift

    gm = transformed(around(Builds(), kind))
    whole = gm.get_submodule("1")
    first = gm(X)
    assert torch.equal(gm(X), first)
    assert isinstance(whole.last, nn.Linear)
    assert whole.found is None
    assert not hasattr(whole, "spare")
    first.sum().backward()
    assert torch.equal(whole.shift.grad, torch.full((6,), 4.0))


def test_a_buffer_that_the_forward_replaces_stays_replaced() -> None:
    class Averages(Whole):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mean", torch.zeros(6))

        def body(self, x: Tensor) -> Tensor:
            self.mean = 0.5 * self.mean + x.detach().mean(0)
            return super().body(x) + self.mean

    model, other = around(Averages()), around(Averages())
    gm = transformed(other)
    for _ in range(3):
        assert torch.equal(gm(X), model(X))
    assert torch.equal(gm.get_buffer("1.mean"), model.get_buffer("1.mean"))


WAYS: dict[str, tuple[Callable[[Whole], Any], Callable[[Any, Tensor], Tensor]]] = {
    "attribute": (lambda whole: whole.body, lambda kept, x: kept(x)),
    "list": (lambda whole: [whole.body], lambda kept, x: kept[0](x)),
    "dict": (lambda whole: {"train": whole.body}, lambda kept, x: kept["train"](x)),
    "partial": (lambda whole: functools.partial(whole.body), lambda kept, x: kept(x)),
    "list-of-partials": (lambda whole: [functools.partial(whole.body)], lambda k, x: k[0](x)),
    "long-list": (lambda whole: [None] * 200 + [whole.body], lambda kept, x: kept[-1](x)),
}


class Dispatches(Whole):
    """Calls itself through what it keeps."""

    def __init__(self, keep: Callable[[Whole], Any], call: Callable[..., Tensor]) -> None:
        super().__init__()
        self.call, self.kept = call, keep(self)

    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 1e6 else self.call(self.kept, x)


@pytest.mark.parametrize("way", WAYS)
def test_a_module_may_keep_its_own_methods(way: str) -> None:
    model = around(Dispatches(*WAYS[way]))
    gm = transformed(model)
    assert_reversed(gm, model)
    assert_reversed(copy.deepcopy(gm), model)


BLIND: dict[str, tuple[Callable[[Whole], Any], Callable[[Any, Tensor], Tensor]]] = {
    "closure": (lambda whole: lambda x: whole.body(x), lambda kept, x: kept(x)),
    "default": (lambda whole: lambda x, self=whole: self.body(x), lambda kept, x: kept(x)),
    "closures-in-a-list": (lambda whole: [lambda x: whole.body(x)], lambda kept, x: kept[0](x)),
    "itself-in-a-list": (lambda whole: [whole], lambda kept, x: kept[0].body(x)),
}


@pytest.mark.parametrize("way", BLIND)
def test_a_function_that_keeps_the_original_module_is_a_reported_skip(way: str) -> None:
    model = around(Dispatches(*BLIND[way]))
    native = accumulated(model)
    with pytest.warns(fg.FreegradWarning, match=r"1\.\w+.* keeps its backward: 1 \(Dispatches"):
        gm = transformed(model)
    skipped = [d.site.name for d in fg.report(gm).with_action("skip")]
    assert skipped == ["1.gain", "1.fc.weight", "1.fc.bias"]
    for name, gradient in accumulated(gm).items():
        assert torch.equal(gradient, native[name] * (1 if name in skipped else -2))


class Child(nn.Module):
    """Knows the module that it is a part of, and uses a parameter of it."""

    def __init__(self, parent: nn.Module) -> None:
        super().__init__()
        self.parent, self.fc = [parent], nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) * self.parent[0].gain


class Parent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(floats(6))
        self.child = Child(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.child(x) + self.gain


@pytest.mark.parametrize("example_inputs", [None, (X,)], ids=["symbolic", "export"])
def test_a_part_that_knows_its_whole_is_traced_with_the_parameters_of_both(
    example_inputs: Any,
) -> None:
    model = Parent()
    assert_reversed(fg.transform(model, REVERSE, example_inputs=example_inputs), model)


def test_a_part_that_knows_its_whole_and_is_kept_whole_is_reported() -> None:
    model = Parent()
    with pytest.warns(fg.FreegradWarning, match=r"keeps its backward: child \(Child, kept"):
        gm = fg.transform(model, REVERSE, leaf_modules=[Child])
    assert torch.equal(gm(X), model(X))


def test_hooks_that_know_the_model_hide_no_parameter() -> None:
    whole = Whole()
    whole.register_forward_hook(lambda module, inputs, output: output * whole.gain.numel() / 6)
    model = around(whole)
    gm = transformed(model)
    assert not fg.report(gm).with_action("skip")
    assert_reversed(gm, model)


# --- parametrizations, and TorchScript ---


def test_a_cache_of_parametrized_weights() -> None:
    model = around(Whole(), parametrized)
    gm = transformed(model)
    native = accumulated(model)
    model.zero_grad()
    with parametrize.cached():
        loss = gm(X).square().sum()
        assert torch.equal(loss, model(X).square().sum())
    loss.backward()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.grad, -2 * native[name]), name


class Scripted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x).tanh()


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_part_in_torchscript_has_parameters_like_any_other() -> None:
    model = nn.Sequential(nn.Linear(6, 6), torch.jit.script(Scripted()))
    gm = fg.transform(model, REVERSE)
    native, ruled = accumulated(model), accumulated(gm)
    for name, gradient in native.items():
        # its compiler makes other code of a graph that has been run before
        torch.testing.assert_close(ruled[name], -2 * gradient)


# --- writes ---


def clamps(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        model.gain.clamp_(-0.1, 0.1)
    return Whole.body(model, x)


class Writes(Whole):
    def body(self, x: Tensor) -> Tensor:
        return clamps(self, x)


class Projects(Whole):
    def body(self, x: Tensor) -> Tensor:
        self.gain.data = torch.renorm(self.gain.data[None], p=2, dim=0, maxnorm=0.3)[0]
        return Whole.body(self, x)


@pytest.mark.parametrize("whole", [Writes, Projects])
@every_kind
def test_a_write_into_a_parameter_reaches_it(kind: Any, whole: type[Whole]) -> None:
    model, other = around(whole(), kind), around(whole(), kind)
    gm = transformed(other)
    assert_reversed(gm, model)
    for actual, expected in zip(other.parameters(), model.parameters(), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("whole", [Writes, Projects])
@every_kind
def test_a_write_into_a_parameter_that_is_read_through_a_forward_is_an_error(
    kind: Any, whole: type[Whole]
) -> None:
    entry = fg.on(parameter="*.gain", forward="binarize").backward("straight_through")
    gm = transformed(around(whole(), kind), fg.RuleTable([entry]))
    with pytest.raises(RuntimeError, match=r"writes into its parameter 'gain'.*would be lost"):
        gm(X)


def test_a_rule_that_reads_a_value_which_is_overwritten_is_an_error() -> None:
    gm = transformed(around(Writes()), {"params": fg.rules.rectangular(a=-0.4, b=0.4)})
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        accumulated(gm)


# --- ambient rules ---


@every_kind
def test_ambient_parameters_follow_the_block(kind: Any) -> None:
    model = around(Whole(), kind)
    gm = transformed(model, None, ambient=True)
    native = accumulated(model)
    for name, gradient in accumulated(gm).items():
        assert torch.equal(gradient, native[name]), name
    with fg.use("scale", {"s": 2.0}, scope="params"):
        doubled = accumulated(gm)
        with fg.native():
            switched_off = accumulated(gm)
    for name, gradient in native.items():
        assert torch.equal(doubled[name], 2 * gradient), name
        assert torch.equal(switched_off[name], gradient), name


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_keeps_the_block_that_is_left_before_the_backward(reentrant: bool) -> None:
    for kind in KINDS:
        model = around(Checkpointed(reentrant), kind)
        gm = transformed(model, None, ambient=True)
        native = accumulated(model)
        model.zero_grad()
        with fg.use("scale", {"s": 2.0}, scope="params"):
            loss = gm(X).square().sum()
        loss.backward()
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter.grad, 2 * native[name]), (kind.__name__, name)

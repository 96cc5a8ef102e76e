"""Rules on parameters under accumulation, double backward, torch.func, autocast, copies, threads, sparse gradients."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import freegrad_fx as fg
from parameter_models import CASES, entrywise, floats, indices, whole
from runs import assert_same_forward, run

X = floats(4, 6)
REVERSE = fg.rules.reverse(alpha=2.0)
Gradients = dict[str, Tensor | None]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def first(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else first(output[0])


def accumulated(model: nn.Module, *inputs: Any) -> Gradients:
    model.zero_grad()
    first(model(*inputs)).square().sum().backward()
    return {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}


def assert_scaled(actual: Gradients, native: Gradients, factor: float = -2.0) -> None:
    for name, gradient in native.items():
        if gradient is None:
            assert actual[name] is None, name
        else:
            assert torch.equal(actual[name], factor * gradient), name


# --- a rule acts per forward ---


def clipped(native: Gradients) -> Gradients:
    formula = whole("clip_norm", max_norm=0.1)
    return {name: formula(g, g) for name, g in native.items() if g is not None}


@pytest.mark.parametrize("how", ["two backwards", "two forwards, one backward"])
def test_two_forwards_are_two_gradients_each_with_its_rule(how: str) -> None:
    model = network()
    one, two = clipped(accumulated(model, X)), clipped(accumulated(model, 2 * X))
    gm = fg.transform(model, {"params": fg.rules.clip_norm(max_norm=0.1)})
    model.zero_grad(set_to_none=True)
    losses = [gm(X).square().sum(), gm(2 * X).square().sum()]
    if how == "two backwards":
        for loss in losses:
            loss.backward()
    else:
        sum(losses).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, one[name] + two[name])


def test_a_graph_that_is_gone_through_twice_gives_the_rule_twice() -> None:
    model = network()
    expected = clipped(accumulated(model, X))
    gm = fg.transform(model, {"params": fg.rules.clip_norm(max_norm=0.1)})
    model.zero_grad(set_to_none=False)
    loss = gm(X).square().sum()
    loss.backward(retain_graph=True)
    loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, 2 * expected[name])


# --- double backward and torch.func ---


def test_a_penalty_on_the_input_gradient_reaches_the_parameters_by_the_rule() -> None:
    def penalty(model: nn.Module) -> Gradients:
        model.zero_grad()
        x = X.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        gradient.square().sum().backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    model = network()
    native = penalty(model)
    ruled = penalty(fg.transform(model, {"params": fg.rules.scale(s=4.0)}))
    for name, gradient in native.items():
        torch.testing.assert_close(ruled[name], 4 * gradient)


def test_the_gradient_of_a_gradient_goes_through_the_rule_each_time() -> None:
    def curvature(model: nn.Module) -> tuple[Tensor, ...]:
        parameters = list(model.parameters())
        loss = model(X).square().sum()
        gradients = torch.autograd.grad(loss, parameters, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in gradients), parameters)

    model = network()
    native = curvature(model)
    ruled = curvature(fg.transform(model, {"params": fg.rules.scale(s=4.0)}))
    for actual, expected in zip(ruled, native, strict=True):
        # ∂(4g)²: 4² from the square, 4 more where it reaches the parameter again
        torch.testing.assert_close(actual, 64 * expected)


FUNCTIONAL = [
    "Linear",
    "Conv2d",
    "LayerNorm",
    "tied",
    "shared",
    "loop",
    "kept-whole",
    "weight_norm",
]


@pytest.mark.parametrize("name", FUNCTIONAL)
def test_torch_func_grad_of_other_parameters(name: str) -> None:
    case = CASES[name]
    model = case.build().eval()
    gm = fg.transform(model, {"params": REVERSE})
    given = {n: p.detach() + 0.1 for n, p in model.named_parameters()}

    def gradients(model: nn.Module) -> dict[str, Tensor]:
        def loss(parameters: dict[str, Tensor]) -> Tensor:
            output = torch.func.functional_call(model, parameters, case.inputs)
            return first(output).square().sum()

        return torch.func.grad(loss)(given)

    native, ruled = gradients(model), gradients(gm)
    for key, gradient in native.items():
        assert torch.equal(ruled[key], -2 * gradient), key


def test_vmap_and_jacrev() -> None:
    model = network()
    gm = fg.transform(model, {"params": fg.rules.rectangular(a=-0.2, b=0.2)})
    given = {n: p.detach() + 0.1 for n, p in model.named_parameters()}
    inside = {n: (p >= -0.2) & (p <= 0.2) for n, p in given.items()}

    def of(model: nn.Module) -> Callable[..., Tensor]:
        return lambda parameters, x: torch.func.functional_call(model, parameters, (x,))

    def summed(model: nn.Module) -> Callable[..., Tensor]:
        return lambda parameters, x: of(model)(parameters, x).sum()

    for transform in (
        lambda m: torch.func.vmap(torch.func.grad(summed(m)), (None, 0))(given, X),
        lambda m: torch.func.jacrev(of(m))(given, X),
    ):
        native, ruled = transform(model), transform(gm)
        for name, gradient in native.items():
            torch.testing.assert_close(ruled[name], gradient * inside[name])
    # an ensemble: a batch of parameters
    stacked = {n: torch.stack([p, p / 2]) for n, p in given.items()}
    batched = {n: (p >= -0.2) & (p <= 0.2) for n, p in stacked.items()}
    native, ruled = (
        torch.func.vmap(torch.func.grad(summed(m)), (0, None))(stacked, X) for m in (model, gm)
    )
    for name, gradient in native.items():
        torch.testing.assert_close(ruled[name], gradient * batched[name])


# --- precision ---


@pytest.mark.parametrize("name", ["Linear", "Conv2d", "LayerNorm", "LSTM", "tied"])
def test_autocast(name: str) -> None:
    case = CASES[name]
    model = case.build().eval()
    gm = fg.transform(model, {"params": REVERSE})

    def run(model: nn.Module) -> tuple[Tensor, Gradients]:
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            output = first(model(*case.inputs))
        output.float().square().sum().backward()
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        return output, gradients

    (expected, native), (actual, ruled) = run(model), run(gm)
    assert actual.dtype == expected.dtype
    assert torch.equal(actual, expected)
    for key, gradient in native.items():
        assert ruled[key].dtype == torch.float32
        assert torch.equal(ruled[key], -2 * gradient)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_a_model_that_is_cast_after_the_transform(dtype: torch.dtype) -> None:
    gm = fg.transform(network(), {"params": REVERSE}).to(dtype)
    native = accumulated(network().to(dtype), X.to(dtype))
    ruled = accumulated(gm, X.to(dtype))
    assert all(g.dtype == dtype for g in ruled.values())
    assert_scaled(ruled, native)


class Mixed(nn.Module):
    """Parameters of several dtypes, one of them of integers."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Parameter(torch.randn(6, dtype=torch.float64))
        self.narrow = nn.Parameter(torch.randn(6, dtype=torch.float16))
        self.phases = nn.Parameter(torch.randn(6, dtype=torch.complex64))
        self.steps = nn.Parameter(torch.arange(6), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.wide * self.narrow * self.steps * self.phases).abs()


def test_parameters_of_several_dtypes() -> None:
    model = Mixed()
    gm = fg.transform(model, {"params": REVERSE})
    native, ruled = accumulated(model, X), accumulated(gm, X)
    assert ruled["phases"].dtype == torch.complex64
    assert_scaled(ruled, native)


# --- copies, and changes after the transform ---


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    "name", ["Conv2d", "LSTM", "MultiheadAttention-packed", "tied", "loop", "kept-whole", "lists"]
)
def test_rules_survive_copying_saving_and_a_second_trace(name: str) -> None:
    case = CASES[name]
    model = case.build().eval()
    native = accumulated(model, *case.inputs)
    gm = fg.transform(model, {"params": REVERSE})
    buffer = io.BytesIO()
    torch.save(gm, buffer)
    buffer.seek(0)
    for copied in (
        copy.deepcopy(gm),
        pickle.loads(pickle.dumps(gm)),
        pickle.loads(pickle.dumps(pickle.loads(pickle.dumps(gm)))),
        torch.load(buffer, weights_only=False),
        torch.fx.symbolic_trace(gm),
        fg.transform(gm, {}),
    ):
        assert_scaled(accumulated(copied, *case.inputs), native)
        assert dict(copied.named_parameters()).keys() == dict(model.named_parameters()).keys()


def test_parameters_that_change_after_the_transform() -> None:
    model = network()
    gm = fg.transform(model, {"params": REVERSE})

    def same() -> None:
        assert torch.equal(gm(X), model(X))
        assert_scaled(accumulated(gm, X), accumulated(model, X))

    model[0].weight.data.mul_(2)
    same()
    model[0].weight.data = torch.randn(8, 6)
    same()
    with torch.no_grad():
        model[2].bias.add_(1)
    same()
    gm.load_state_dict(network().state_dict())
    same()
    gm.load_state_dict({n: p.clone() for n, p in network().state_dict().items()}, assign=True)
    assert_scaled(accumulated(gm, X), accumulated(network(), X))


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam, torch.optim.RMSprop])
def test_an_optimizer_of_the_original_trains_the_transformed_model(optimizer: Any) -> None:
    model, by_hand = network(), network()
    trained = optimizer(model.parameters(), lr=0.01)
    expected = optimizer(by_hand.parameters(), lr=0.01)
    gm = fg.transform(model, {"params": REVERSE})
    for _ in range(3):
        trained.zero_grad()
        gm(X).square().sum().backward()
        trained.step()
        expected.zero_grad()
        by_hand(X).square().sum().backward()
        for parameter in by_hand.parameters():
            parameter.grad.mul_(-2)
        expected.step()
    for actual, reference in zip(model.parameters(), by_hand.parameters(), strict=True):
        assert torch.equal(actual, reference)


def test_hooks_of_a_parameter_see_what_the_rule_returned() -> None:
    model = network()
    native = accumulated(model, X)
    seen: list[Tensor] = []
    model[0].weight.register_hook(lambda grad: seen.append(grad.clone()))
    model[0].weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
    accumulated(fg.transform(model, {"params": REVERSE}), X)
    assert [torch.equal(g, -2 * native["0.weight"]) for g in seen] == [True, True]


# --- checkpoints and threads ---


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.first, self.part, self.reentrant = nn.Linear(6, 6), network(), reentrant

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.part, self.first(x), use_reentrant=self.reentrant)


def checkpointed(model: nn.Module, reentrant: bool) -> Gradients:
    model.zero_grad()
    output = checkpoint(model, X.clone().requires_grad_(), use_reentrant=reentrant)
    output.square().sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_around_a_transformed_model(reentrant: bool) -> None:
    model = network()
    native = accumulated(model, X)
    assert_scaled(checkpointed(fg.transform(model, {"params": REVERSE}), reentrant), native)


def test_a_checkpoint_inside_of_a_model_is_traced() -> None:
    model = Checkpointed(reentrant=False)
    native = accumulated(model, X)
    gm = fg.transform(model, {"params": REVERSE})
    assert_scaled(accumulated(gm, X), native)
    assert_scaled(checkpointed(gm, reentrant=False), native)


def test_the_old_checkpoint_is_a_function_that_is_not_looked_into_and_reported() -> None:
    model = Checkpointed(reentrant=True)
    native = accumulated(model, X)
    with pytest.warns(fg.FreegradWarning, match=r"part\.[02]\.\w+ keeps its backward"):
        gm = fg.transform(model, {"params": REVERSE})
    assert any("CheckpointFunction" in note.what for note in fg.report(gm).opaque)
    ruled = accumulated(gm, X)
    for name, gradient in native.items():
        factor = 1 if name.startswith("part") else -2
        assert torch.equal(ruled[name], factor * gradient)


@pytest.mark.parametrize("name", ["Linear", "BatchNorm2d", "LSTM", "MultiheadAttention-packed"])
def test_several_threads_run_one_model_at_once(name: str) -> None:
    case = CASES[name]
    model = case.build().eval()
    gm = fg.transform(model, {"params": REVERSE})
    parameters = list(model.parameters())

    def gradients(model: nn.Module) -> tuple[Tensor, ...]:
        return torch.autograd.grad(first(model(*case.inputs)).square().sum(), parameters)

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


# --- sparse gradients, and forwards that write into a parameter ---

WORDS = indices(3, 5, below=7)
EMBEDDINGS: dict[str, Callable[[bool], nn.Module]] = {
    "Embedding": lambda sparse: nn.Embedding(7, 4, sparse=sparse),
    "EmbeddingBag": lambda sparse: nn.EmbeddingBag(7, 4, mode="sum", sparse=sparse),
}


def lookup(name: str, sparse: bool) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(EMBEDDINGS[name](sparse), nn.Linear(4, 2))


@pytest.mark.parametrize("name", EMBEDDINGS)
@pytest.mark.parametrize(
    ("rule", "factor"),
    [
        ("d(Linear)", 1.0),
        ("straight_through", 1.0),
        (fg.rules.scale(s=4.0), 4.0),
        (REVERSE, -2.0),
        (fg.compose(fg.rules.scale(s=4.0), REVERSE), -8.0),
    ],
    ids=["d(Linear)", "straight_through", "scale", "reverse", "compose"],
)
def test_a_rule_that_can_take_a_sparse_gradient_returns_one(
    name: str, rule: Any, factor: float
) -> None:
    dense = accumulated(lookup(name, sparse=False), WORDS)
    model = lookup(name, sparse=True)
    gm = fg.transform(model, {"params": rule})
    ruled = accumulated(gm, WORDS)
    assert ruled["0.weight"].is_sparse
    assert torch.equal(ruled["0.weight"].to_dense(), factor * dense["0.weight"])
    torch.optim.SparseAdam([model[0].weight]).step()


@pytest.mark.parametrize("name", EMBEDDINGS)
@pytest.mark.parametrize("rule", ["rectangular", "clip_norm", "noise", "full_jam", "clip_value"])
def test_a_rule_that_cannot_is_refused_when_planned(name: str, rule: str) -> None:
    with pytest.raises(fg.PlanError, match=r"cannot take the sparse gradient of site 0\.weight"):
        fg.explain(lookup(name, sparse=True), {"params": rule})


class SparseByFunction(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(7, 4))

    def forward(self, words: Tensor) -> Tensor:
        return F.embedding(words, self.table, sparse=True)


def test_where_no_plan_could_see_it_the_backward_says_so() -> None:
    gm = fg.transform(SparseByFunction(), {"params": "rectangular"})
    with pytest.raises(fg.RuleError, match=r"site 'table', which has the layout torch\.sparse_coo"):
        accumulated(gm, WORDS)
    model = SparseByFunction()
    gm = fg.transform(model, {"params": REVERSE})
    native, ruled = accumulated(model, WORDS)["table"], accumulated(gm, WORDS)["table"]
    assert ruled.is_sparse
    assert torch.equal(ruled.to_dense(), -2 * native.to_dense())


def test_a_rule_is_given_a_sparse_gradient_with_one_entry_for_each_row() -> None:
    """A row that is looked up twice has a gradient of two entries, and a clipped sum is no sum of clipped ones."""

    @fg.register("clip_rows", sparse=True)
    def clip_rows(grad: Tensor) -> Tensor:
        if not grad.is_sparse:
            return grad.clamp(-1, 1)
        values = grad._values().clamp(-1, 1)
        return torch.sparse_coo_tensor(grad._indices(), values, grad.shape, check_invariants=False)

    found = []
    for sparse in (False, True):
        torch.manual_seed(0)
        gm = fg.transform(nn.Embedding(5, 2, sparse=sparse), {"params": "clip_rows"})
        (gm(torch.tensor([3, 1, 3])) * 0.75).sum().backward()
        found.append(gm.weight.grad.to_dense())
    assert torch.equal(*found)
    assert found[0][3].tolist() == [1, 1]


class Lookup(nn.Module):
    def __init__(self, by_module: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4, max_norm=0.5)
        self.by_module = by_module

    def forward(self, words: Tensor) -> Tensor:
        if self.by_module:
            return self.embed(words)
        return F.embedding(words, self.embed.weight, max_norm=0.5)


class Clamps(nn.Module):
    """Holds its weight in bounds, without gradients and through `.data`."""

    def __init__(self, data: bool) -> None:
        super().__init__()
        self.weight, self.data = nn.Parameter(torch.randn(6)), data

    def forward(self, x: Tensor) -> Tensor:
        if self.data:
            self.weight.data.clamp_(-0.5, 0.5)
        else:
            with torch.no_grad():
                self.weight.mul_(0.5)
        return x * self.weight


@pytest.mark.parametrize(
    ("make", "inputs"),
    [
        (lambda: Lookup(by_module=True), WORDS),
        (lambda: Lookup(by_module=False), WORDS),
        (lambda: Clamps(data=True), X),
        (lambda: Clamps(data=False), X),
    ],
    ids=["Embedding", "F.embedding", "data", "no_grad"],
)
def test_a_rule_reads_the_value_at_the_beginning_of_the_forward(make: Any, inputs: Tensor) -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return make()

    model, written = build(), build()
    values = {name: p.detach().clone() for name, p in model.named_parameters()}
    native = accumulated(written, inputs)
    ruled = accumulated(
        fg.transform(model, {"params": fg.rules.rectangular(a=-0.4, b=0.4)}), inputs
    )
    formula = entrywise("rectangular", a=-0.4, b=0.4)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, written.get_parameter(name))
        assert not torch.equal(parameter, values[name])
        assert torch.equal(ruled[name], formula(native[name], values[name]))


def test_compositions_on_a_parameter_go_from_the_first_rule_to_the_last() -> None:
    model = network()
    parts = (
        fg.rules.clip_value(max_value=0.1),
        fg.rules.scale(s=4.0),
        fg.rules.rectangular(a=-0.3, b=0.3),
    )
    gm = fg.transform(model, {"params": fg.compose(*parts)})
    native, ruled = run(model, X), run(gm, X)
    assert_same_forward(ruled, native)
    for name, parameter in model.named_parameters():
        inside = (parameter >= -0.3) & (parameter <= 0.3)
        expected = 4 * native.gradients[name].clamp(-0.1, 0.1) * inside
        assert torch.equal(ruled.gradients[name], expected)


def test_batch_norm_keeps_its_statistics_over_several_calls() -> None:
    for name in ("BatchNorm2d", "BatchNorm1d-momentum-none", "InstanceNorm1d-statistics"):
        case = CASES[name]
        model, other = case.build(), case.build()
        gm = fg.transform(other, {"params": REVERSE})
        for _ in range(3):
            model(*case.inputs)
            gm(*case.inputs)
        expected = dict(model.named_buffers())
        assert expected
        for key, buffer in gm.named_buffers():
            assert torch.equal(buffer, expected[key]), key

"""Rules that answer for several values: operands of an operation, and parameters of the rule."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import freegrad_fx as fg
from freegrad_fx.core import rule as registry
from freegrad_fx.errors import RuleError
from freegrad_fx.ops import decoupled, stop_gradient


@pytest.fixture(autouse=True)
def own_rules() -> Iterator[None]:
    before = dict(registry._registry)
    yield
    registry._registry.clear()
    registry._registry.update(before)


OPERATIONS: dict[str, tuple[Callable[..., Tensor], dict[str, tuple[int, ...]]]] = {
    "linear": (F.linear, {"x": (2, 5, 3), "weight": (4, 3), "bias": (4,)}),
    "mul": (torch.mul, {"a": (4, 1, 3), "b": (5, 1)}),
    "matmul": (torch.matmul, {"a": (2, 4, 3), "b": (3, 5)}),
}


def operands_of(name: str, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    torch.manual_seed(0)
    shapes = OPERATIONS[name][1]
    return {n: torch.randn(s, dtype=dtype).requires_grad_() for n, s in shapes.items()}


def answering(name: str, *answers: str) -> Any:
    """A rule that answers for operands of an operation with their native gradients; for all if none is given."""
    answers = answers or tuple(OPERATIONS[name][1])

    def native_of_three(grad, x, weight, bias, *, f):
        return {n: f.gradient(n, grad) for n in answers}

    def native_of_two(grad, a, b, *, f):
        return {n: f.gradient(n, grad) for n in answers}

    written = native_of_three if name == "linear" else native_of_two
    return fg.register("natively", answers=answers, overwrite=True)(written)


def decouple(name: str, rule: Any, operands: dict[str, Tensor], **parameters: Any) -> Tensor:
    """Apply an operation with a rule."""
    answers = rule.declaration.answers or (next(iter(operands)),)
    given = {n: stop_gradient(v) if n in answers else v for n, v in operands.items()}
    y = OPERATIONS[name][0](*given.values())
    first, *others = operands
    further = {n: operands[n] for n in others}
    return decoupled(y, operands[first], rule=rule, operation=name, operands=further, **parameters)


def gradients(out: Tensor, operands: dict[str, Tensor]) -> list[Tensor]:
    weights = torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view_as(out)
    return list(torch.autograd.grad((out * weights).sum(), tuple(operands.values())))


def same(found: list[Tensor], expected: list[Tensor]) -> bool:
    return all(map(torch.equal, found, expected))


@pytest.mark.parametrize("name", OPERATIONS)
def test_native_answers_are_bit_identical(name: str) -> None:
    operands = operands_of(name)
    expected = gradients(OPERATIONS[name][0](*operands.values()), operands)
    names = tuple(operands)
    for answers in (names, names[:1], names[1:]):
        out = decouple(name, answering(name, *answers), operands)
        assert torch.equal(out, OPERATIONS[name][0](*operands.values()))
        assert same(gradients(out, operands), expected)


@pytest.mark.parametrize("name", OPERATIONS)
def test_native_answers_are_bit_identical_under_autocast(name: str) -> None:
    operands = operands_of(name)
    rule = answering(name)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        native = OPERATIONS[name][0](*operands.values())
        out = decouple(name, rule, operands)
    assert same(gradients(out, operands), gradients(native, operands))


@pytest.mark.parametrize("name", OPERATIONS)
def test_second_derivatives_are_those_of_the_rule(name: str) -> None:
    operands = operands_of(name, torch.float64)

    def second(out: Tensor) -> list[Tensor]:
        first = torch.autograd.grad(out.sin().sum(), tuple(operands.values()), create_graph=True)
        return gradients(torch.cat([g.cos().flatten() for g in first]), operands)

    native = second(OPERATIONS[name][0](*operands.values()))
    found = second(decouple(name, answering(name), operands))
    assert all(map(torch.allclose, found, native))


@pytest.mark.parametrize("name", OPERATIONS)
def test_transforms_of_torch_func_use_the_rule(name: str) -> None:
    operands = {n: v.detach() for n, v in operands_of(name).items()}
    rule = answering(name)
    first, *others = operands.values()
    batch = torch.stack([first, first + 1])

    def loss(native: bool) -> Callable[..., Tensor]:
        def of(*values: Tensor) -> Tensor:
            given = dict(zip(operands, values, strict=True))
            out = OPERATIONS[name][0](*values) if native else decouple(name, rule, given)
            return out.sin().sum()

        return of

    places = tuple(range(len(operands)))
    found, expected = (
        torch.func.vmap(
            torch.func.grad(loss(native), argnums=places), in_dims=(0, *[None] * len(others))
        )(batch, *others)
        for native in (False, True)
    )
    assert all(map(torch.allclose, found, expected))


@pytest.mark.parametrize("name", OPERATIONS)
def test_compiled_equals_eager(name: str) -> None:
    operands = operands_of(name)
    rule = answering(name)
    compiled = torch.compile(decouple, backend="aot_eager", fullgraph=True)
    expected = gradients(decouple(name, rule, operands), operands)
    assert same(gradients(compiled(name, rule, operands), operands), expected)
    detached = {n: v.detach() for n, v in operands.items()}
    assert torch.equal(compiled(name, rule, detached), OPERATIONS[name][0](*detached.values()))


def test_operands_without_an_answer_keep_their_native_gradient() -> None:
    @fg.register("feedback")
    def feedback(grad, x, weight, *, f, matrix: Tensor):
        return {"x": f.gradient("x", grad, weight=matrix)}

    operands = operands_of("linear")
    matrix = torch.randn(4, 3)
    native = gradients(F.linear(*operands.values()), operands)
    through = gradients(F.linear(operands["x"], matrix, operands["bias"]), {"x": operands["x"]})
    found = gradients(decouple("linear", feedback, operands, matrix=matrix), operands)
    assert same(found, [*through, *native[1:]])


def test_only_what_is_needed_is_computed() -> None:
    computed: list[str] = []

    @fg.register("lazy", answers=("x", "weight"))
    def lazy(grad, x, weight, *, f):
        def of(name: str) -> Any:
            return lambda: (computed.append(name), f.gradient(name, grad))[1]

        return {"x": of("x"), "weight": of("weight")}

    operands = operands_of("linear")
    operands["weight"].requires_grad_(False)
    decouple("linear", lazy, operands).sum().backward()
    assert computed == ["x"]
    computed.clear()
    operands["x"].requires_grad_(False)
    decouple("linear", lazy, operands).sum().backward()
    assert computed == []
    with torch.no_grad():
        assert decouple("linear", lazy, operands).grad_fn is None


def test_only_what_the_signature_names_is_saved() -> None:
    @fg.register("reads_weight", answers="x")
    def reads_weight(grad, weight):
        return grad @ weight

    saved: list[Tensor] = []
    operands = operands_of("linear")
    operands["weight"].requires_grad_(False)
    y = F.linear(*[stop_gradient(v) for v in operands.values()])
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        out = decoupled(
            y,
            operands["x"],
            rule=reads_weight,
            operation="linear",
            operands={"weight": operands["weight"]},
        )
    assert [t.shape for t in saved] == [(4, 3)]
    out.sum().backward()
    assert torch.equal(operands["x"].grad, torch.ones(2, 5, 4) @ operands["weight"])


# --- learnt parameters ---


def register_shifted() -> tuple[Any, Any]:
    """y = relu(x − t): the rule learns t, in a dict and by a function."""

    @fg.register("shifted_dict", learns="t")
    def shifted_dict(grad, x, *, t: float = 0.0):
        inside = grad * (x > t)
        return {"x": inside, "t": -inside}

    def by_t(grad, x, *, t):
        return -grad * (x > t)

    @fg.register("shifted_function", learns={"t": by_t})
    def shifted_function(grad, x, *, t: float = 0.0):
        return grad * (x > t)

    return shifted_dict, shifted_function


def shifted(x: Tensor, t: Any, rule: Any) -> Tensor:
    y = torch.relu(stop_gradient(x) - (stop_gradient(t) if isinstance(t, Tensor) else t))
    return decoupled(y, x, rule=rule, t=t)


@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 1), (2, 3)])
def test_learnt_parameters_get_the_gradient_that_autograd_computes(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 2, 3, requires_grad=True)
    t = torch.randn(shape, requires_grad=True)
    both = {"x": x, "t": t}
    expected = gradients(torch.relu(x - t), both)
    for rule in register_shifted():
        found = gradients(shifted(x, t, rule), both)
        assert torch.equal(found[0], expected[0])
        assert torch.allclose(found[1], expected[1])
        compiled = torch.compile(shifted, backend="aot_eager", fullgraph=True)
        assert same(gradients(compiled(x, t, rule), both), found)


def test_a_parameter_without_a_gradient_takes_the_way_of_one_operand() -> None:
    x = torch.randn(5, requires_grad=True)
    of_dict, of_function = register_shifted()
    for t in (0.25, torch.tensor(0.25)):
        found = [gradients(shifted(x, t, r), {"x": x})[0] for r in (of_dict, of_function)]
        assert same(found, [gradients(torch.relu(x - t), {"x": x})[0]] * 2)
    out = shifted(x, torch.tensor(0.25), of_function)
    assert type(out.grad_fn).__name__ == "_DecoupledBackward"


def test_learnt_parameters_in_transforms_of_torch_func() -> None:
    x, t = torch.randn(6, 3), torch.randn(3)

    def results(rule: Any) -> list[Tensor]:
        def loss(x: Tensor, t: Tensor) -> Tensor:
            out = torch.relu(x - t) if rule is None else shifted(x, t, rule)
            return out.square().sum()

        both = torch.func.grad(loss, argnums=(0, 1))
        shared = torch.func.vmap(both, in_dims=(0, None))
        return [*both(x, t), *shared(x, t), *torch.func.vmap(both)(x, t.expand(6, 3))]

    for rule in register_shifted():
        assert all(map(torch.allclose, results(rule), results(None)))


def test_second_derivatives_of_learnt_parameters() -> None:
    @fg.register("cubic", learns="t")
    def cubic(grad, x, *, t: float = 1.0):
        return {"x": grad * t * 3 * x**2, "t": grad * x**3}

    x = torch.randn(4, dtype=torch.float64, requires_grad=True)
    t = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)

    def of(x: Tensor, t: Tensor) -> Tensor:
        y = stop_gradient(t) * stop_gradient(x) ** 3
        return decoupled(y, x, rule=cubic, t=t)

    assert torch.autograd.gradcheck(of, (x, t))
    assert torch.autograd.gradgradcheck(of, (x, t))


def test_rules_with_the_same_formula_and_other_answers_are_told_apart_by_caches() -> None:
    def formula(grad, a, b):
        return {"a": grad * b} if b.dim() else {"b": grad * a}

    tokens = {fg.register("f", answers=n, overwrite=True)(formula).declaration.token for n in "ab"}
    assert len(tokens) == 2
    assert "" not in tokens


# --- errors ---


def test_a_wrong_declaration_is_refused() -> None:
    def formula(grad, x, weight, *, f, t: float = 1.0):
        return {}

    def one(grad, x, *, t: float = 1.0):
        return grad

    with pytest.raises(RuleError, match=r"operand in answers= of rule 'r': 'wieght'.*'weight'"):
        fg.register("r", answers=("wieght",))(formula)
    with pytest.raises(RuleError, match="parameter in learns= of rule 'r': 's'"):
        fg.register("r", learns="s")(formula)
    with pytest.raises(RuleError, match="must have the arguments of the formula"):
        fg.register("r", learns={"t": lambda grad: grad})(one)
    with pytest.raises(RuleError, match=r"learns=\('t',\)"):
        fg.register("r", learns={"t": 1.0})(one)  # type: ignore[dict-item]
    with pytest.raises(RuleError, match=r"with fast=.*returns the gradient of x alone"):
        fg.register("r", learns="t", fast=lambda grad, x, *, t=1.0: grad)(one)
    with pytest.raises(RuleError, match="mask=, which is for a formula of `x` alone"):
        fg.register("r", mask=lambda x: x > 0)(lambda grad, mask, weight: grad)
    with pytest.raises(RuleError, match="unknown argument 'wait'"):
        fg.register("r")(lambda grad, x, wait: grad)
    with pytest.raises(RuleError, match="named 'f', which is reserved"):
        fg.register("r")(lambda grad, *, f=1.0: grad)


def test_a_wrong_answer_is_refused() -> None:
    operands = operands_of("linear")

    def answer(value: Any, *reads: str, answers: tuple[str, ...] = ("x", "weight")) -> None:
        rule = fg.register("r", answers=answers, overwrite=True)(
            lambda grad, x, weight, *, f: value(grad, f)
        )
        decouple("linear", rule, operands, site="fc:linear[0]").sum().backward()

    with pytest.raises(RuleError, match=r"no gradient for 'weight', only for: x.*answers="):
        answer(lambda grad, f: {"x": f.gradient("x", grad)})
    with pytest.raises(RuleError, match="a gradient for 'bias', for which it is not registered"):
        answer(lambda grad, f: {"bias": grad})
    with pytest.raises(RuleError, match=r"of shape \(2, 5, 3\) for 'weight' of shape \(4, 3\)"):
        answer(lambda grad, f: dict.fromkeys(("x", "weight"), f.gradient("x", grad)))
    with pytest.raises(RuleError, match=r"returned int, not a tensor.*gradient for x"):
        answer(lambda grad, f: {"x": 1}, answers=("x",))
    with pytest.raises(RuleError, match="without its operand 'bias'"):
        answer(lambda grad, f: f(), answers=("x",))
    with pytest.raises(RuleError, match=r"operand of 'linear' in rule .r.*.wight'.*'weight'"):
        answer(lambda grad, f: f.gradient("x", grad, wight=grad), answers=("x",))


def test_an_operation_without_the_operands_is_refused() -> None:
    rule = answering("linear")
    x = torch.randn(3, requires_grad=True)
    with pytest.raises(
        RuleError, match=r"needs the operand 'weight', but the operation, 'relu',.*only: x"
    ):
        decoupled(torch.relu(stop_gradient(x)), x, rule=rule, operation="relu")
    half = fg.register("half by f")(lambda grad, x, *, f: f.gradient("x", grad) / 2)
    out = decoupled(torch.relu(stop_gradient(x)), x, rule=half, operation="relu")
    assert torch.equal(torch.autograd.grad(out.sum(), x)[0], (x > 0) / 2)
    with pytest.raises(RuleError, match="uses `f`, but the operation of this site is not known"):
        decoupled(torch.relu(stop_gradient(x)), x, rule=half).sum().backward()


def test_rules_of_several_operands_are_refused_without_an_operation() -> None:
    half = fg.register("half by f")(lambda grad, x, *, f: f.gradient("x", grad) / 2)
    model = torch.nn.Sequential(torch.nn.ReLU())
    with pytest.raises(fg.PlanError, match=r"needs the operand 'weight'.*at site 0:relu\[0\]"):
        fg.transform(model, {"relu": answering("linear")})
    with pytest.raises(RuleError, match="needs `f`"), fg.use(half):
        pass


def test_products_of_complex_numbers_are_those_of_autograd() -> None:
    @fg.register("test: native products", answers=("x", "weight"), linear=True)
    def native(grad: Tensor, x: Tensor, weight: Tensor, *, f: Any) -> Any:
        """the native gradients"""
        return {"x": f.gradient("x", grad), "weight": f.gradient("weight", grad)}

    x = torch.randn(4, 3, dtype=torch.complex128, requires_grad=True)
    model = torch.nn.Linear(3, 2, dtype=torch.complex128)
    grad = torch.randn(4, 2, dtype=torch.complex128)
    with fg.use({"linear": native}):
        y = model(x)
    found = torch.autograd.grad(y, [x, model.weight], grad)
    expected = torch.autograd.grad(model(x), [x, model.weight], grad)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_the_gradient_of_an_answered_weight_can_be_batched() -> None:
    layer = torch.nn.Linear(3, 2)
    gm = fg.transform(torch.nn.Sequential(layer), {"linear": fg.rules.int8_backward})
    for shape in ((4, 3), (2, 4, 3)):
        x = torch.randn(shape, requires_grad=True)
        y, wanted = gm(x), [x, layer.weight]
        grads = torch.randn(5, *y.shape)
        batched = torch.autograd.grad(y, wanted, grads, is_grads_batched=True, retain_graph=True)
        one_by_one = [torch.autograd.grad(y, wanted, g, retain_graph=True) for g in grads]
        expected = [torch.stack(found) for found in zip(*one_by_one, strict=True)]
        torch.testing.assert_close(list(batched), expected)


@pytest.mark.parametrize("layer", [torch.nn.Conv1d, torch.nn.Conv2d])
def test_complex_convolutions_have_their_native_gradient(layer: Any) -> None:
    name = "native_of_both"

    @fg.register(name, answers=("x", "weight"), kinds="operation")
    def native_of_both(grad: Tensor, x: Tensor, weight: Tensor, *, f: Any) -> Any:
        return {at: f.gradient(at, grad) for at in ("x", "weight")}

    conv = layer(2, 3, 2, dtype=torch.complex64)
    gm = fg.transform(torch.nn.Sequential(conv), {"conv": name})
    x = torch.randn(2, 2, *[5] * (conv.weight.dim() - 2), dtype=torch.complex64, requires_grad=True)
    wanted = [x, conv.weight]
    found = torch.autograd.grad(gm(x).abs().sum(), wanted)
    torch.testing.assert_close(found, torch.autograd.grad(conv(x).abs().sum(), wanted))

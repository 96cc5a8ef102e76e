"""`vjp` and `jvp` under rules: beside torch's own products, beside Jacobians written out, and what has none."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import freegrad_fx as fg
from freegrad_fx.functional import jvp, vjp

W = torch.randn(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
V = torch.randn(3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
X = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
DX = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
act = fg.Activation("Tanh")


def f(x: Tensor) -> Tensor:
    return act(x @ W.T) @ W


LINEAR: dict[str, tuple[object, Callable[[Tensor], Tensor]]] = {
    "rectangular": ("rectangular", lambda z: ((z >= -0.5) & (z <= 0.5)).double()),
    "triangular": (fg.rules.triangular(width=2.0), lambda z: (1 - z.abs() / 2).clamp(min=0)),
    "scale": (fg.rules.scale(s=3.0), lambda z: torch.full_like(z, 3.0)),
    "reverse": ("reverse", lambda z: torch.full_like(z, -1.0)),
    "fast_sigmoid": ("fast_sigmoid", lambda z: (1 + 25 * z.abs()) ** -2),
    "composition": (
        fg.compose(fg.rules.scale(s=3.0), "d(ReLU)"),
        lambda z: 3.0 * (z > 0),
    ),
}


def jacobian(slope: Callable[[Tensor], Tensor]) -> Tensor:
    """Of f, for each row of X, with `slope` as the derivative of the activation: shape (3, 5, 5)."""
    return torch.einsum("ji,nj,jk->nik", W, slope(X @ W.T), W)


@pytest.mark.parametrize("name", LINEAR)
def test_both_products_are_those_with_the_jacobian_that_the_rule_makes(name: str) -> None:
    rule, slope = LINEAR[name]
    matrix = jacobian(slope)
    y, pull = vjp(f, X, rule=rule)  # type: ignore[arg-type]
    torch.testing.assert_close(y, (X @ W.T).tanh() @ W)
    for v in (DX, X):
        torch.testing.assert_close(pull(v), torch.einsum("ni,nik->nk", v, matrix))
    torch.testing.assert_close(jvp(f, X, DX, rule=rule), torch.einsum("nik,nk->ni", matrix, DX))  # type: ignore[arg-type]


def test_without_a_rule_they_are_torchs_own() -> None:
    torch.testing.assert_close(jvp(f, X, DX), torch.func.jvp(f, (X,), (DX,))[1])
    y, pull = vjp(f, X)
    expected, theirs = torch.func.vjp(f, X)
    assert torch.equal(y, expected)
    torch.testing.assert_close(pull(DX), theirs(DX)[0])


def test_the_rules_in_force_act_tables_and_blocks_too() -> None:
    net = nn.Sequential(nn.Tanh())
    gm = fg.transform(net, "rectangular")
    window = ((X >= -0.5) & (X <= 0.5)).double()
    assert torch.equal(jvp(gm, X, DX), window * DX)
    with fg.use("scale", {"s": 3.0}):
        assert torch.equal(jvp(fg.transform(net), X, DX), 3 * DX)
        assert torch.equal(vjp(fg.transform(net), X)[1](DX), 3 * DX)
        assert torch.equal(jvp(act, X, DX, rule="scale", params={"s": 5.0}), 5 * DX)
    with torch.no_grad():
        assert torch.equal(jvp(gm, X, DX), window * DX)


def test_a_rule_that_couples_entries_is_transposed() -> None:
    fg.register("test: shifted")(lambda grad: grad.roll(1, -1) * torch.arange(1, 6))
    shift = torch.diag(torch.arange(1.0, 6.0)).double() @ torch.eye(5).double().roll(1, 0)
    torch.testing.assert_close(vjp(act, X, rule="test: shifted")[1](DX), DX @ shift.T)
    torch.testing.assert_close(jvp(act, X, DX, rule="test: shifted"), DX @ shift)


def test_what_a_rule_draws_is_drawn_once_for_the_whole_product() -> None:
    torch.manual_seed(7)
    drawn = torch.rand_like(X)
    torch.manual_seed(7)
    assert torch.equal(jvp(act, X, DX, rule="full_jam"), drawn * DX)
    after = torch.rand(())
    torch.manual_seed(7)
    torch.rand_like(X)
    assert torch.equal(
        torch.rand(()), after
    )  # to see that it is linear leaves no trace in the generator


NOT_LINEAR: dict[str, Callable[[Tensor], Tensor]] = {
    "clips values": lambda grad: grad.clamp(-1, 1),
    "clips values, far out": lambda grad: grad.clamp(-1e9, 1e9),
    "clips the norm": lambda grad: grad * (1 / grad.norm()).clamp(max=1),
    "normalises": lambda grad: grad / (grad.abs().mean() + 1e-12),
    "adds noise": lambda grad: grad + 0.01 * torch.randn_like(grad),
    "adds a constant": lambda grad: grad + 1e-3,
    "takes the sign": lambda grad: grad.sign(),
    "rounds": lambda grad: (grad * 8).round() / 8,
    "rounds finely": lambda grad: (grad * 1e6).round() / 1e6,
    "keeps the largest": lambda grad: grad * (grad.abs() >= grad.abs().amax(-1, keepdim=True)),
    "is positive": lambda grad: grad.relu(),
    "squares": lambda grad: grad * grad,
    "detaches": lambda grad: grad.detach() ** 2,
}


@pytest.mark.sampled(4)
@pytest.mark.parametrize("name", NOT_LINEAR)
def test_a_rule_that_is_not_linear_has_a_vjp_and_no_jvp(name: str) -> None:
    function = NOT_LINEAR[name]
    fg.register("test: not linear")(function)
    torch.manual_seed(0)
    pulled = vjp(act, X, rule="test: not linear")[1](DX)
    torch.manual_seed(0)
    assert torch.equal(pulled, function(DX))
    with pytest.raises(fg.RuleError, match="not linear in the gradient"):
        jvp(act, X, DX, rule="test: not linear")
    with pytest.raises(fg.RuleError, match=r"at site '0:tanh\[0\]' is not linear"):
        jvp(fg.transform(nn.Sequential(nn.Tanh()), "test: not linear"), X, DX)


def test_the_built_in_rules_that_clip_have_no_jvp() -> None:
    for rule in ("clip_norm", "clip_value", "noise", "guided"):
        with pytest.raises(fg.RuleError, match=f"rule {rule!r} at site .* not linear"):
            jvp(f, X, DX, rule=rule)


def test_a_rule_that_cannot_be_followed_is_not_taken_for_linear() -> None:
    fg.register("test: branches")(lambda grad: grad * (2 if grad.sum() > 0 else 1))
    with pytest.raises(fg.RuleError, match="cannot determine"):
        jvp(act, X, DX, rule="test: branches")


def test_what_hides_rules_is_refused() -> None:
    for hiding in (
        torch.compile(act, backend="aot_eager"),
        torch.vmap(act),
        lambda x: checkpoint(act, x, use_reentrant=True),
    ):
        with pytest.raises(RuntimeError, match="cannot find the rules"):
            jvp(hiding, X, DX, rule="scale")


def test_a_checkpoint_hides_nothing() -> None:
    found = jvp(
        lambda x: checkpoint(act, x, use_reentrant=False), X, DX, rule="scale", params={"s": 3.0}
    )
    assert torch.equal(found, 3 * DX)


def test_functions_that_do_not_depend_on_their_argument() -> None:
    for constant in (lambda x: torch.ones(2), lambda x: W.clone().requires_grad_() * 1):
        y, pull = vjp(constant, X)
        assert not pull(torch.ones_like(y)).any()
        assert jvp(constant, X, DX).eq(torch.zeros_like(y)).all()


def test_mistakes_are_named() -> None:
    with pytest.raises(TypeError, match="returned tuple"):
        vjp(lambda x: (x, x), X)  # type: ignore[arg-type, return-value]
    with pytest.raises(fg.RuleError, match="params requires a rule"):
        jvp(act, X, DX, params={"s": 1.0})
    with pytest.raises(fg.RuleError, match="Did you mean 'scale'"):
        vjp(act, X, rule="scael")


def test_jvp_sees_rules_that_learn() -> None:
    def by_t(grad: Tensor, x: Tensor, *, t: float) -> Tensor:
        return grad * x

    for name, formula in {
        "scaled": lambda grad, x, *, t: grad * t,
        "clamped": lambda grad, x, *, t: grad.clamp(-0.1, 0.1) * t,
    }.items():
        fg.register(f"test: {name}, learnt", learns={"t": by_t}, overwrite=True)(formula)
    x, v = torch.randn(3), torch.randn(3)
    for t in (2.0, torch.tensor(2.0, requires_grad=True)):
        found = fg.functional.jvp(
            fg.Activation("relu"), x, v, rule="test: scaled, learnt", params={"t": t}
        )
        assert torch.equal(found, 2 * v)
        with pytest.raises(fg.RuleError, match=r"'test: clamped, learnt'.* is not linear"):
            fg.functional.jvp(
                fg.Activation("relu"), x, v, rule="test: clamped, learnt", params={"t": t}
            )

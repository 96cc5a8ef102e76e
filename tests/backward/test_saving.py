"""What is saved for the backward: x, its mask, or the output that has the same mask. The gradient is the same."""

from __future__ import annotations

import copy
import functools
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import freegrad_fx as fg
import reference
from built_in import MASKED
from freegrad_fx.core.packing import pack
from freegrad_fx.ops import decoupled, stop_gradient
from freegrad_fx.rules import masks
from freegrad_fx.rules.masks import positive

WINDOWS = {"rectangular": {"a": -0.25, "b": 0.5}, "rectangular_jam": {"a": -0.25, "b": 0.5}}
X = torch.tensor([-math.inf, -2.0, -0.5, -0.25, -0.0, 0.0, 0.25, 0.5, 1.0, 2.0, math.inf, math.nan])


def saved(function: Callable[[Tensor], Any], x: Tensor) -> list[Tensor]:
    """What a function saves beside its argument, one tensor for each piece of memory."""
    x = x.detach().requires_grad_() * 1
    found: dict[int, Tensor] = {x.untyped_storage().data_ptr(): x}

    def pack(tensor: Tensor) -> Tensor:
        found.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = function(x)
    del y
    return list(found.values())[1:]


def around(rule: fg.Rule, op: Callable[[Tensor], Tensor] = torch.tanh) -> fg.CapturedModule:
    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return op(x)

    return fg.transform(Model(), {"activations": rule})


def gradient(function: Callable[[Tensor], Tensor], x: Tensor, **how: Any) -> Tensor:
    x = x.detach().clone().requires_grad_()
    torch.manual_seed(0)
    y = function(x)
    grad = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).reshape(y.shape)
    return torch.autograd.grad(y, x, grad, **how)[0]


def same(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


# --- save="mask" ---


@pytest.mark.sampled(4)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", MASKED)
def test_a_saved_mask_gives_the_gradient_of_a_saved_x(name: str, dtype: torch.dtype) -> None:
    rule = fg.get(name)(**WINDOWS.get(name, {}))
    usual, compact = around(rule), [around(rule(save=save)) for save in ("mask", "bits")]
    for x in (X.to(dtype), torch.empty(0, 3, dtype=dtype), torch.tensor(0.25, dtype=dtype)):
        for masked in compact:
            same(gradient(masked, x), gradient(usual, x))
            same(gradient(masked, x, create_graph=True), gradient(usual, x, create_graph=True))


@pytest.mark.parametrize(
    "x",
    [
        torch.randn(2, 3, 5, 7).to(memory_format=torch.channels_last),
        torch.randn(5, 3, 2).transpose(0, 2),
        torch.randn(6, 10)[::2, 1::3],
        torch.randn(3, 1).expand(3, 4),
    ],
)
def test_bits_keep_the_layout_of_a_mask(x: Tensor) -> None:
    """The layout of a gradient decides which kernels run after it."""
    by_mask, by_bits = (around(fg.rules.rectangular(save=save)) for save in ("mask", "bits"))
    (expected, other) = (gradient(function, x) for function in (by_mask, by_bits))
    assert torch.equal(other, expected)
    assert other.stride() == expected.stride()
    many = {"is_grads_batched": True}
    leaf = x.detach().requires_grad_()
    grads = torch.randn(3, *x.shape)
    (batched, alike) = (
        torch.autograd.grad(f(leaf), leaf, grads, **many)[0] for f in (by_bits, by_mask)
    )
    assert torch.equal(batched, alike)


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 64])
def test_packed_bits_are_in_order(count: int) -> None:
    mask = torch.rand(count) > 0.5
    (packed, _) = pack(mask, 1)
    written = [[*mask.tolist(), *[False] * 7][i : i + 8] for i in range(0, count, 8)]
    assert packed[0].tolist() == [sum(bit << i for i, bit in enumerate(byte)) for byte in written]


def test_a_tensor_with_a_storage_of_its_own_keeps_its_mask() -> None:
    class Own(Tensor):
        pass

    x = torch.randn(9).as_subclass(Own)
    rule = fg.rules.rectangular(a=-1.0, b=1.0, save="bits")
    assert torch.equal(gradient(around(rule), x), gradient(around(rule(save="x")), x))


# A rule whose parameters depend on the operation is checked at its own operation
OF_ANY_OP = [name for name in MASKED if fg.get(name).declaration.of_op is None]


@pytest.mark.parametrize("name", sorted({*OF_ANY_OP} - {*reference.RANDOM}))
def test_a_saved_mask_gives_the_gradient_of_the_formula(name: str) -> None:
    rule = fg.get(name)(**WINDOWS.get(name, {}))
    formula = reference.ENTRYWISE[name]
    expected = reference.entrywise(formula, torch.linspace(-1, 1, len(X)), X, **rule.bound)
    torch.testing.assert_close(gradient(around(rule(save="mask")), X), expected)


@pytest.mark.parametrize("name", MASKED)
def test_a_mask_is_a_byte_for_each_entry(name: str) -> None:
    function = around(fg.get(name)(save="mask"), F.gelu)
    (mask,) = saved(function, torch.randn(5, 7))
    assert mask.dtype == torch.bool
    assert mask.untyped_storage().nbytes() == 35
    (bits,) = saved(around(fg.get(name)(save="bits"), F.gelu), torch.randn(5, 7))
    assert bits.untyped_storage().nbytes() == 5


def test_x_is_let_go_also_where_the_operation_overwrites_it() -> None:
    rule = fg.rules.rectangular(save="mask")
    (mask,) = saved(around(rule, lambda x: F.relu(x * 1, inplace=True)), torch.randn(5, 7))
    assert mask.dtype == torch.bool


@pytest.mark.parametrize("name", MASKED)
def test_saved_masks_under_vmap_and_torch_func(name: str) -> None:
    """There x is saved: what is saved changes no gradient."""
    if name in reference.RANDOM:
        pytest.skip("random numbers under vmap are those of its randomness option")
    rule = fg.get(name)(**WINDOWS.get(name, {}))
    x = torch.randn(4, 5)
    usual, masked, bits = (around(rule(save=save)) for save in ("x", "mask", "bits"))

    def summed(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return torch.vmap(torch.func.grad(lambda x: function(x).square().sum()))

    same(summed(masked)(x), summed(usual)(x))
    same(summed(bits)(x), summed(usual)(x))


@pytest.mark.parametrize("name", ["rectangular", "guided", "clipped_straight_through"])
def test_compiled_masks(name: str) -> None:
    for save in ("mask", "bits"):
        function = around(fg.get(name)(save=save, **WINDOWS.get(name, {})))
        compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
        for x in (X, torch.tensor(0.25)):
            same(gradient(compiled, x), gradient(function, x))


@pytest.mark.slow
@pytest.mark.inductor
def test_masks_compiled_by_inductor() -> None:
    function = around(fg.rules.rectangular(save="mask"))
    x = torch.randn(9, 33)
    torch.testing.assert_close(
        gradient(torch.compile(function, fullgraph=True), x), gradient(function, x)
    )
    bits = around(fg.rules.rectangular(save="bits"))
    torch.testing.assert_close(gradient(torch.compile(bits, fullgraph=True), x), gradient(bits, x))
    by_backend = fg.compile(nn.Tanh(), fg.rules.rectangular(save="mask"))
    torch.testing.assert_close(gradient(by_backend, x), gradient(function, x))


def test_masks_in_blocks_compositions_and_parameters() -> None:
    masked = fg.rules.rectangular(a=-0.25, b=0.5, save="mask")
    x = torch.randn(6, 5)
    ambient = fg.transform(nn.Sequential(nn.Tanh()))
    with fg.use(masked):
        same(gradient(ambient, x), gradient(around(masked), x))
    with fg.use("rectangular", {"a": -0.25, "b": 0.5, "save": "mask"}):
        assert [t.dtype for t in saved(ambient, x)] == [torch.bool]
    chain = fg.compose(fg.rules.scale(s=2.0), masked)
    same(gradient(around(chain), x), 2 * gradient(around(masked), x))
    assert [t.dtype for t in saved(around(chain), x)] == [torch.bool]
    layer = nn.Linear(5, 3)
    gm = fg.transform(layer, fg.RuleTable([fg.on(parameter="weight").backward(masked)]))
    gm(x).sum().backward()
    expected = x.sum(0).expand(3, 5) * ((layer.weight >= -0.25) & (layer.weight <= 0.5))
    torch.testing.assert_close(layer.weight.grad, expected)


def test_a_mask_may_depend_on_a_tensor_that_changes() -> None:
    bound = torch.tensor(0.5)
    function = around(fg.rules.clipped_straight_through(bound=bound, save="mask"))
    x = torch.tensor([0.2, 0.7])
    for value, expected in ((0.5, [-1.0, 0.0]), (0.1, [0.0, 0.0]), (1.0, [-1.0, 1.0])):
        bound.fill_(value)
        assert gradient(function, x).tolist() == expected


def test_a_rule_of_ones_own_with_a_mask() -> None:
    def outside(x: Tensor, *, bound: float) -> Tensor:
        return x.abs() > bound

    @fg.register("outside", mask=outside)
    def rule(grad: Tensor, mask: Tensor, *, bound: float = 1.0, factor: float = 2.0) -> Tensor:
        """factor·grad·1[|x| > bound]"""
        return factor * grad * mask

    assert rule.inputs == ("x",)
    assert list(rule.parameters) == ["bound", "factor"]
    x, grad = torch.randn(2, 20)
    assert torch.equal(rule.backward(grad, x), 2 * grad * (x.abs() > 1))
    usual, masked = (gradient(around(r), X[1:-1]) for r in (rule, rule(save="mask")))
    same(masked, usual)


def test_what_a_mask_has_to_be() -> None:
    def gate(grad: Tensor, mask: Tensor) -> Tensor:
        return grad * mask

    with pytest.raises(fg.RuleError, match=r"has the argument `mask`, but .* @register\('a'"):
        fg.register("a")(gate)
    with pytest.raises(fg.RuleError, match="registered with mask=, but its signature"):
        fg.register("a", mask=positive)(lambda grad, x: grad)
    with pytest.raises(fg.RuleError, match=r"has the argument 'bound'\. It must take x and"):
        fg.register("a", mask=lambda x, *, bound: x > bound)(gate)
    with pytest.raises(fg.RuleError, match="has the argument 'more'"):
        fg.register("a", mask=lambda x, more: x > more)(gate)
    with pytest.raises(fg.RuleError, match="`mask` of rule 'a' must replace `x`"):
        fg.register("a", mask=positive)(lambda grad, mask, x: grad)
    assert "a" not in fg.rules.available()


def test_a_mask_returns_booleans_of_the_shape_of_x_and_changes_nothing() -> None:
    def gate(grad: Tensor, mask: Tensor) -> Tensor:
        return grad * mask

    x = torch.randn(3, requires_grad=True)
    for number, (mask, match) in enumerate(
        [
            (lambda x: (x > 0).float(), "returns a tensor of torch.float32 and shape"),
            (lambda x: x.sum() > 0, r"returns a tensor of torch.bool and shape \(\)"),
            (lambda x: True, "returns bool"),
            (lambda x: None, "returns NoneType"),
            (lambda x: x.clamp_(0) > 0, "changes x in place"),
        ]
    ):
        rule = fg.register(f"bad {number}", mask=mask)(gate)
        with pytest.raises(fg.RuleError, match=rf"'bad {number}' at site '<root>:tanh.*{match}"):
            around(rule(save="mask"))(x * 1)


@pytest.mark.parametrize(
    "what",
    [
        {"mask": torch.isfinite},
        {"mask": lambda: 1},
        {"mask": "x"},
        {"mask": positive, "fast": torch.add},
        {"mask": positive, "fast": True},
        {"mask": positive, "fast": lambda grad, mask: grad},
    ],
)
def test_what_cannot_be_read_is_named(what: dict[str, Any]) -> None:
    with pytest.raises(fg.RuleError, match="rule 'q'"):
        fg.register("q", **what)(lambda grad, mask: grad * mask)
    assert "q" not in fg.rules.available()


def test_complex_gradients() -> None:
    x = torch.randn(5, dtype=torch.complex64)
    grad = gradient(around(fg.rules.clipped_straight_through(bound=1.0)), x)
    expected = torch.where(x.abs() <= 1, torch.linspace(-1, 1, 5).to(torch.complex64), 0)
    same(grad, expected)


def test_wrong_things_to_save_are_named() -> None:
    with pytest.raises(fg.RuleError, match=r"'maks'.*Did you mean 'mask'"):
        fg.rules.rectangular(save="maks")
    with pytest.raises(fg.RuleError, match=r"no mask to save.*d.ReLU., rectangular"):
        fg.rules.fast_sigmoid(save="mask")
    with pytest.raises(fg.RuleError, match="no mask to save"):
        fg.on("relu").backward("scale", save="mask")
    with pytest.raises(fg.RuleError, match="value of save="):
        fg.rules.d_relu(save="y")  # which a rewritten graph alone may do
    x = torch.randn(3, requires_grad=True)
    with pytest.raises(
        fg.RuleError, match=r"'triangular' at site '' reads x in other ways than through a mask"
    ):
        decoupled(torch.tanh(stop_gradient(x)), x, rule="triangular", save="mask")


def test_options_are_written_and_read_like_parameters() -> None:
    rule = fg.rules.rectangular(a=-1.0, b=1.0, save="mask", compile=True)
    assert repr(rule) == "rectangular(a=-1.0, b=1.0, save='mask', compile=True)"
    assert rule != fg.rules.rectangular(a=-1.0, b=1.0)
    assert rule(save="x", compile=False) == fg.rules.rectangular(a=-1.0, b=1.0)
    table = fg.RuleTable(
        [
            fg.on("relu").backward("rectangular", a=-1.0, b=1.0, save="mask", compile=True),
            fg.on("tanh").backward(fg.compose("noise", fg.rules.d_relu(save="mask"))),
        ]
    )
    assert table[0].rules == (rule,)
    assert fg.RuleTable.from_toml(table.to_toml()) == table
    assert fg.RuleTable.from_dict(table.to_dict()) == table
    assert eval(repr(table), vars(fg) | vars(fg.rules)) == table
    with pytest.raises(fg.TableError, match=r"entry 1.*Did you mean 'save'"):
        fg.RuleTable.from_dict(
            {"rule": [{"op": "relu", "backward": "rectangular", "params": {"sav": "mask"}}]}
        )
    plan = fg.explain(nn.Sequential(nn.ReLU(), nn.Tanh()), table)
    assert "save='mask'" in str(plan)
    assert plan.to_dict()["sites"][0]["rules"][0]["params"]["save"] == "mask"


# --- the output in the place of x ---


class Block(nn.Module):
    def __init__(self, act: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.act = nn.Conv2d(3, 4, 3), act
        self.norm = nn.BatchNorm2d(4, track_running_stats=False)
        self.last = nn.Conv2d(4, 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.act(self.norm(self.conv(x))))


def by_hand(model: Block, name: str) -> Block:
    """The same model with the rule in a Function of its own."""
    formula = {
        "d(ReLU)": lambda grad, x, y: torch.where(x > 0, grad, 0),
        "guided": lambda grad, x, y: torch.where(x > 0, grad.clamp(min=0), 0),
    }[name]
    edited = Block(reference.oracle(torch.relu, formula))
    edited.load_state_dict(model.state_dict())
    return edited


IN_PLACE = [nn.ReLU(inplace=True), lambda x: F.relu(x, inplace=True), lambda x: x.relu_()]


@pytest.mark.sampled(4)
@pytest.mark.parametrize("name", ["d(ReLU)", "guided"])
@pytest.mark.parametrize("act", [F.relu, torch.relu, lambda x: x.relu(), *IN_PLACE])
def test_rules_that_ask_where_x_is_positive_save_no_more_than_native(
    name: str, act: Callable[[Tensor], Tensor]
) -> None:
    model, x = Block(act), torch.randn(2, 3, 9, 9)
    gm = fg.transform(model, name)

    def size(function: Callable[[Tensor], Tensor]) -> int:
        return sum(t.untyped_storage().nbytes() for t in saved(function, x))

    assert size(gm) <= size(model)
    assert "clone" not in gm.code
    assert torch.equal(gm(x), model(x))
    edited = by_hand(model, name)
    for function in (gm, torch.compile(gm, backend="aot_eager", fullgraph=True)):
        same(gradient(function, x), gradient(edited, x))
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(edited(leaf).square().sum(), leaf)
    torch.testing.assert_close(torch.func.grad(lambda x: gm(x).square().sum())(x), expected)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("op", [F.relu, torch.relu])
@pytest.mark.parametrize("name", ["d(ReLU)", "guided"])
def test_the_gradient_is_that_of_the_formula(name: str, op: Callable[[Tensor], Tensor]) -> None:
    function = around(fg.get(name), op)
    assert "save = 'y'" in function.code
    expected = reference.entrywise(
        reference.ENTRYWISE[name], torch.linspace(-1, 1, len(X)), X, **fg.get(name).bound
    )
    same(gradient(function, X), expected)
    same(gradient(torch.compile(function, backend="aot_eager"), X), expected)


@pytest.mark.parametrize(
    "op",
    [
        F.leaky_relu,  # negative where x is, or positive: as its slope has it
        F.gelu,  # 0 for the smallest positive numbers
        torch.tanh,
        F.elu,
        F.relu6,  # whose output is not natively saved, so that everyone may write into it
        lambda x: F.relu(x).mul_(-1),  # what is written into the result reaches what is saved
        lambda x: F.dropout(F.relu(x), 0.0, True, inplace=True),
    ],
)
def test_elsewhere_x_is_saved(op: Callable[[Tensor], Tensor]) -> None:
    function = around(fg.get("d(ReLU)"), op)
    assert "save" not in function.code
    sign = -1 if function(torch.tensor([3.0])) < 0 else 1
    expected = torch.where(X > 0, sign * torch.linspace(-1, 1, len(X)), 0)
    same(gradient(function, X), expected)


@pytest.mark.parametrize("inplace", [False, True])
def test_what_hooks_return_is_not_asked(inplace: bool) -> None:
    """Also hooks that come after the transform, and modules that are replaced."""
    x, changing = torch.randn(20), nn.Sequential(nn.BatchNorm1d(1), nn.ReLU(inplace))
    gm = fg.transform(changing, {"relu": "d(ReLU)"})
    gm[1].register_forward_hook(lambda module, inputs, output: output + 1)
    normal = nn.functional.batch_norm(x[:, None], None, None, training=True)[:, 0]
    y = gm(x[:, None])
    (grad,) = torch.autograd.grad(y, gm[0].bias, torch.ones_like(y))
    assert grad.item() == (normal > 0).sum()
    hooked = nn.Sequential(nn.BatchNorm1d(1), nn.ReLU())
    hooked[1].register_forward_hook(lambda module, inputs, output: output + 1)
    gm = fg.transform(hooked, {"relu": "d(ReLU)"})
    y = gm(x[:, None])
    (grad,) = torch.autograd.grad(y, gm[0].bias, torch.ones_like(y))
    assert grad.item() == (normal > 0).sum()


def test_x_may_be_written_into_after_its_output_was_saved() -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            h = x * 1
            y = torch.relu(h)
            h.neg_()
            return y + h

    gm, x = fg.transform(Model(), "d(ReLU)"), torch.randn(3, 4)
    expected = (x > 0).float() - 1
    for found in (
        torch.func.grad(lambda x: gm(x).sum())(x),
        torch.vmap(torch.func.grad(lambda x: gm(x).sum()))(x),
        gradient(gm, x) / torch.linspace(-1, 1, 12).reshape(3, 4),
    ):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("act", [F.relu, *IN_PLACE])
def test_a_rule_that_is_registered_anew_and_asks_for_more_is_refused(
    act: Callable[[Tensor], Tensor],
) -> None:
    gm, x = fg.transform(Block(act), "guided"), torch.randn(2, 3, 9, 9)
    fg.register("guided", overwrite=True)(lambda grad, x: grad * x)
    with pytest.raises(fg.RuleError, match=r"'guided' at site '.*Transform the original"):
        gm(x)


def test_a_new_forward_has_no_output_that_stands_for_x() -> None:
    gm = fg.transform(nn.ReLU(), fg.rules.d_relu(forward="tanh"))
    assert "save" not in gm.code
    masked = fg.transform(nn.ReLU(), fg.rules.d_relu(save="mask"))
    assert "save = 'mask'" in masked.code


def test_a_copied_and_a_loaded_model_save_the_same() -> None:
    rules = {"relu": "d(ReLU)", "tanh": fg.rules.rectangular(save="mask")}
    function = fg.transform(nn.Sequential(nn.ReLU(), nn.Tanh()), rules)
    for other in (copy.deepcopy(function), pickle.loads(pickle.dumps(function))):
        assert other.code == function.code
        same(gradient(other, X), gradient(function, X))


def test_a_mask_that_wraps_another_is_not_taken_for_it() -> None:
    @functools.wraps(masks.positive)
    def above(x: Tensor) -> Tensor:
        return x > -1

    @fg.register("above", mask=above)
    def above_rule(grad: Tensor, mask: Tensor) -> Tensor:
        """grad·1[x > −1]"""
        return masks.only_where(mask, grad)

    for inplace in (False, True):
        gm = fg.transform(nn.Sequential(nn.Identity(), nn.ReLU(inplace)), {"relu": above_rule})
        x = torch.tensor([-2.0, -0.5, 2.0], requires_grad=True)
        (grad,) = torch.autograd.grad(gm(x * 1).sum(), x)
        assert grad.tolist() == [0.0, 1.0, 1.0]

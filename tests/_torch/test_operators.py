"""What the operators of ATen and the operators that run graphs are taken to say of themselves."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from freegrad_fx._torch.operators import (
    NATIVE,
    NATIVE_ATTENTIONS,
    GraphOperator,
    Overload,
    is_composite,
    operator_name,
    schema,
)

aten = torch.ops.aten


@pytest.mark.parametrize(
    "overload",
    [aten.linear.default, aten.matmul.default, aten.reshape.default, aten.layer_norm.default],
    ids=str,
)
def test_an_operator_made_of_others_is_composite(overload: Any) -> None:
    assert is_composite(overload)


@pytest.mark.parametrize(
    "overload",
    [aten.relu.default, aten.mul.Tensor, aten.add_.Tensor, aten.view.default, aten.mm.default],
    ids=str,
)
def test_an_operator_with_a_kernel_of_its_own_is_not_composite(overload: Any) -> None:
    assert not is_composite(overload)


def test_the_schema_of_a_composite_does_not_tell_that_it_may_return_its_argument() -> None:
    """This is why composites are told from others."""
    x, dropout = torch.ones(2), aten.dropout.default
    assert dropout(x, 0.5, False).data_ptr() == x.data_ptr()
    assert all(r.alias_info is None for r in schema(dropout).returns)
    assert is_composite(dropout)


def written(overload: Any) -> list[str]:
    arguments = schema(overload).arguments
    return [a.name for a in arguments if a.alias_info and a.alias_info.is_write]


@pytest.mark.parametrize(
    ("overload", "names"),
    [
        (aten.relu.default, []),
        (aten.relu_.default, ["self"]),
        (aten.add_.Tensor, ["self"]),
        (aten.copy_.default, ["self"]),
        (aten.sin.out, ["out"]),
        (aten.view.default, []),
    ],
    ids=str,
)
def test_a_schema_tells_which_arguments_are_written_into(overload: Any, names: list[str]) -> None:
    assert written(overload) == names


@pytest.mark.parametrize(
    ("overload", "shares"),
    [
        (aten.relu.default, False),
        (aten.mul.Tensor, False),
        (aten.relu_.default, True),
        (aten.view.default, True),
        (aten.slice.Tensor, True),
        (aten.split.Tensor, True),
        (aten.detach.default, True),
    ],
    ids=str,
)
def test_a_schema_tells_which_results_share_memory(overload: Any, shares: bool) -> None:
    assert any(r.alias_info is not None for r in schema(overload).returns) == shares


def test_the_arguments_of_a_schema_are_those_of_a_call_in_order() -> None:
    names = [a.name for a in schema(aten.softmax.int).arguments]
    assert names == ["self", "dim", "dtype"]
    x = torch.ones(2, 3)
    assert torch.equal(aten.softmax.int(**dict(zip(names, (x, 1, None), strict=True))), x / 3)


def test_operators_have_names_of_their_library() -> None:
    assert operator_name(aten.relu.default) == schema(aten.relu.default).name == "aten::relu"
    assert schema(aten.linear.default).name == "aten::linear"


def test_the_operators_of_a_graph_are_overloads_and_other_functions_are_not() -> None:
    assert isinstance(aten.relu.default, Overload)
    assert isinstance(aten.softmax.int, Overload)
    assert not isinstance(aten.relu, Overload)
    assert not isinstance(torch.relu, Overload)
    assert not isinstance(torch.ops.higher_order.cond, Overload)


@pytest.mark.parametrize(
    "name",
    [
        "autograd_function_apply",
        "cond",
        "tag_activation_checkpoint",
        "wrap",
        "wrap_activation_checkpoint",
        "wrap_with_autocast",
        "wrap_with_set_grad_enabled",
    ],
)
def test_an_operator_that_runs_graphs_has_the_name_by_which_it_is_reached(name: str) -> None:
    import torch._higher_order_ops  # what registers them

    operator = getattr(torch.ops.higher_order, name)
    assert isinstance(operator, GraphOperator)
    assert operator_name(operator) == name


# --- functions of PyTorch that are no operators ---


@pytest.mark.parametrize(
    "function",
    [F.gelu, F.softplus, F.logsigmoid, F.softshrink],
    ids=["gelu", "softplus", "logsigmoid", "softshrink"],
)
def test_builtins_of_functional_are_those_of_the_native_module(function: Any) -> None:
    assert inspect.isbuiltin(function)
    assert any(function is native for native in vars(NATIVE[0]).values())


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("elu_", lambda x: F.elu(x, inplace=True)),
        ("gelu", F.gelu),
        ("hardsigmoid", F.hardsigmoid),
        ("hardswish", F.hardswish),
        ("hardtanh", F.hardtanh),
        ("leaky_relu", F.leaky_relu),
        ("mish", F.mish),
        ("relu6", F.relu6),
        ("silu", F.silu),
        ("softplus", F.softplus),
    ],
)
def test_functions_of_functional_compute_what_the_native_ones_do(name: str, function: Any) -> None:
    x = torch.linspace(-3, 8, 12)
    assert torch.equal(getattr(NATIVE[0], name)(x.clone()), function(x.clone()))


class Seen(torch.utils._python_dispatch.TorchDispatchMode):
    """Lists the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: list[Any] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.operators.append(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "call",
    [
        lambda x: nn.TransformerEncoderLayer(4, 2, batch_first=True).eval()(x),
        lambda x: nn.MultiheadAttention(4, 2, batch_first=True).eval()(x, x, x),
    ],
    ids=["TransformerEncoderLayer", "MultiheadAttention"],
)
def test_the_fast_path_of_an_attention_layer_is_one_of_the_native_attentions(call: Any) -> None:
    x: Tensor = torch.ones(1, 3, 4)
    with torch.no_grad(), Seen() as seen:
        call(x)
    assert any(operator in NATIVE_ATTENTIONS for operator in seen.operators)

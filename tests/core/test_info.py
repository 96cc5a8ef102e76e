"""`rule.info` says what the rule does, and what it saves."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import Tensor

import freegrad_fx as fg
from built_in import BUILT_IN


def saved_bytes(rule: fg.Rule, dtype: torch.dtype) -> float:
    """The bytes that the decoupled operation saves for each entry."""
    leaf = torch.randn(8, dtype=dtype, requires_grad=True)
    x, y = leaf * 1, torch.randn(8, dtype=dtype)
    kept: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel() * tensor.element_size())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = fg.ops.decoupled(y, x, rule=rule.name, **rule.given)
    del out
    return sum(kept) / 8


@pytest.mark.sampled(4)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("name", BUILT_IN)
def test_the_bytes_are_those_that_are_saved(name: str, dtype: torch.dtype) -> None:
    rule = fg.get(name)
    if rule.declaration.lean is not None:
        assert rule.info.saved_bytes(dtype) is None
        return
    assert rule.info.saved_bytes(dtype) == saved_bytes(rule, dtype)
    if "mask" in rule.info.properties:
        masked = rule(save="mask")
        assert masked.info.saves == ("mask",)
        assert masked.info.saved_bytes(dtype) == saved_bytes(masked, dtype) == 1
        bits = rule(save="bits")
        assert bits.info.saved_bytes(dtype) == saved_bytes(bits, dtype) == bits.info.mask_bits / 8


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_description_is_that_of_the_declaration(name: str) -> None:
    rule = fg.get(name)
    info, text = rule.info, str(rule.info)
    assert (info.name, info.formula, info.kinds) == (name, rule.formula, rule.kinds)
    assert info.source
    module = inspect.getmodule(inspect.unwrap(rule.function))
    assert module.__name__ == f"freegrad_fx.rules.{info.family}"
    assert {n: p.value for n, p in info.parameters.items()} == dict(rule.bound)
    assert all(word in text for word in (info.formula, info.family, info.source, *info.peers))
    hash(info)


def test_a_parameter_has_its_value_its_types_and_its_range() -> None:
    info = fg.rules.rectangular(a=-2.0).info
    assert info.parameters == {"a": (-2.0, "float", "a <= b"), "b": (0.5, "float", "a <= b")}
    assert fg.rules.centralize.info.parameters["dim"] == (-1, "int or tuple", "")
    assert "a = -2.0 (float, a <= b)" in str(info)


def test_a_rule_of_the_user_s_is_described_as_it_declares() -> None:
    @fg.register("mine", linear=False, reducing=True, peers="a library", kinds="parameter")
    def mine(grad: Tensor, x: Tensor, *, k: float) -> Tensor:
        """k·grad·x"""
        return k * grad * x

    assert mine.info.family == __name__
    assert mine.info.properties == ("reducing",)
    assert mine.info.parameters["k"].value is None
    assert (mine.info.peers, mine.info.kinds) == (("a library",), ("parameter",))


def test_a_rule_in_a_notebook_is_shown_with_its_description() -> None:
    rule = fg.rules.rectangular(a=-2.0, forward="heaviside")
    shown, described = rule._repr_html_(), rule.info._repr_html_()
    assert shown.startswith("<p>rectangular(a=-2.0, b=0.5, forward=&#x27;heaviside&#x27;): ")
    assert described.startswith("<p>rectangular: ")
    assert shown.partition("<table>")[2] == described.partition("<table>")[2]
    assert "a = -2.0 (float, a &lt;= b)" in shown

"""`list_rules`: by family, and by what a rule can be used for."""

from __future__ import annotations

import pytest
from torch import Tensor

import freegrad_fx as fg


def test_without_a_choice_all_rules_are_listed_in_order() -> None:
    assert fg.list_rules() == fg.list_rules(op="all") == fg.rules.available()


def test_the_families_share_the_rules_out() -> None:
    families = {fg.get(name).info.family for name in fg.list_rules()}
    alone = {f for f in families if not any(f.startswith(f"{other}_") for other in families)}
    listed = [name for family in alone for name in fg.list_rules(family)]
    assert sorted(listed) == sorted(fg.rules.available())
    assert {"arctan", "s2nn"} <= set(fg.list_rules("surrogate"))
    assert "arctan" not in fg.list_rules("surrogate_asymmetric")


def test_an_op_lists_what_can_serve_it_and_is_not_meant_for_others() -> None:
    of_relu, of_round, of_parameters = (fg.list_rules(op=op) for op in ("relu", "round", "params"))
    assert {"guided", "scale"} <= set(of_relu)
    assert "guided" not in of_round
    assert "guided" in fg.list_rules(op="activations")
    assert "adaptive_clip" in of_parameters
    assert "adaptive_clip" not in of_relu
    assert "identity_rule" not in of_parameters
    assert fg.list_rules("attribution", op="gelu") == ["identity_rule", "half"]


def test_a_rule_of_the_user_s_is_listed_by_its_module() -> None:
    @fg.register("mine")
    def mine(grad: Tensor) -> Tensor:
        return grad

    assert fg.list_rules(__name__) == ["mine"]
    assert fg.list_rules()[-1] == "mine"


def test_unknown_families_and_ops_are_errors() -> None:
    with pytest.raises(fg.RuleError, match=r"unknown family of rules 'surogate'\. Did you mean"):
        fg.list_rules("surogate")
    with pytest.raises(fg.TableError, match=r"unknown op or group 'rellu'\. Did you mean 'relu'"):
        fg.list_rules(op="rellu")

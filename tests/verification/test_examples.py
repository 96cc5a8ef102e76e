"""The comparison that `transform` makes of a model that is captured from example inputs."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import freegrad_fx as fg
from freegrad_fx.capture import export
from freegrad_fx.sites.remarks import Lost
from freegrad_fx.verification import Inputs, verify_examples
from freegrad_fx.verification.examples import other_values
from side_by_side import Net, build, contents, nothing_is_left_behind, sample

RULE = "straight_through"


class Plain(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.g(torch.relu(self.f(x)))


def test_the_report_says_what_was_compared() -> None:
    gm = fg.transform(build(Plain), RULE, example_inputs=(sample(),))
    told = fg.report(gm)
    assert told.verified.startswith("Verified: the same bits, 7 calls compared (train mode")
    assert told.verified in str(told)
    assert told.to_dict()["verified"] == told.verified
    assert fg.report(fg.transform(build(Plain), RULE)).verified == ""


class Normalised(Net):
    def make(self) -> None:
        self.norm = nn.BatchNorm1d(6)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.norm(self.f(x)))


def test_statistics_are_compared_and_put_back() -> None:
    model = build(Normalised)
    before = contents(model)
    assert "7 calls" in fg.report(fg.transform(model, RULE, example_inputs=(sample(),))).verified
    assert contents(model) == before


def test_it_can_be_left_out() -> None:
    gm = fg.transform(build(Plain), RULE, example_inputs=(sample(),), verify=False, strict=True)
    assert fg.report(gm).verified == "NOT VERIFIED: verify=False"


def test_nothing_is_computed_on_the_meta_device_and_strict_says_so() -> None:
    model, x = build(Plain).to("meta"), torch.empty(4, 6, device="meta")
    gm = fg.transform(model, RULE, example_inputs=(x,))
    assert "NOT VERIFIED: the model or an example input is on the meta device" in str(fg.report(gm))
    with pytest.raises(fg.PlanError, match=r"NOT VERIFIED.*verify=False accepts this"):
        fg.transform(model, RULE, example_inputs=(x,), strict=True)
    fg.transform(model, RULE, example_inputs=(x,), strict=True, verify=False)


def without_the_bias(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the export make a graph that computes something else."""
    unchanged = export._exported

    def exported(*args: Any) -> Any:
        found = unchanged(*args)
        last = [n for n in found.graph.nodes if n.target is torch.ops.aten.linear.default][-1]
        last.args = last.args[:2]
        return found

    monkeypatch.setattr(export, "_exported", exported)


def test_another_graph_is_refused_with_a_way_in_that_takes_the_model(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    without_the_bias(monkeypatch)
    model = build(Plain)
    before = contents(model)
    with (
        nothing_is_left_behind(),
        pytest.raises(
            fg.VerificationError, match=r"Plain cannot be captured.*, first in g"
        ) as raised,
    ):
        fg.transform(model, RULE, example_inputs=(sample(),))
    assert "without example_inputs: symbolic tracing takes it" in str(raised.value)
    assert isinstance(raised.value, fg.CaptureError)
    assert contents(model) == before
    assert fg.transform(model, RULE)
    assert fg.transform(model, RULE, example_inputs=(sample(),), verify=False)


SEEN = [0]


class InAGlobal(Plain):
    def forward(self, x: Tensor) -> Tensor:
        SEEN[0] += 1
        return super().forward(x) * SEEN[0]


def test_state_that_the_graph_lacks_is_refused() -> None:
    with pytest.raises(fg.CaptureError, match=r"freegrad_fx\.compile"):
        fg.transform(build(InAGlobal), RULE, example_inputs=(sample(),))


class Ids(Net):
    def make(self) -> None:
        self.table = nn.Embedding(10, 6)

    def forward(self, ids: Tensor) -> Tensor:
        return self.f(self.table(ids))


class Specialised(Ids):
    """What a graph is that holds the example."""

    ids = torch.arange(8).view(2, 4)

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(self.ids)


def test_what_is_specialised_to_the_example_shows_for_other_values() -> None:
    found = verify_examples(build(Ids), build(Specialised), Inputs((Specialised.ids,)), (), 60)
    assert found.first is not None
    assert (found.first.kind, found.first.inputs) == ("output", "further")
    assert "specialised to the example" in found.cause
    assert found.checks == 2


class OnlyTheExample(Ids):
    def forward(self, ids: Tensor) -> Tensor:
        if not torch.equal(ids, Specialised.ids):
            raise ValueError("an invalid id")
        return super().forward(ids)


def test_an_error_for_other_values_is_no_difference() -> None:
    model = build(OnlyTheExample)
    found = verify_examples(model, copy.deepcopy(model), Inputs((Specialised.ids,)), (), 60)
    assert found.ok, str(found)
    assert found.checks == 5
    assert verify_examples(model, build(Ids), Inputs((Specialised.ids,)), (), 60).ok
    assert verify_examples(build(Ids), model, Inputs((Specialised.ids,)), (), 60).ok


def test_one_case_is_compared_where_the_time_is_too_short() -> None:
    model = build(Plain)
    found = verify_examples(model, copy.deepcopy(model), Inputs((sample(),)), (), 0.0)
    assert found.ok
    assert found.checks == 1
    assert "not compared: eval mode, with gradients, further inputs" in found.notes[0]


class Sublayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.seen: Any = None

    def forward(self, x: Tensor) -> Tensor:
        self.seen = x.detach() * 2
        return x


class Forgets(Sublayer):
    def forward(self, x: Tensor) -> Tensor:
        return x


def test_what_the_report_says_is_lost_is_no_difference() -> None:
    model, other = nn.Sequential(Sublayer(), nn.ReLU()), nn.Sequential(Forgets(), nn.ReLU())
    lost = Lost("0", "attribute 'seen'", "the forward assigns tensors to it; the graph does not")
    for remarks in ((lost,), (Lost("0", "the hooks of Sublayer", "dropped"),)):
        assert verify_examples(model, other, Inputs((sample(),)), remarks, 60)
    for remarks in ((), (Lost("1", "attribute 'seen'", ""),), (Lost("0", "attribute 'see'", ""),)):
        found = verify_examples(model, other, Inputs((sample(),)), remarks, 60)
        assert found.first is not None
        assert (found.first.kind, found.first.name) == ("state", "0.seen")


# --- other values ---


def test_other_values_are_in_the_range_of_the_given_ones() -> None:
    ids, mask = torch.tensor([[3, 8, 8, 1]]), torch.tensor([[True, True, False, True]])
    additive = torch.tensor([0.0, -1e9, 0.0, -1e9, -1e9, 0.0])
    x = torch.rand(3, 5).t() + 2
    given = {"ids": ids, "more": [mask, (additive, x)], "n": 3}
    other = other_values(given)
    assert sorted(other["ids"].flatten().tolist()) == [1, 3, 8, 8]
    assert other["more"][0].sum() == 3
    assert sorted(other["more"][1][0].tolist()) == sorted(additive.tolist())
    y = other["more"][1][1]
    assert y.stride() == x.stride()
    assert x.min() <= y.min() < y.max() <= x.max()
    assert not torch.equal(x, y)
    assert other["n"] == 3
    again = other_values(given)
    assert torch.equal(again["more"][1][1], y)


def test_other_values_of_constants_and_of_numbers_that_are_not_finite() -> None:
    zeros, ones = other_values((torch.zeros(4), torch.ones(4, dtype=torch.half)))
    assert 0 < zeros.max() <= 1
    assert 0 <= ones.min() < 1
    x = torch.tensor([1.0, float("nan"), 3.0, float("-inf"), 2.0])
    y = other_values(x)
    assert y[1].isnan()
    assert y[3] == float("-inf")
    assert 1 <= y[[0, 2, 4]].min() <= y[[0, 2, 4]].max() <= 3
    expanded = torch.arange(3.0).expand(4, 3)
    assert other_values(expanded).stride() == (0, 1)
    assert other_values(torch.randn(3, dtype=torch.complex64)).is_complex()
    assert other_values(torch.empty(0)).shape == (0,)

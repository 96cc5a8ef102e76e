"""`memory`: the bytes that a forward keeps, against sizes that follow from the shapes."""

from __future__ import annotations

import json
import re

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import freegrad_fx as fg


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.drop, self.last = nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 2)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.last(self.drop(F.gelu(self.first(x))))


X = torch.randn(16, 4)
ENTRIES = 16 * 8
BITS = {"gelu": fg.rules.few_bit(bits=2)}
# the input of GELU, the mask of the dropout in single precision, the input of the last layer
NATIVE = {"<root>:gelu": 4 * ENTRIES, "drop:dropout": 4 * ENTRIES, "last:linear": 4 * ENTRIES}
KEPT = {**NATIVE, "<root>:gelu": ENTRIES // 4}


@pytest.fixture
def net() -> Net:
    return Net()


def kept(report: fg.MemoryReport) -> dict[str, int]:
    return {row.site: row.kept for row in report.rows}


def native(report: fg.MemoryReport) -> dict[str, int]:
    return {row.site: row.native for row in report.rows}


def test_a_plain_model_and_one_in_a_block(net: Net) -> None:
    plain = fg.memory(net, X)
    assert native(plain) == kept(plain) == NATIVE
    assert (plain.native, plain.kept, plain.ratio) == (12 * ENTRIES, 12 * ENTRIES, 1.0)
    with fg.use(BITS, model=net):
        found = fg.memory(net, x=X)
    assert (native(found), kept(found)) == (NATIVE, KEPT)
    assert [row.rule for row in found.rows] == ["few_bit", "", ""]


def test_a_transformed_model(net: Net) -> None:
    for gm in (fg.transform(net, BITS), fg.transform(net, BITS, example_inputs=(X,))):
        found = fg.memory(gm, X)
        assert native(found)["<root>:gelu"] == 4 * ENTRIES
        assert kept(found)["<root>:gelu"] == ENTRIES // 4
        assert (found.native, found.kept) == (sum(NATIVE.values()), sum(KEPT.values()))
        assert {row.site: row.rule for row in found.rows}["<root>:gelu"] == "few_bit"


def test_of_compiled_code_the_total_is_known(net: Net) -> None:
    found = fg.memory(fg.compile(net.eval(), BITS, backend="aot_eager"), X)
    assert found.model == "Net"
    assert found.native - found.kept >= 3 * ENTRIES
    assert "compiled" in str(found)


def test_the_model_and_the_random_state_are_as_before(net: Net) -> None:
    before = torch.get_rng_state()
    with torch.no_grad():
        found = fg.memory(net, X)
    assert found.kept
    assert net.calls == 0
    assert torch.equal(torch.get_rng_state(), before)


def test_what_is_dropped_shared_or_an_input_is_not_counted() -> None:
    class Shares(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            x.exp().exp()
            y = x.exp()
            return y * y.t().contiguous().t() + y.sigmoid().detach() + x.square()

    x = torch.randn(3, 5, requires_grad=True)
    found = fg.memory(Shares(), x)
    assert kept(found) == {"<root>:exp": 60, "<root>:mul": 60}


def test_a_model_without_memory_for_its_tensors(net: Net) -> None:
    found = fg.memory(net.eval().to("meta"), X.to("meta"))
    assert found.kept == 2 * 4 * ENTRIES


def test_text_and_html_and_json(net: Net) -> None:
    found = fg.memory(fg.transform(net, BITS), X)
    assert str(found).startswith("Net: 1.03 KiB kept for the backward, 1.50 KiB natively (× 0.688)")
    assert re.search(r"<root>:gelu +few_bit +512 B +32 B\n", str(found))
    assert ">few_bit</td>" in found._repr_html_()
    data = json.loads(found.to_json())
    assert data == found.to_dict()
    assert (data["native"], data["rows"][0]["kept"]) == (1536, 32)


def test_only_modules_are_counted() -> None:
    with pytest.raises(TypeError, match="got function"):
        fg.memory(lambda x: x, X)  # type: ignore[arg-type]

"""What cannot be looked into is kept whole, listed with its reason and line, and refused where the caller is strict.

Case 17. A failure in one part does not spoil the rest; a root that cannot be traced is an error with the way out.
"""

from __future__ import annotations

import copy
import inspect
import pickle
import random
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

import freegrad_fx as fg
from runs import call
from side_by_side import (
    BACKWARD,
    RULE,
    THRICE,
    InterceptionOutside,
    Make,
    Net,
    build,
    captured_or_refused,
    check_capture,
    difference,
    sample,
    what_plain_tracing_gets_wrong,
)
from sweep import NATIVE, Interception

# --- parts that cannot be traced ---


class BranchesOnData(Net):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return F.relu(self.f(x))
        return F.relu(self.g(x)) * 2


class BranchesOnAShape(Net):
    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] > 3:
            return F.relu(self.f(x))
        return self.g(x)


class Loops(Net):
    def forward(self, x: Tensor) -> Tensor:
        while x.abs().max() > 0.5:
            x = x / 2
        return F.relu(self.f(x))


class TakesTheLength(Net):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.f(x)) * len(x)


class Iterates(Net):
    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([F.relu(self.f(row)) for row in x])


class CountsRows(Net):
    def forward(self, x: Tensor) -> Tensor:
        for i in range(x.shape[0]):
            x = x + i
        return F.relu(self.f(x))


class DrawsInPython(Net):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.f(x)) * random.random()


class Autocasts(Net):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = self.f(x)
        return F.relu(y.float())


class MakesALayer(Net):
    def make(self) -> None:
        self.late: nn.Module | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.late is None:
            self.late = nn.Linear(6, 6)
        return F.relu(self.late(x))


class SwallowsTheError(Net):
    """A branch that the trace cannot follow, inside a `try`."""

    def forward(self, x: Tensor) -> Tensor:
        try:
            if x.sum() > -1e9:
                x = x + 1
        except Exception:
            x = x - 100
        return F.relu(self.f(x))


class RaisesNow(Net):
    def forward(self, x: Tensor) -> Tensor:
        if x.isnan().any():
            raise ValueError("not a number")
        return F.relu(self.f(x))


UNTRACEABLE = [
    BranchesOnData, BranchesOnAShape, Loops, TakesTheLength, Iterates, CountsRows, DrawsInPython, Autocasts,
    SwallowsTheError, RaisesNow,
]  # fmt: skip
KINDS = pytest.mark.parametrize("kind", UNTRACEABLE)


def around(kind: Callable[[], nn.Module]) -> type[nn.Module]:
    class Around(Net):
        def make(self) -> None:
            self.part, self.after = kind(), nn.Sequential(nn.Linear(6, 6), nn.ReLU())

        def forward(self, x: Tensor) -> Tensor:
            return self.after(F.relu(self.part(F.relu(self.f(x)))))

    return Around


@pytest.mark.sampled(4)
@KINDS
def test_a_part_is_kept_whole_and_the_rest_rewritten(kind: type[nn.Module]) -> None:
    for rules in (NATIVE, RULE):
        original, gm = build(around(kind)), fg.transform(build(around(kind)), rules)
        for part in (original.part, gm.part):
            part.register_forward_pre_hook(lambda *_: random.seed(0))
        reference = None if rules is NATIVE else InterceptionOutside(original, ["part"])
        assert difference(original, gm, THRICE, reference) == ""
    plan = fg.report(gm)
    assert [(o.path, o.what) for o in plan.opaque] == [
        ("part", f"{kind.__name__}, kept as one opaque call")
    ]
    names = [d.site.name for d in plan.decisions]
    assert names == ["<root>:relu[0]", "<root>:relu[1]", "after.1:relu[0]"]


class DrawsInNumpy(Net):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.f(x)) * float(np.random.rand())


@pytest.mark.parametrize("kind", [DrawsInPython, DrawsInNumpy])
def test_draws_of_a_part_kept_whole_are_new_at_each_call(kind: type[nn.Module]) -> None:
    before = random.getstate(), np.random.get_state()[1].tolist()
    gm = fg.transform(build(around(kind)), NATIVE)
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before
    part = gm.part
    assert not torch.equal(part(sample()), part(sample()))


@pytest.mark.sampled(4)
@KINDS
def test_the_line_and_the_reason_are_in_the_report(kind: type[nn.Module]) -> None:
    plan = fg.explain(build(around(kind)), RULE)
    (opaque,) = plan.opaque
    assert opaque.reason
    assert "part" in str(plan)
    assert opaque.reason in str(plan)
    lines, first = inspect.getsourcelines(kind)
    if opaque.source:
        file, _, line = opaque.source.rpartition(":")
        assert file == __file__
        assert first <= int(line) < first + len(lines)
    else:
        assert kind in (DrawsInPython, SwallowsTheError)
    assert plan.to_dict()["opaque"]


@KINDS
def test_strict_refuses_it(kind: type[nn.Module]) -> None:
    with pytest.raises(fg.PlanError, match=f"not traced: part: {kind.__name__}"):
        fg.transform(build(around(kind)), RULE, strict=True)


@KINDS
def test_a_root_is_refused_with_its_line_and_remedies(kind: type[nn.Module]) -> None:
    gm, refusal = captured_or_refused(build(kind), RULE)
    assert gm is None
    assert kind.__name__ in refusal
    if kind is DrawsInPython:
        assert "torch.rand" in refusal
    else:
        assert "example_inputs" in refusal
        assert f"{__file__}:" in refusal or kind is SwallowsTheError
    assert "submodule" in refusal


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (BranchesOnData, "if x.sum() > 0:"),
        (BranchesOnAShape, "if x.shape[0] > 3:"),
        (Loops, "while x.abs().max() > 0.5:"),
        (TakesTheLength, "* len(x)"),
        (Iterates, "for row in x"),
        (CountsRows, "range(x.shape[0])"),
    ],
)
def test_a_refused_root_names_the_line_that_is_to_blame(kind: type[nn.Module], text: str) -> None:
    _, refusal = captured_or_refused(build(kind), RULE)
    lines, first = inspect.getsourcelines(kind)
    number = first + next(i for i, line in enumerate(lines) if text in line)
    assert f"{__file__}:{number}: " in refusal
    assert text in refusal


@pytest.mark.parametrize("kind", [BranchesOnAShape, TakesTheLength, CountsRows])
def test_the_first_remedy_of_a_refused_root_works(kind: type[nn.Module]) -> None:
    gm = fg.transform(build(kind), RULE, example_inputs=(sample(),))
    assert difference(build(kind), gm, reference=Interception(BACKWARD)) == ""


@KINDS
def test_the_second_remedy_of_a_refused_root_works(kind: type[nn.Module]) -> None:
    gm = fg.transform(nn.Sequential(build(kind), nn.ReLU()), RULE)
    assert [o.path for o in fg.report(gm).opaque] == ["0"]
    assert [d.site.name for d in fg.report(gm).decisions] == ["1:relu[0]"]


@pytest.mark.parametrize(
    "kind",
    [
        BranchesOnData,
        BranchesOnAShape,
        Loops,
        TakesTheLength,
        Iterates,
        SwallowsTheError,
        RaisesNow,
    ],
)
def test_a_plain_trace_is_wrong_or_refuses_the_whole(kind: type[nn.Module]) -> None:
    assert what_plain_tracing_gets_wrong(around(kind))


def test_a_plain_trace_swallows_the_error_without_a_word() -> None:
    assert "output 0 differs" in what_plain_tracing_gets_wrong(around(SwallowsTheError))


def test_an_error_that_the_part_raises_is_raised() -> None:
    gm = fg.transform(build(around(RaisesNow)), RULE)
    gm(sample())
    with pytest.raises(ValueError, match="not a number"):
        gm(sample() * float("nan"))


def test_a_layer_made_at_the_first_call_is_made_then() -> None:
    gm = fg.transform(build(around(MakesALayer)), NATIVE)
    assert gm.part.late is None
    assert difference(build(around(MakesALayer)), gm, THRICE[:1]) == ""


# --- where in the tree ---


class AroundAShape(Net):
    def make(self) -> None:
        self.part = BranchesOnAShape()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.part(F.relu(self.f(x))))


class Deep(Net):
    """Untraceable parts beside traceable ones, at several depths, and one that is called twice."""

    def make(self) -> None:
        self.blocks = nn.ModuleList(
            [BranchesOnData(), nn.ReLU(), nn.Sequential(nn.Linear(6, 6), nn.ReLU(), Loops())]
        )
        self.inner = AroundAShape()

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.inner(self.blocks[0](x)) + self.inner(x)


def test_parts_deep_in_the_tree() -> None:
    gm = check_capture(Deep, whole=["blocks.0", "blocks.2.2", "inner.part"])
    assert [d.site.name for d in fg.report(gm).decisions if d.site.path == "inner"] == [
        f"inner:relu[{i}]" for i in range(4)
    ]


class Keywords(Net):
    def forward(self, x: Tensor, *, k: float = 2.0, d: Any = None) -> Any:
        if x.sum() > 0:
            return F.relu(self.f(x)) * k, {"a": x}
        return self.f(x), {"a": x * 2, **d}


class HandsKeywordsOn(Net):
    def make(self) -> None:
        self.part = Keywords()

    def forward(self, x: Tensor) -> Tensor:
        y, d = self.part(x, k=3.0, d={"q": x})
        return F.relu(y) + d["a"]


def test_arguments_and_outputs_of_a_part_kept_whole() -> None:
    check_capture(HandsKeywordsOn, whole=["part"])


class CallsOtherMethods(Net):
    """Not through `__call__`."""

    def make(self) -> None:
        self.part = WithEncoder()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.part.encode(x)) + self.part.forward(x)


class WithEncoder(Net):
    def encode(self, x: Tensor) -> Tensor:
        return F.relu(self.f(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.encode(x))


def test_methods_called_past_the_call_of_a_module_are_captured() -> None:
    gm = check_capture(CallsOtherMethods)
    assert {d.site.path for d in fg.report(gm).decisions} == {"", "part.act"}


class UnderTry(Net):
    def make(self) -> None:
        self.part = BranchesOnData()

    def forward(self, x: Tensor) -> Tensor:
        try:
            y = self.part(x)
        except Exception:
            y = x
        return F.relu(y)


def test_a_part_kept_whole_under_a_try() -> None:
    check_capture(UnderTry, whole=["part"])


@pytest.mark.parametrize("way", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_keep_the_part(way: Callable[[Any], Any]) -> None:
    original = build(Deep)
    gm = way(fg.transform(build(Deep), RULE))
    reference = InterceptionOutside(original, ["blocks.0", "blocks.2.2", "inner.part"])
    assert difference(original, gm, THRICE, reference) == ""


# --- modules of torch.nn that are one call ---


class Encoder(nn.TransformerEncoderLayer):
    """A subclass of a composite."""


class Composites(Net):
    def make(self) -> None:
        options: dict[str, Any] = {"dropout": 0.0, "batch_first": True}
        self.layer = nn.TransformerEncoderLayer(6, 2, 8, **options)
        self.own = Encoder(6, 2, 8, **options)
        self.stack = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(6, 2, 8, **options), 2, enable_nested_tensor=False
        )
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.lstm, self.gru = nn.LSTM(6, 6, batch_first=True), nn.GRUCell(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stack(self.own(self.layer(x[None]))))
        x, _ = self.attention(x, x, x, need_weights=False)
        x, (h, _) = self.lstm(F.relu(x))
        return F.relu(self.gru(x[0], h[0].expand(4, 6)))


COMPOSITES = ["layer", "own", "stack", "attention", "lstm", "gru"]


def test_composites_are_kept_whole_and_listed_once_each() -> None:
    modes = (True,)  # in evaluation PyTorch takes a fast path under no autograd mode, in both alike
    check_capture(Composites, whole=COMPOSITES, modes=modes)
    plan = fg.explain(build(Composites), RULE)
    assert sorted(o.path for o in plan.opaque) == sorted(COMPOSITES)
    assert all(o.reason for o in plan.opaque)
    with pytest.raises(fg.PlanError, match="strict") as caught:
        fg.transform(build(Composites), RULE, strict=True)
    assert all(f"not traced: {path}:" in str(caught.value) for path in COMPOSITES)


def test_composites_in_evaluation_have_the_original_s_output() -> None:
    gm = fg.transform(build(Composites), RULE).eval()
    with torch.no_grad():
        assert torch.equal(gm(sample()), build(Composites).eval()(sample()))


def test_composites_can_be_opened_by_example_inputs() -> None:
    class OneLayer(Net):
        def make(self) -> None:
            self.layer = nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.layer(x[None]))

    plan = fg.explain(build(OneLayer), RULE, example_inputs=(sample(),))
    relus = [d.site.path for d in plan.decisions if d.site.op == "relu"]
    assert [path.partition(".")[0] for path in relus] == ["layer", ""]
    assert [o.what for o in plan.opaque] == ["aten.scaled_dot_product_attention"]  # its softmax


# --- other code that is one call ---


@torch.fx.wrap
def wrapped(x: Tensor, k: float) -> Tensor:
    if x.sum() > 0:
        return torch.relu(x) * k
    return x


class CallsAWrapped(Net):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(wrapped(self.f(x), 2.0))


def test_a_wrapped_function_is_one_call_and_listed() -> None:
    original, gm = build(CallsAWrapped), fg.transform(build(CallsAWrapped), NATIVE)
    assert difference(original, gm, THRICE) == ""
    (opaque,) = fg.report(gm).opaque
    assert "wrapped" in opaque.what
    assert opaque.source.startswith(__file__)
    with pytest.raises(fg.PlanError, match="wrapped"):
        fg.transform(build(CallsAWrapped), RULE, strict=True)


def quietly(make: Make) -> Make:
    """TorchScript says of itself that it is deprecated."""

    def made() -> nn.Module:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return make()

    return made


class Scripted(Net):
    def make(self) -> None:
        self.part = torch.jit.script(nn.Sequential(nn.Linear(6, 6), nn.ReLU()))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.part(x))


class TracedByJit(Scripted):
    def make(self) -> None:
        self.part = torch.jit.trace(nn.Sequential(nn.Linear(6, 6), nn.ReLU()), sample())


@pytest.mark.parametrize("kind", [Scripted, TracedByJit])
def test_a_scripted_part_is_kept_whole(kind: type[nn.Module]) -> None:
    model, original = build(quietly(kind)), build(quietly(kind))
    gm = fg.transform(model, NATIVE)
    assert difference(original, gm, THRICE) == ""
    (opaque,) = fg.report(gm).opaque
    assert opaque.path == "part"
    assert opaque.reason
    with pytest.raises(fg.PlanError, match="part"):
        fg.transform(model, RULE, strict=True)


class HasACompiledPart(Net):
    def make(self) -> None:
        self.part = torch.compile(nn.Sequential(nn.Linear(6, 6), nn.ReLU()), backend="eager")

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.part(x))


def test_a_compiled_part_is_opened_or_listed_never_ignored() -> None:
    """Case 36, below the root."""
    plan = fg.explain(build(HasACompiledPart), RULE)
    assert len(plan.decisions) == 2 or plan.opaque
    gm = fg.transform(build(HasACompiledPart), NATIVE)
    assert difference(build(HasACompiledPart), gm) == ""


# --- what the caller wants kept whole ---


class Block(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.f(x))


class SubBlock(Block):
    pass


class HasBlocks(Net):
    def make(self) -> None:
        self.a, self.b = Block(), SubBlock()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.b(F.relu(self.a(x))))


@pytest.mark.parametrize(
    ("leaves", "whole", "sites"),
    [
        ([], [], ["a.act:relu[0]", "<root>:relu[0]", "b.act:relu[0]", "<root>:relu[1]"]),
        ([SubBlock], ["b"], ["a.act:relu[0]", "<root>:relu[0]", "<root>:relu[1]"]),
        ([Block], ["a", "b"], ["<root>:relu[0]", "<root>:relu[1]"]),
        ([Block, SubBlock], ["a", "b"], ["<root>:relu[0]", "<root>:relu[1]"]),
    ],
)
def test_leaf_modules_are_kept_whole_and_listed(
    leaves: list[type[nn.Module]], whole: Sequence[str], sites: list[str]
) -> None:
    gm = check_capture(HasBlocks, whole=whole, leaf_modules=leaves)
    assert [d.site.name for d in fg.report(gm).decisions] == sites


def test_leaf_modules_are_what_the_caller_asked_for() -> None:
    """No error under `strict`, which is about what he did not ask for."""
    gm = fg.transform(build(HasBlocks), RULE, leaf_modules=[Block], strict=True)
    assert [o.path for o in fg.report(gm).opaque] == ["a", "b"]
    with pytest.raises(fg.PlanError, match="part"):
        fg.transform(build(around(BranchesOnData)), RULE, leaf_modules=[Block], strict=True)


def test_two_calls_with_both_branches() -> None:
    """Data decides, at each call anew."""
    calls = (call(sample() + 3), call(sample() - 3), call(sample() + 3))
    check_capture(around(BranchesOnData), *calls, whole=["part"])
    wide = torch.cat([sample(), sample()])
    check_capture(around(BranchesOnAShape), call(wide), call(sample()[:2]), whole=["part"])

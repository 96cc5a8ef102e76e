"""Decorated forwards: the decorator gets the arguments that it gets in a call, and the graph computes what it does.

The decorators are like those of Hugging Face's models, which fill in defaults, take keywords away and convert results.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import freegrad_fx as fg
from side_by_side import Net, build, check_capture, sample

OPEN = torch.fx.PH
Forward = Callable[..., Any]


def takes_a_keyword_away(forward: Forward) -> Forward:
    @functools.wraps(forward)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        as_tuple = kwargs.pop("as_tuple", False)
        out = forward(self, *args, **kwargs)
        return (out,) if as_tuple else out

    return wrapper


def fills_in_a_default(forward: Forward) -> Forward:
    @functools.wraps(forward)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        names = list(inspect.signature(forward).parameters)
        if kwargs.get("scale") is None and len(args) < names.index("scale"):
            kwargs["scale"] = self.scale
        return forward(self, *args, **kwargs)

    return wrapper


def counts_what_is_given(forward: Forward) -> Forward:
    @functools.wraps(forward)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        return forward(self, *args, **kwargs) * (len(args) + 10 * len(kwargs) + 1)

    return wrapper


def names_one(forward: Forward) -> Forward:
    @functools.wraps(forward)
    def wrapper(self: Any, x: Any, **kwargs: Any) -> Any:
        return forward(self, x * 2, **kwargs)

    return wrapper


class Scaled(Net):
    def make(self) -> None:
        self.scale = 3.0

    @fills_in_a_default
    @takes_a_keyword_away
    def forward(self, x: Tensor, mask: Any = None, scale: Any = None, **kwargs: Any) -> Tensor:
        h = F.relu(self.f(x)) * scale
        return h if mask is None else h * mask


class Counted(Net):
    @counts_what_is_given
    def forward(self, x: Tensor, mask: Any = None, *, more: Any = None) -> Tensor:
        h = F.relu(self.f(x))
        return h if mask is None else h * mask


class Several(Net):
    @counts_what_is_given
    def forward(self, x: Tensor, *rest: Any, **kwargs: Any) -> Tensor:
        return F.relu(self.f(x)) + len(rest) + len(kwargs)


class OneNamed(Net):
    @names_one
    def forward(self, x: Tensor, mask: Any = None, **kwargs: Any) -> Tensor:
        return F.relu(self.f(x))


class InAPart(Net):
    def make(self) -> None:
        self.part = build(Scaled)

    @takes_a_keyword_away
    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        return F.tanh(self.part(x, mask=x) + self.part(x))


MODELS = [Scaled, Counted, Several, OneNamed, InAPart]


@pytest.mark.parametrize("make", MODELS, ids=lambda m: m.__name__)
def test_a_decorated_forward_is_captured(make: Callable[[], Net]) -> None:
    gm = check_capture(make)
    assert not fg.report(gm).opaque
    assert fg.report(gm).with_action("rewrite")


@pytest.mark.parametrize("make", [Scaled, Counted], ids=lambda m: m.__name__)
def test_an_argument_with_a_default_can_be_open(make: Callable[[], Net]) -> None:
    model, mask = build(make), sample(5)
    gm = fg.transform(model, "straight_through", concrete_args={"mask": OPEN})
    assert torch.equal(gm(sample(), mask), model(sample(), mask))


def test_a_keyword_that_only_the_decorator_takes() -> None:
    model = build(Scaled)
    gm = fg.transform(
        model, "straight_through", concrete_args={"kwargs": {"as_tuple": True}, "scale": 2.0}
    )
    (got,) = gm(sample(), scale=2.0, as_tuple=True)
    (want,) = model(sample(), scale=2.0, as_tuple=True)
    assert torch.equal(got, want)


def test_other_arguments_are_refused_by_the_call() -> None:
    gm = fg.transform(build(Several), "straight_through")
    with pytest.raises(fg.CaptureError, match="rest"):
        gm(sample(), 1)


class Undone(nn.Module):
    """Branches on its mode, and contains an activation in a part that cannot be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.part = _Branches()

    def forward(self, x: Tensor) -> Tensor:
        y = self.part(x)
        return y * 2 if self.training else y


class _Branches(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x) if x.dtype == torch.float32 else x


def test_a_module_that_branches_on_its_mode_does_not_hide_an_opaque_part() -> None:
    model = nn.Sequential(Undone())
    gm = fg.transform(model)
    assert [note.path for note in fg.report(gm).opaque] == ["0.part"]
    for training in (True, False):
        assert torch.equal(gm.train(training)(sample()), model.train(training)(sample()))


ARCHITECTURES = ("bert", "distilbert")


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_model_of_hugging_face(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    size = {"vocab_size": 99, "max_position_embeddings": 64}
    configs = {
        "bert": ("Bert", {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}),
        "distilbert": ("DistilBert", {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 37}),
    }
    kind, more = configs[name]
    try:
        config = getattr(transformers, f"{kind}Config")(**size, **more)
        model = getattr(transformers, f"{kind}Model")(config).eval()
    except ImportError as error:  # transformers does not import beside every torchvision
        pytest.skip(str(error))
    ids = torch.arange(16).reshape(2, 8)
    gm = fg.transform(model, {"gelu": "straight_through"}, concrete_args={"input_ids": OPEN})
    assert fg.report(gm).with_action("rewrite")
    got, want = gm(input_ids=ids), model(input_ids=ids)
    assert torch.equal(got.last_hidden_state, want.last_hidden_state)

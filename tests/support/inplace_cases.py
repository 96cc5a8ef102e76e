"""In-place activations and aliased memory: what an in-place operation writes, and who sees it.

Every case stands here twice: as a user writes it, and by hand, out of place, with the activation handed in.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import freegrad_fx as fg
import models
from models import Activation, Backward
from runs import Compared, Run, assert_same_forward, assert_same_gradients, close, identical, run

NATIVE: dict[str, None] = {"activations": None}


# A rule that needs nothing, one that needs x, a chain whose second part needs x, and one of which both do.
RULES: dict[str, tuple[Any, Backward]] = {
    "scale": (fg.rules.scale(s=3.0), models.scale(3.0)),
    "rectangular": (fg.rules.rectangular(a=-0.8, b=1.2), models.rectangular(-0.8, 1.2)),
    "scale, then rectangular": (
        fg.compose(fg.rules.scale(s=3.0), fg.rules.rectangular(a=-0.8, b=1.2)),
        lambda grad, x: models.rectangular(-0.8, 1.2)(grad * 3.0, x),
    ),
    "rectangular, then fast_sigmoid": (
        fg.compose(fg.rules.rectangular(a=-0.8, b=1.2), fg.rules.fast_sigmoid(slope=2.0)),
        lambda grad, x: models.fast_sigmoid(2.0)(models.rectangular(-0.8, 1.2)(grad, x), x),
    ),
}


# --- hand-written cases ---


class Written(nn.Module):
    """What a user wrote. `f` and `g` are layers; activations are in `body`."""

    def __init__(self, body: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.body = body
        self.conv = nn.Conv1d(4, 4, 1)
        self.f, self.g = nn.Linear(6, 6), nn.Linear(6, 6)
        self.inplace = nn.ReLU(inplace=True)
        self.dropout = nn.Dropout(0.4, inplace=True)
        self.register_buffer("kept", torch.randn(4, 6))

    def forward(self, x: Tensor) -> Any:
        return self.body(self, x)


@dataclass(frozen=True)
class Case:
    """`original(m, x)`; `by_hand(m, x, relu)` returns the same, and what the original leaves in the caller's x."""

    name: str
    original: Callable[[Any, Tensor], Any]
    by_hand: Callable[[Any, Tensor, Activation], tuple[Any, Tensor]]


CASES: list[Case] = []


def case(original: Callable[[Any, Tensor], Any]) -> Callable[[Any], Any]:
    def with_reference(by_hand: Callable[[Any, Tensor, Activation], tuple[Any, Tensor]]) -> Any:
        CASES.append(Case(original.__name__, original, by_hand))
        return by_hand

    return with_reference


# The first of each pair is the user's.


def module_after_a_convolution(m, x):
    return m.inplace(m.conv(x))


@case(module_after_a_convolution)
def _(m, x, relu):
    return relu(m.conv(x)), x


def function_whose_result_is_discarded(m, x):
    y = m.f(x)
    F.relu(y, inplace=True)
    return m.g(y) + y


@case(function_whose_result_is_discarded)
def _(m, x, relu):
    y = relu(m.f(x))
    return m.g(y) + y, x


def method_whose_result_is_discarded(m, x):
    y = m.f(x)
    y.relu_()
    return m.g(y), y


@case(method_whose_result_is_discarded)
def _(m, x, relu):
    y = relu(m.f(x))
    return (m.g(y), y), x


def both_names_used_later(m, x):
    y = m.f(x)
    z = torch.relu_(y)
    return y * 2 + z, y, z


@case(both_names_used_later)
def _(m, x, relu):
    y = relu(m.f(x))
    return (y * 2 + y, y, y), x


def residual_added_in_place(m, x):
    y = m.inplace(m.f(x))
    y = m.g(y)
    y += x
    return m.inplace(y)


@case(residual_added_in_place)
def _(m, x, relu):
    return relu(m.g(relu(m.f(x))) + x), x


def residual_added_after_the_activation(m, x):
    y = m.f(x).relu_()
    y += x
    return m.g(y)


@case(residual_added_after_the_activation)
def _(m, x, relu):
    return m.g(relu(m.f(x)) + x), x


def shortcut_is_activated_in_place(m, x):
    shortcut = m.f(x)
    y = m.inplace(shortcut)
    y = m.g(y)
    y = y + shortcut
    return y


@case(shortcut_is_activated_in_place)
def _(m, x, relu):
    shortcut = relu(m.f(x))
    return m.g(shortcut) + shortcut, x


def on_a_slice(m, x):
    y = m.f(x)
    y[:, :2].relu_()
    return m.g(y), y


@case(on_a_slice)
def _(m, x, relu):
    y = m.f(x)
    y = torch.cat([relu(y[:, :2]), y[:, 2:]], 1)
    return (m.g(y), y), x


def on_a_slice_of_a_slice(m, x):
    y = m.f(x)
    F.relu_(y[:, 1:4][..., ::2])
    return y


@case(on_a_slice_of_a_slice)
def _(m, x, relu):
    y = m.f(x)
    middle = relu(y[:, 1:4, ::2])
    middle = torch.stack([middle, y[:, 1:4, 1::2]], -1).flatten(-2)
    return torch.cat([y[:, :1], middle], 1), x


def on_a_slice_whose_result_is_used(m, x):
    y = m.f(x)
    z = m.inplace(y[:, 2:])
    return m.g(z), y * 2


@case(on_a_slice_whose_result_is_used)
def _(m, x, relu):
    y = m.f(x)
    z = relu(y[:, 2:])
    return (m.g(z), torch.cat([y[:, :2], z], 1) * 2), x


def on_a_transposed_view(m, x):
    y = m.f(x)
    y.transpose(1, 2).relu_()
    return y


@case(on_a_transposed_view)
def _(m, x, relu):
    return relu(m.f(x)), x


def on_a_view_while_another_view_is_read(m, x):
    y = m.f(x)
    a, b = y.view(-1, 4, 6)[:, 1:], y[:, :3]
    a.relu_()
    return b * 2, y


@case(on_a_view_while_another_view_is_read)
def _(m, x, relu):
    y = m.f(x)
    y = torch.cat([y[:, :1], relu(y[:, 1:])], 1)
    return (y[:, :3] * 2, y), x


def on_the_base_while_a_view_is_read(m, x):
    y = m.f(x)
    view = y[:, 1:3]
    y.relu_()
    return view * 2, m.g(y)


@case(on_the_base_while_a_view_is_read)
def _(m, x, relu):
    y = relu(m.f(x))
    return (y[:, 1:3] * 2, m.g(y)), x


def on_the_base_while_only_a_view_is_read(m, x):
    y = m.f(x)
    view = y.flatten(1)
    F.relu(y, inplace=True)
    return view * 2


@case(on_the_base_while_only_a_view_is_read)
def _(m, x, relu):
    return relu(m.f(x)).flatten(1) * 2, x


def on_a_chunk_of_a_detour(m, x):
    first, second = m.f(x).chunk(2, 1)
    first = first.clone().relu_()
    return first, second


@case(on_a_chunk_of_a_detour)
def _(m, x, relu):
    first, second = m.f(x).chunk(2, 1)
    return (relu(first), second), x


def on_an_unsplit_narrow(m, x):
    y = m.f(x)
    part = torch.narrow(y, 1, 1, 2)
    part.relu_()
    return part * 3, y


@case(on_an_unsplit_narrow)
def _(m, x, relu):
    y = m.f(x)
    part = relu(y[:, 1:3])
    return (part * 3, torch.cat([y[:, :1], part, y[:, 3:]], 1)), x


def on_the_input(m, x):
    x.relu_()
    return m.f(x)


@case(on_the_input)
def _(m, x, relu):
    x = relu(x)
    return m.f(x), x


def on_the_input_by_a_module(m, x):
    return m.f(m.inplace(x))


@case(on_the_input_by_a_module)
def _(m, x, relu):
    x = relu(x)
    return m.f(x), x


def on_a_view_of_the_input(m, x):
    y = x[:, :2]
    F.relu_(y)
    return m.f(y)


@case(on_a_view_of_the_input)
def _(m, x, relu):
    y = relu(x[:, :2])
    return m.f(y), torch.cat([y, x[:, 2:]], 1)


def on_what_may_be_the_input(m, x):
    y = x.contiguous().reshape(x.shape)
    y.relu_()
    return m.f(y)


@case(on_what_may_be_the_input)
def _(m, x, relu):
    x = relu(x)
    return m.f(x), x


def the_input_is_added_to(m, x):
    y = torch.relu(x)
    x += 1
    return m.f(y)


@case(the_input_is_added_to)
def _(m, x, relu):
    return m.f(relu(x)), x + 1


def the_input_is_returned(m, x):
    m.inplace(x)
    return x


@case(the_input_is_returned)
def _(m, x, relu):
    x = relu(x)
    return x, x


def twice_in_a_row(m, x):
    y = m.f(x)
    y.sub_(0.1).relu_().add_(-0.5).relu_()
    return m.g(y)


@case(twice_in_a_row)
def _(m, x, relu):
    return m.g(relu(relu(m.f(x) - 0.1) - 0.5)), x


def twice_on_discarded_results(m, x):
    y = m.f(x)
    F.relu_(y)
    y -= 0.3
    F.relu(y, inplace=True)
    return y


@case(twice_on_discarded_results)
def _(m, x, relu):
    return relu(relu(m.f(x)) - 0.3), x


def on_two_overlapping_slices(m, x):
    y = m.f(x)
    y[:, :3].relu_()
    y -= 0.2
    y[:, 1:].relu_()
    return y


@case(on_two_overlapping_slices)
def _(m, x, relu):
    y = m.f(x)
    y = torch.cat([relu(y[:, :3]), y[:, 3:]], 1) - 0.2
    return torch.cat([y[:, :1], relu(y[:, 1:])], 1), x


def then_added_to(m, x):
    y = m.f(x)
    h = y.relu_()
    h += 1
    return m.g(h) * y.sum()


@case(then_added_to)
def _(m, x, relu):
    h = relu(m.f(x)) + 1
    return m.g(h) * h.sum(), x


def out_of_place_and_its_input_written_later(m, x):
    h = m.f(x)
    y = torch.relu(h)
    h.add_(1)
    return m.g(y), h


@case(out_of_place_and_its_input_written_later)
def _(m, x, relu):
    h = m.f(x)
    return (m.g(relu(h)), h + 1), x


def out_of_place_and_the_base_written_later(m, x):
    h = m.f(x)
    y = torch.relu(h[:, :2])
    h.mul_(2)
    return y, h


@case(out_of_place_and_the_base_written_later)
def _(m, x, relu):
    h = m.f(x)
    return (relu(h[:, :2]), h * 2), x


def out_of_place_and_a_view_written_later(m, x):
    h = m.f(x)
    view = h[:, :2]
    y = torch.relu(h)
    view.zero_()
    return y, h


@case(out_of_place_and_a_view_written_later)
def _(m, x, relu):
    h = m.f(x)
    return (relu(h), torch.cat([torch.zeros_like(h[:, :2]), h[:, 2:]], 1)), x


def an_item_is_set(m, x):
    y = m.f(x)
    y.relu_()
    y[:, 0] = 0.5
    return m.g(y), y


@case(an_item_is_set)
def _(m, x, relu):
    y = relu(m.f(x))
    y = torch.cat([torch.full_like(y[:, :1], 0.5), y[:, 1:]], 1)
    return (m.g(y), y), x


def an_item_is_set_before(m, x):
    y = m.f(x)
    h = y * 1
    h[:, 1:3] = y[:, 2:]
    return torch.relu_(h), y


@case(an_item_is_set_before)
def _(m, x, relu):
    y = m.f(x)
    return (relu(torch.cat([y[:, :1], y[:, 2:], y[:, 3:]], 1)), y), x


def multiplied_in_place_under_another_name(m, x):
    y = m.f(x)
    view = y.view(y.shape)
    y.relu_()
    view *= 2
    return m.g(y)


@case(multiplied_in_place_under_another_name)
def _(m, x, relu):
    return m.g(relu(m.f(x)) * 2), x


def then_dropout_in_place(m, x):
    return m.g(m.dropout(m.inplace(m.f(x))))


@case(then_dropout_in_place)
def _(m, x, relu):
    return m.g(F.dropout(relu(m.f(x)), 0.4, m.training)), x


def functional_dropout_in_place_in_between(m, x):
    y = m.f(x)
    F.dropout(y, 0.4, m.training, True)
    y.relu_()
    return y


@case(functional_dropout_in_place_in_between)
def _(m, x, relu):
    return relu(F.dropout(m.f(x), 0.4, m.training)), x


class Reversal(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return -grad


def after_a_gradient_reversal(m, x):
    """Case 26, with a Function of the user's own."""
    return m.g(Reversal.apply(m.f(x)).relu_())


@case(after_a_gradient_reversal)
def _(m, x, relu):
    return m.g(relu(Reversal.apply(m.f(x)))), x


def under_no_grad(m, x):
    y = m.f(x)
    with torch.no_grad():
        y[:, 0].relu_()
    return torch.relu(y), y


def other_activations_in_place(m, x):
    y = m.f(x)
    torch.sigmoid_(y)
    y -= 0.5
    F.leaky_relu(y, 0.2, inplace=True)
    return F.relu_(y.neg_())


@case(other_activations_in_place)
def _(m, x, relu):
    return relu(-F.leaky_relu(torch.sigmoid(m.f(x)) - 0.5, 0.2)), x


def on_an_expanded_result(m, x):
    y = m.f(x)[:, :1].clone()
    wide = y.expand(-1, 4, -1)
    y.relu_()
    return wide * m.kept


@case(on_an_expanded_result)
def _(m, x, relu):
    return relu(m.f(x)[:, :1]).expand(-1, 4, -1) * m.kept, x


def in_a_list_and_a_dict(m, x):
    parts = [m.f(x), m.g(x)]
    named = {"first": parts[0]}
    named["first"].relu_()
    parts[1].relu_()
    return torch.cat(parts, 1)


@case(in_a_list_and_a_dict)
def _(m, x, relu):
    return torch.cat([relu(m.f(x)), relu(m.g(x))], 1), x


def concatenated_then_activated(m, x):
    parts = [m.f(x), m.g(x)]
    y = torch.cat(parts, 1)
    m.inplace(y)
    return y, parts[0]


@case(concatenated_then_activated)
def _(m, x, relu):
    a, b = m.f(x), m.g(x)
    return (relu(torch.cat([a, b], 1)), a), x


def through_a_module_that_returns_its_input(m, x):
    y = m.f(x)
    same = nn.functional.dropout(y, 0.5, training=False)
    same.relu_()
    return y, m.g(same)


@case(through_a_module_that_returns_its_input)
def _(m, x, relu):
    y = relu(m.f(x))
    return (y, m.g(y)), x


def data_is_read(m, x):
    y = m.f(x)
    alias = y.detach()
    y.relu_()
    return y + alias


@case(data_is_read)
def _(m, x, relu):
    y = relu(m.f(x))
    return y + y.detach(), x


def masked_and_filled(m, x):
    y = m.f(x)
    h = y.relu_().masked_fill_(m.kept > 1, 0.7)
    return h, y


@case(masked_and_filled)
def _(m, x, relu):
    y = relu(m.f(x)).masked_fill(m.kept > 1, 0.7)
    return (y, y), x


def copied_into(m, x):
    y = m.f(x)
    h = torch.zeros_like(y)
    h.copy_(y)
    h.relu_()
    return h, y


@case(copied_into)
def _(m, x, relu):
    y = m.f(x)
    return (relu(y), y), x


CASE = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


REFUSALS = ("modified by an inplace operation", "is being modified inplace", "in-place operation")
X = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(3))


def observe(model: nn.Module, called: Callable[[Tensor], tuple[Any, Tensor]]) -> Run:
    """Call with a tensor that the caller goes on using, and look at that tensor besides; autograd may refuse."""

    def around(leaf: Tensor) -> tuple[Any, Tensor]:
        output, x = called(leaf * 1)
        return output, x * 0.5

    seen = run(around, X, of=model, catch=RuntimeError, catch_backward=True)
    assert seen.error is None or any(text in str(seen.error) for text in REFUSALS)
    return seen


def with_x(model: nn.Module) -> Callable[[Tensor], tuple[Any, Tensor]]:
    return lambda x: (model(x), x)


rounded = functools.partial(close, rtol=1e-5, atol=1e-6)
"""For gradients of a reference, which may add them up in another order."""


def assert_same_backward(actual: Run, expected: Run, compared: Compared = identical) -> None:
    """The same gradients, or the same refusal by autograd."""
    assert str(actual.error) == str(expected.error)
    assert_same_gradients(actual, expected, compared)


def assert_same_values(actual: Run, expected: Run) -> None:
    """The same results and the same tensor of the caller's afterwards, whatever autograd says of them."""
    assert_same_forward(replace(actual, error=None), replace(expected, error=None))

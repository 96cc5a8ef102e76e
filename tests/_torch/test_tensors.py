"""What tensors and the nodes of their autograd graphs are taken to know of themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from freegrad_fx._torch.tensors import empty_like_gradient, mark_as_parameter, version

WRITES: dict[str, Callable[[Tensor], Any]] = {
    "method": lambda x: x.add_(1),
    "operator": lambda x: x.__imul__(2),
    "item": lambda x: x.__setitem__(0, 3),
    "out": lambda x: torch.sin(x, out=x),
    "function": lambda x: F.relu(x, inplace=True),
    "view": lambda x: x.view(-1)[:1].zero_(),
    "detached": lambda x: x.detach().zero_(),
}
READS: dict[str, Callable[[Tensor], Any]] = {
    "function": lambda x: F.relu(x),
    "view": lambda x: x.view(-1),
    "detach": lambda x: x.detach(),
    "clone": lambda x: x.clone().zero_(),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
@pytest.mark.parametrize("enabled", [True, False])
def test_the_version_rises_with_every_way_to_write(write: Any, enabled: bool) -> None:
    x = torch.ones(2)
    before = version(x)
    with torch.set_grad_enabled(enabled):
        write(x)
    assert version(x) > before


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_the_version_stays_with_reads(read: Any) -> None:
    x = torch.ones(2)
    before = version(x)
    read(x)
    assert version(x) == before


def test_the_version_of_a_parameter_rises_when_an_optimizer_steps() -> None:
    parameter = nn.Parameter(torch.ones(2))
    parameter.sum().backward()
    before = version(parameter)
    torch.optim.SGD([parameter], lr=0.1).step()
    assert version(parameter) > before


def test_a_marked_tensor_is_a_parameter_for_code_that_asks_for_one() -> None:
    tensor = nn.Parameter(torch.ones(2)) * 2
    assert not isinstance(tensor, nn.Parameter)
    mark_as_parameter(tensor)
    assert isinstance(tensor, nn.Parameter)
    assert type(tensor) is Tensor
    assert not isinstance(tensor * 1, nn.Parameter)


def test_a_marked_tensor_stays_in_the_autograd_graph() -> None:
    parameter = nn.Parameter(torch.ones(2))
    tensor = parameter * 2
    mark_as_parameter(tensor)
    tensor.sum().backward()
    assert parameter.grad is not None
    assert parameter.grad.tolist() == [2, 2]


class Widened(torch.autograd.Function):
    """Its output differs from its input in shape and dtype, and so does the gradient that it is given."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.ones(3, 5, dtype=torch.float64)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return torch.zeros(2)


def test_a_node_knows_the_gradient_that_it_is_given() -> None:
    y = Widened.apply(torch.ones(2, requires_grad=True))
    like = empty_like_gradient(y.grad_fn)
    assert (like.shape, like.dtype, like.device.type) == ((3, 5), torch.float64, "cpu")
    assert not like.requires_grad


def test_a_node_knows_it_too_where_what_is_computed_from_the_output_stands_for_that() -> None:
    y = Widened.apply(torch.ones(2, requires_grad=True)).sum()
    ((node, _),) = y.grad_fn.next_functions
    assert empty_like_gradient(node).shape == (3, 5)

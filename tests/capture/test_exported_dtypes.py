"""The dtype and device of the example inputs, in the capture by `torch.export`: read at each call, or checked.

The original is the oracle, in other dtypes, under autocast and on another device.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import freegrad_fx as fg
from side_by_side import Net, build, sample
from sweep import NATIVE

IDS = torch.arange(15).reshape(3, 5) % 11


class Norm(nn.Module):
    """As in Hugging Face's Llama."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, hidden: Tensor) -> Tensor:
        input_dtype = hidden.dtype
        hidden = hidden.to(torch.float32)
        hidden = hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * hidden.to(input_dtype)


class Rotary(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("inverse", 0.1 ** torch.arange(0, size, 2), persistent=False)

    def forward(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        angles = positions[..., None].float() * self.inverse.to(x.device).float()
        angles = torch.cat((angles, angles), -1)
        return angles.cos().to(dtype=x.dtype), angles.sin().to(dtype=x.dtype)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat((-b, a), -1) * sin


class Llama(nn.Module):
    def __init__(self, size: int = 8) -> None:
        super().__init__()
        self.embedding, self.rotary = nn.Embedding(11, size), Rotary(size)
        self.norm, self.last_norm = Norm(size), Norm(size)
        self.q, self.k, self.v = (nn.Linear(size, size, bias=False) for _ in range(3))
        self.gate, self.up, self.down = (nn.Linear(size, size) for _ in range(3))
        self.head = nn.Linear(size, 11)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        turn = self.rotary(x, torch.arange(ids.shape[1], device=ids.device)[None])
        h = self.norm(x)
        q, k, v = rotated(self.q(h), *turn), rotated(self.k(h), *turn), self.v(h)
        weights = F.softmax(q @ k.transpose(-1, -2), -1, dtype=torch.float32).to(q.dtype)
        x = x + weights @ v
        h = self.last_norm(x)
        return self.head(x + self.down(F.silu(self.gate(h)) * self.up(h)))


def run(model: nn.Module, x: Tensor, amp: bool = False) -> list[Tensor]:
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=amp):
        y = model(x)
    y.float().square().sum().backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return [y.detach(), *grads]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    alike = all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(one, other, strict=True))
    return alike and len(one) == len(other)


@pytest.mark.parametrize("within", [False, True], ids=["exported outside", "exported inside"])
def test_a_llama_under_autocast_and_in_other_dtypes(within: bool) -> None:
    model = build(Llama)
    with torch.autocast("cpu", torch.bfloat16, enabled=within):
        gm = fg.transform(model, NATIVE, example_inputs=(IDS,))
    for amp in (False, True):
        assert same(run(gm, IDS, amp), run(model, IDS, amp)), amp
    original = copy.deepcopy(model).double()
    assert same(run(gm.double(), IDS), run(original, IDS))
    with pytest.raises(fg.CaptureError, match=r"reads the device of a tensor, which was cpu.*meta"):
        gm.to("meta")(IDS.to("meta"))


def test_a_rule_acts_under_autocast() -> None:
    model = build(Llama)
    gm = fg.transform(model, {"silu": fg.rules.scale(s=0.0)}, example_inputs=(IDS,))
    with torch.autocast("cpu", torch.bfloat16):
        gm(IDS).float().sum().backward()
    assert not gm.gate.weight.grad.any()
    assert gm.up.weight.grad.any()


# --- conversions and questions, one by one ---


def _in_place_on_a_conversion_that_does_nothing(model: Any, h: Tensor) -> Tensor:
    h.to(torch.float32).add_(1)
    return h


def _float_beside_its_input(model: Any, h: Tensor) -> Tensor:
    return h.float() + h * h


def _to_a_tensor(model: Any, h: Tensor) -> Tensor:
    return h.to(model.g.weight) * 2 + h


def _to_a_device(model: Any, h: Tensor) -> Tensor:
    return h.to("cpu") * h.cpu()


def _back(model: Any, h: Tensor) -> Tensor:
    for _ in range(2):
        dtype = h.dtype
        h = (h.float() + 1).to(dtype)
    return h


def _alike(model: Any, h: Tensor) -> Tensor:
    return h.new_ones(6) * h + torch.zeros_like(h).type_as(h)


READ_AT_EACH_CALL = (
    *(_in_place_on_a_conversion_that_does_nothing, _float_beside_its_input, _to_a_tensor),
    *(_to_a_device, _back, _alike),
)


def _creates(model: Any, h: Tensor) -> Tensor:
    return h * torch.ones(6, dtype=h.dtype)


def _branches(model: Any, h: Tensor) -> Tensor:
    return h if h.dtype == torch.float32 else -h


def _asks(model: Any, h: Tensor) -> Tensor:
    return h * torch.finfo(h.dtype).eps if h.is_floating_point() else h


def _converts_and_creates(model: Any, h: Tensor) -> Tensor:
    dtype = h.dtype
    return h.float().to(dtype) * torch.ones(6, dtype=dtype)


def _converts_to_one_of_two(model: Any, h: Tensor) -> Tensor:
    dtype = torch.float64
    if h.shape[1] == 6:
        dtype = h.dtype
    return h.to(dtype)


CHECKED = (_creates, _branches, _asks, _converts_and_creates, _converts_to_one_of_two)


def net(between: Callable[[Any, Tensor], Tensor]) -> type[nn.Module]:
    class Between(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.act(between(self, self.f(x)))

    return Between


@pytest.mark.sampled(3)
@pytest.mark.parametrize("between", READ_AT_EACH_CALL, ids=lambda f: f.__name__)
def test_conversions_follow_the_tensors_of_the_call(between: Any) -> None:
    model = build(net(between))
    gm = fg.transform(model, NATIVE, example_inputs=(sample(),))
    for amp in (False, True):
        assert same(run(gm, sample(), amp), run(model, sample(), amp)), amp
    original, x = copy.deepcopy(model).half(), sample().half()
    assert same(run(gm.half(), x), run(original, x))


@pytest.mark.sampled(3)
@pytest.mark.parametrize("between", CHECKED, ids=lambda f: f.__name__)
def test_other_questions_are_checked_at_each_call(between: Any) -> None:
    model = build(net(between))
    gm = fg.transform(model, NATIVE, example_inputs=(sample(),))
    assert same(run(gm, sample()), run(model, sample()))
    with pytest.raises(fg.CaptureError, match=r"reads the dtype .*float32 .*bfloat16"):
        run(gm, sample(), amp=True)
    with torch.autocast("cpu", torch.bfloat16):  # the way that the error names
        inside = fg.transform(model, NATIVE, example_inputs=(sample(),))
    assert same(run(inside, sample(), True), run(model, sample(), True))


def test_a_model_that_does_not_ask_runs_on_another_device() -> None:
    gm = fg.transform(build(net(lambda _, h: h.tanh())), NATIVE, example_inputs=(sample(),))
    assert gm.to("meta")(sample().to("meta")).device.type == "meta"

"""Adapters of peft, and quantised weights of torchao, before and after the rules."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import freegrad_fx as fg
from half import HALF, HalfByHand

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
X = torch.randn(6, 4, generator=torch.Generator().manual_seed(3))


class Network(nn.Module):
    def __init__(self, activation: type[nn.ReLU] = nn.ReLU) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 2)
        self.activation = activation()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.activation(self.first(x)))


def gradients(model: nn.Module) -> list[Tensor]:
    """Those of the input and of the parameters."""
    x = X.clone().requires_grad_()
    model(x).square().sum().backward()
    return [x.grad, *(p.grad for p in model.parameters() if p.grad is not None)]  # type: ignore[list-item]


def in_a_block(model: nn.Module) -> list[Tensor]:
    with fg.use(HALF, model=model):
        return gradients(model)


def assert_equal(got: list[Tensor], expected: list[Tensor]) -> None:
    assert len(got) == len(expected)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_adapters_of_peft() -> None:
    peft = pytest.importorskip("peft", exc_type=ImportError)

    def adapted(model: nn.Module) -> Any:
        torch.manual_seed(1)
        config = peft.LoraConfig(r=2, target_modules=["first", "last"], init_lora_weights=False)
        return peft.get_peft_model(model, config)

    expected = gradients(adapted(Network(HalfByHand)))
    assert len(expected) == 5
    assert_equal(in_a_block(adapted(Network())), expected)
    assert_equal(gradients(adapted(fg.transform(Network(), HALF))), expected)
    assert_equal(gradients(fg.transform(adapted(Network()).get_base_model(), HALF)), expected)
    exported = fg.transform(adapted(Network()), HALF, example_inputs=(X,))
    assert_equal(gradients(exported), expected)
    late = adapted(fg.transform(Network(), HALF, example_inputs=(X,)))
    with pytest.raises(fg.CaptureError, match=r"first .*exchanged for a peft.*original model"):
        late(X)


def test_quantised_weights_of_torchao() -> None:
    quantization = pytest.importorskip("torchao.quantization", exc_type=ImportError)

    def quantised(model: nn.Module) -> nn.Module:
        quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
        return model

    expected = gradients(quantised(Network(HalfByHand)))
    assert_equal(gradients(quantised(fg.transform(Network(), HALF))), expected)
    assert_equal(gradients(fg.transform(quantised(Network()), HALF)), expected)
    assert_equal(in_a_block(quantised(Network())), expected)

"""A model in which what `circuit_freeze` stops has the values of another run: what is left of it is affine."""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatch
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from freegrad_fx.tables import MLPS

PATTERNS = {F.softmax, torch.softmax, Tensor.softmax}
DENOMINATORS = {torch.rsqrt, Tensor.rsqrt, torch.sqrt, Tensor.sqrt}


class Pinned(TorchFunctionMode):
    """The first run under it records attention patterns, denominators and outputs of MLPs; later ones take these."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.values: list[Tensor] = []
        self.records, self.places = True, 0
        names = dict(model.named_modules())
        matching = {n for n in names if any(fnmatch(n, pattern) for pattern in MLPS)}
        # of the modules that match, the outermost
        self.mlps = [names[n] for n in matching if not any(n.startswith(f"{m}.") for m in matching)]

    def run(self, called: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        self.places = 0
        hooks = [m.register_forward_hook(lambda m, given, y: self.pin(y)) for m in self.mlps]
        with self, torch.no_grad():
            y = called(x)
        for hook in hooks:
            hook.remove()
        self.records = False
        assert self.places == len(self.values) > 0
        return y

    def pin(self, value: Tensor) -> Tensor:
        """The value of this place in the first run."""
        if self.records:
            self.values.append(value.clone())
        pinned = self.values[self.places]
        self.places += 1
        assert pinned.shape == value.shape
        return pinned

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if function in PATTERNS | DENOMINATORS:
            return self.pin(function(*args, **kwargs))
        if function is F.scaled_dot_product_attention:
            return self.attention(*args, **kwargs)
        if function is F.layer_norm:
            return self.norm(True, *args, **kwargs)
        if function is F.rms_norm:
            return self.norm(False, *args, **kwargs)
        return function(*args, **kwargs)

    def attention(
        self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        unit = torch.eye(key.shape[-2], dtype=value.dtype).expand(*value.shape[:-1], -1)
        pattern = self.pin(F.scaled_dot_product_attention(query, key, unit, *args, **kwargs))
        if kwargs.get("enable_gqa"):
            value = value.repeat_interleave(pattern.shape[-3] // value.shape[-3], -3)
        return pattern @ value

    def norm(
        self,
        centre: bool,
        x: Tensor,
        normalized_shape: Any,
        weight: Any = None,
        bias: Any = None,
        eps: Any = 1e-5,
    ) -> Tensor:
        dims = tuple(range(-len(normalized_shape), 0))
        if not centre:
            bias, eps = None, eps if bias is None else bias  # the fourth argument of F.rms_norm
        x = x - x.mean(dims, keepdim=True) if centre else x
        y = x / self.pin((x.square().mean(dims, keepdim=True) + eps).sqrt())
        y = y if weight is None else y * weight
        return y if bias is None else y + bias


def assert_slope(
    model: nn.Module, called: Callable[[Tensor], Tensor], x: Tensor, slope: Tensor
) -> None:
    """With the frozen values pinned to those of `x`, the model is affine: a gradient is its slope at any other input.

    Args:
        model: The plain model.
        called: Runs it and returns a number.
        x: The input whose values are pinned.
        slope: The gradient at `x` that is tested.
    """
    pinned, x = Pinned(model), x.detach()
    y = pinned.run(called, x)
    torch.testing.assert_close(y, called(x), rtol=1e-6, atol=1e-6)
    others = [torch.randn_like(x) for _ in range(2)]
    changes = torch.stack([pinned.run(called, other) - y for other in others])
    expected = torch.stack([(slope * (other - x)).sum() for other in others])
    torch.testing.assert_close(expected, changes.detach(), rtol=1e-5, atol=1e-6)
    natively = torch.stack([called(other) - y for other in others])
    assert not torch.allclose(natively, changes, rtol=1e-2)

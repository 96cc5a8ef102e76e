"""Finds calls that were not traced and may compute activations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from .._torch.operators import NATIVE_ATTENTIONS
from .._torch.parametrized import is_parametrized, plain_class
from ..graph.aliasing import of_library
from ..graph.nodes import called_module, called_path
from ..graph.provenance import origin
from ..ops.functions import apply_function, function_of
from ..vocabulary.inside import computes_activations
from .operations import spelling_of
from .remarks import Opaque

__all__ = ["find_opaque"]


# Modules of torch.nn that are recorded as one call and contain activations or softmaxes
_COMPOSITES: tuple[type[nn.Module], ...] = (
    nn.MultiheadAttention,
    nn.Transformer,
    nn.TransformerEncoder,
    nn.TransformerEncoderLayer,
    nn.TransformerDecoder,
    nn.TransformerDecoderLayer,
    nn.RNNBase,
    nn.RNNCellBase,
    nn.AdaptiveLogSoftmaxWithLoss,
    nn.CrossEntropyLoss,
    nn.MultiLabelSoftMarginLoss,
)


def _computes(parametrization: nn.Module) -> bool:
    """Whether a parametrization may compute activations. PyTorch's own, such as weight norm, do not."""
    kind = type(parametrization)
    return not kind.__module__.startswith("torch.nn.utils.") and kind is not nn.ModuleDict


# Functions that contain a softmax or gates
_ATTENTIONS = frozenset(
    {
        F.scaled_dot_product_attention,
        F.multi_head_attention_forward,
        F.gumbel_softmax,
        F.multilabel_soft_margin_loss,
        *NATIVE_ATTENTIONS,
        torch.ops.aten.scaled_dot_product_attention.default,
        torch.ops.aten.lstm.input,
        torch.ops.aten.gru.input,
        torch.ops.aten.rnn_tanh.input,
        torch.ops.aten.rnn_relu.input,
    }
)


def _whole(module: nn.Module) -> str:
    """The reason why a module call may compute activations that were not traced; ``""`` if there is none."""
    of_ao = plain_class(module).__module__.startswith("torch.ao.nn.")
    if isinstance(module, _COMPOSITES) or (of_ao and computes_activations(module)):
        return "PyTorch computes its activations inside one call"
    if isinstance(module, torch.jit.ScriptModule):
        return "TorchScript code cannot be traced"
    if is_parametrized(module) and any(
        map(_computes, module.get_submodule("parametrizations").modules())
    ):
        return "its parametrization is computed inside one call"
    return ""


def find_opaque(
    graph: fx.Graph,
    root: nn.Module,
    types: Sequence[type[Any]] = (),
    leaf_modules: Sequence[type[nn.Module]] = (),
) -> list[Opaque]:
    """List the calls of a graph that were not traced, are not sites, and may compute activations.

    Args:
        graph: A captured graph.
        root: The module whose submodules the graph calls.
        types: Classes whose calls are sites.
        leaf_modules: Module classes that the caller has excluded from tracing.
    """
    found: dict[Opaque, None] = {}
    for node in graph.nodes:
        where = origin(node)
        module = called_module(node, root)
        if module is not None:
            asked = isinstance(module, tuple(leaf_modules))
            reason = "its class is in leaf_modules" if asked else _whole(module)
            if reason and not isinstance(module, tuple(types)):
                what = f"{type(module).__name__}, kept as one opaque call"
                found[Opaque(called_path(node), what, reason, where.source, asked)] = None
        elif node.target is apply_function:
            if issubclass(function_of(str(node.args[0])), tuple(types)):
                continue
            what = f"autograd.Function {node.args[0]}"
            found[Opaque(where.owner, what, "keeps its own backward", where.source)] = None
        elif node.op == "call_function" and not isinstance(node.target, type):
            if node.target in _ATTENTIONS:
                reason = "PyTorch computes activations inside of this call"
                found[Opaque(where.owner, spelling_of(node, None, False), reason, where.source)] = (
                    None
                )
            if not of_library(node.target):
                name = f"{node.target.__module__}.{getattr(node.target, '__name__', node.target)}"
                what = f"function {name}, kept as one opaque call"
                reason = "it is wrapped with torch.fx.wrap"
                found[Opaque(where.owner, what, reason, where.source)] = None
    return list(found)

"""Ready tables for attribution: frozen attention patterns and norms, and layer-wise relevance propagation.

Each function returns a `RuleTable`, which can be printed, changed, joined with others by ``+``, and saved as TOML. Put
entries of your own before it: the first entry that matches a place decides.
"""

from __future__ import annotations

from collections.abc import Sequence

from .table import Entry, RuleTable, on

__all__ = ["attn_lrp", "circuit_freeze", "cp_lrp", "gim", "relp"]

MLPS = ("*mlp*", "*intermediate*", "*feed_forward*", "*ffn*")
"""Patterns for the paths of the blocks between attentions, as models of Hugging Face and torchvision name them."""

GATES = ("*mlp", "*mlp.experts*", "*feed_forward", "*ffn", "*experts*")
"""Patterns for the paths of the modules that multiply a gate."""

# With f(0) = 0, so that y/x is finite
_ACTIVATIONS = ["relu", "gelu", "silu", "mish", "tanh", "hardswish", "leaky_relu", "elu", "selu"]
_ALL = ("norm", "attention", "gate")
_ATTENTION = "scaled_dot_product_attention"


def circuit_freeze(*, mlps: Sequence[str] = MLPS, strict: bool = False) -> RuleTable:
    """A table that stops the gradient at attention patterns, at the denominators of norms, and at MLPs.

    Gradients flow through the residual stream, the values of attention and the linear part of norms only, so that what
    is left of the model is linear: its second derivatives are 0. This is the replacement model of attribution graphs.

    Args:
        mlps: Patterns for the paths of the modules whose linear layers no gradient passes; an empty list for none.
        strict: Whether a norm, an attention or a softmax that the table does not reach is an error; see `RuleTable`.

    Source: Ameisen et al. 2025, Circuit tracing (transformer-circuits.pub); circuit-tracer.

    Example:
        >>> import freegrad_fx as fg
        >>> table = fg.tables.circuit_freeze()
        >>> print(table[0])
        on('softmax', at='output', optional=True).backward('stop')
    """
    stopped = [on("linear", module=list(mlps), at="output", optional=True)] if mlps else []
    entries = [
        *_stopped_patterns(),
        *_frozen_norms(),
        *(sites.backward("stop") for sites in stopped),
    ]
    return RuleTable(entries, ("norm", "attention") if strict else ())


def cp_lrp(*, gates: Sequence[str] = GATES, strict: bool = False) -> RuleTable:
    """A table for layer-wise relevance propagation with constant attention patterns and norms.

    Value times gradient is relevance. It is conserved in a model without biases, if `gates` names every gate.

    Args:
        gates: Patterns for the paths of the modules that multiply a gate; an empty list for none.
        strict: Whether a norm, an attention, a softmax or a gate that the table does not reach is an error; see
            `RuleTable`. A `use` block, `compile` and `backend` do not look for gates.

    Source: Ali et al. 2022, arXiv:2202.07304. The README of LXT says that layer-wise relevance propagation is patented,
    and free for personal and scientific use.
    """
    entries = [*_stopped_patterns(), *_frozen_norms(), *_identity(), *_half_gates(gates)]
    return RuleTable(entries, _ALL if strict else ())


def attn_lrp(*, gates: Sequence[str] = GATES, strict: bool = False) -> RuleTable:
    """A table for layer-wise relevance propagation through attention, AttnLRP.

    Value times gradient is relevance.

    Args:
        gates: As for `cp_lrp`.
        strict: As for `cp_lrp`.

    Source: Achtibat et al. 2024, arXiv:2402.05602. See `cp_lrp` for the patent.
    """
    entries = [*_half_products(), *_frozen_norms(), *_identity(), *_half_gates(gates)]
    return RuleTable(entries, _ALL if strict else ())


def relp(
    *, gates: Sequence[str] = GATES, patterns: bool = False, strict: bool = False
) -> RuleTable:
    """A table for relevance patching: attribution patching with the coefficients of layer-wise relevance propagation.

    Args:
        gates: As for `cp_lrp`.
        patterns: Whether attention patterns are constant.
        strict: As for `cp_lrp`.

    Source: Jafari et al. 2025, arXiv:2508.21258. See `cp_lrp` for the patent.
    """
    stopped = _stopped_patterns() if patterns else []
    entries = [*stopped, *_frozen_norms(), *_identity(), *_half_gates(gates)]
    return RuleTable(entries, (_ALL if patterns else ("norm", "gate")) if strict else ())


def gim(
    *, gates: Sequence[str] = GATES, temperature: float = 2.0, strict: bool = False
) -> RuleTable:
    """A table for gradient interaction modifications, GIM.

    The softmax of attention has a higher temperature in the backward, norms have constant denominators, and the
    gradients of products are divided among their factors.

    Args:
        gates: As for `cp_lrp`.
        temperature: The temperature of the softmax in the backward.
        strict: As for `cp_lrp`.

    Source: Edin et al. 2025, arXiv:2505.17630.
    """
    softmax = on("softmax", optional=True).backward("softmax_temperature", temperature=temperature)
    fused = on(_ATTENTION, optional=True).backward("attention_temperature", temperature=temperature)
    entries = [softmax, fused, *_half_products(), *_frozen_norms(), *_half_gates(gates)]
    return RuleTable(entries, _ALL if strict else ())


def _stopped_patterns() -> list[Entry]:
    """No gradient passes an attention pattern, in an own softmax or inside of PyTorch's attention."""
    return [
        on("softmax", at="output", optional=True).backward("stop"),
        on(_ATTENTION, at=["query", "key"], optional=True).backward("stop"),
    ]


def _frozen_norms() -> list[Entry]:
    """The denominators of norms are constant; that of a norm in separate operations is an `rsqrt` or a `sqrt`."""
    return [
        on(["layer_norm", "rms_norm", "group_norm"], optional=True).backward("frozen_norm"),
        on(["rsqrt", "sqrt"], at="output", optional=True).backward("stop"),
    ]


def _half_products() -> list[Entry]:
    """Of both products of attention, each factor gets half."""
    return [
        on("matmul", at="output", optional=True).backward("half"),
        on(_ATTENTION, at=["query", "key"], optional=True).backward("scale", s=0.25),
        on(_ATTENTION, at="value", optional=True).backward("scale", s=0.5),
    ]


def _half_gates(gates: Sequence[str]) -> list[Entry]:
    if not gates:
        return []
    return [on("mul", module=list(gates), at="output", optional=True).backward("half")]


def _identity() -> list[Entry]:
    return [on(_ACTIVATIONS, optional=True).backward("identity_rule")]

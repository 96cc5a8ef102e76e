"""Ready tables: attribution, feedback alignment, quantized weights, and less memory in training.

Each function returns a `RuleTable`, which can be printed, changed, joined with others by ``+``, and saved as TOML. Put
entries of your own before it: the first entry that matches a place decides.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from . import quantizers
from .core.rule import get
from .table import Entry, RuleTable, Selection, on

__all__ = [
    "attn_lrp",
    "binary_weights",
    "circuit_freeze",
    "cp_lrp",
    "deconvnet",
    "epsilon_alpha2_beta1",
    "epsilon_gamma_box",
    "epsilon_plus",
    "feedback_alignment",
    "gim",
    "guided_backprop",
    "lsq",
    "relp",
    "save_memory",
    "ternary_weights",
]


def __dir__() -> list[str]:
    return __all__


MLPS = ("*mlp*", "*intermediate*", "*feed_forward*", "*ffn*")
"""Patterns for the paths of the blocks between attentions, as models of Hugging Face and torchvision name them."""

GATES = ("*mlp", "*mlp.experts*", "*feed_forward", "*ffn", "*experts*")
"""Patterns for the paths of the modules that multiply a gate."""

# With f(0) = 0, so that y/x is finite
_ACTIVATIONS = ["relu", "gelu", "silu", "mish", "tanh", "hardswish", "leaky_relu", "elu", "selu"]
# Also with the batch norm behind them as one layer
_CONVS = ["conv_bn", "conv"]
_ALL = ("norm", "attention", "gate")
_ATTENTION = "scaled_dot_product_attention"


def circuit_freeze(*, mlps: Sequence[str] = MLPS, strict: bool = False) -> RuleTable:
    """A table that stops the gradient at attention patterns, at the denominators of norms, and at MLPs.

    Gradients flow through the residual stream, the values of attention and the linear part of norms only, so that what
    is left of the model is linear: its second derivatives are 0. This is the replacement model of attribution graphs.

    Args:
        mlps: Patterns for the paths of the MLPs: of their linear layers, or of modules that contain these. No gradient
            passes these layers. An empty list for none. Patterns of your own have to match.
        strict: Whether a norm, an attention or a softmax that the table does not reach is an error; see `RuleTable`.

    Source: Ameisen et al. 2025, Circuit tracing (transformer-circuits.pub); circuit-tracer.

    Example:
        >>> import freegrad_fx as fg
        >>> table = fg.tables.circuit_freeze()
        >>> print(table[0])
        on('softmax', at='output', optional=True).backward('stop')
    """
    if isinstance(mlps, str):
        raise TypeError(f"mlps has to be a list of patterns, got {mlps!r}. Write mlps=[{mlps!r}].")
    stopped = [on("linear", module=list(mlps), at="output", optional=True)] if mlps else []
    if mlps is not MLPS:  # each of the caller's own has to match
        stopped = [on("linear", module=[p, f"{p}.*"], at="output") for p in mlps]
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


# --- convolutional networks ---


def guided_backprop() -> RuleTable:
    """A table that passes a gradient at a ReLU where it and the input are positive.

    Source: Springenberg et al. 2015, arXiv:1412.6806; Captum GuidedBackprop, zennit GuidedBackprop.
    """
    return RuleTable([on("relu").backward("guided")])


def deconvnet() -> RuleTable:
    """A table that passes a gradient at a ReLU where it is positive.

    Source: Zeiler & Fergus 2014, arXiv:1311.2901; Captum Deconvolution, zennit DeconvNet.
    """
    return RuleTable([on("relu").backward("deconvnet")])


def epsilon_plus(*, epsilon: float = 1e-6) -> RuleTable:
    """A table for layer-wise relevance propagation: z⁺ at convolutions, ε at linear layers.

    Value times gradient is relevance. A convolution with the batch norm behind it is one layer; the model has to be in
    eval mode.

    Args:
        epsilon: The stabiliser of both rules.

    Source: zennit EpsilonPlus. See `cp_lrp` for the patent.
    """
    conv = on(_CONVS, optional=True).backward("lrp_zplus", epsilon=epsilon)
    return RuleTable([conv, _epsilon(epsilon), *_identity()])


def epsilon_alpha2_beta1(*, epsilon: float = 1e-6) -> RuleTable:
    """A table for layer-wise relevance propagation: α = 2, β = 1 at convolutions, ε at linear layers.

    Value times gradient is relevance.

    Args:
        epsilon: The stabiliser of both rules.

    Source: zennit EpsilonAlpha2Beta1; `epsilon_plus` says more of batch norms. See `cp_lrp` for the patent.
    """
    conv = on(_CONVS, optional=True).backward(
        "lrp_alpha_beta", alpha=2.0, beta=1.0, epsilon=epsilon
    )
    return RuleTable([conv, _epsilon(epsilon), *_identity()])


def epsilon_gamma_box(
    low: float = -2.118, high: float = 2.64, *, gamma: float = 0.25, epsilon: float = 1e-6
) -> RuleTable:
    """A table for layer-wise relevance propagation: zᴮ at the first convolution, γ at the others, ε at linear layers.

    The gradient of the input is its relevance, which `attribute` does not multiply by the input. Value times gradient
    is the relevance of what comes after the first convolution.

    Args:
        low: The smallest value of the input. The default is that of images as torchvision's models take them.
        high: The largest one.
        gamma: How much more the positive weights count.
        epsilon: The stabiliser of all rules.

    Source: zennit EpsilonGammaBox; `epsilon_plus` says more of batch norms. See `cp_lrp` for the patent.
    """
    first = on(_CONVS, first=True).backward("lrp_zbox", low=low, high=high, epsilon=epsilon)
    conv = on(_CONVS, optional=True).backward("lrp_gamma", gamma=gamma, epsilon=epsilon)
    return RuleTable([first, conv, _epsilon(epsilon), *_identity()])


# --- training ---


def feedback_alignment() -> RuleTable:
    """A table that gives each linear layer and convolution a fixed random matrix in the place of its weight, backward.

    The weights themselves keep their native gradient. Each layer has a matrix of its own.

    Source: Lillicrap et al. 2016, doi:10.1038/ncomms13276.
    """
    return RuleTable([on(["linear", "conv"]).backward("feedback_alignment")])


def binary_weights(*, scale: bool = True) -> RuleTable:
    """A table through which the weights of linear layers and convolutions are read as two values.

    Args:
        scale: Whether each output channel keeps its mean magnitude, as in XNOR-Net.

    Source: as for `quantizers.binary`.
    """
    return RuleTable([_weights().backward(quantizers.binary(scale=scale))])


def ternary_weights(*, scale: bool = True) -> RuleTable:
    """A table through which the weights of linear layers and convolutions are read as three values.

    Args:
        scale: Whether the weights keep their mean magnitude.

    Source: as for `quantizers.ternary`.
    """
    return RuleTable([_weights().backward(quantizers.ternary(scale=scale))])


def lsq(bits: int = 4, *, per_channel: bool = False) -> RuleTable:
    """A table through which the weights of linear layers and convolutions are read as 2^bits levels with a learnt step.

    Each weight has a step of its own, which is among the parameters of the transformed model. Activations stay as they
    are.

    Args:
        bits: The number of bits, 2 to 16.
        per_channel: Whether each output channel has its own step.

    Raises:
        RuleError: The number of bits is not supported.

    Source: as for `quantizers.lsq`.
    """
    return RuleTable([_weights().backward(quantizers.lsq(bits, per_channel))])


def save_memory(
    *,
    relu: bool = False,
    frozen: bool = False,
    recompute: int = 0,
    gates: Sequence[str] = GATES,
) -> RuleTable:
    """A table with which a training step keeps less memory, and has the same gradients up to rounding.

    Args:
        relu: Whether every ReLU keeps one bit for each entry. This saves memory only where the next operation does not
            keep its input, for example before a pool, a sum or a frozen layer; elsewhere it costs that bit.
        frozen: Whether convolutions, and batch norms in eval mode, keep their input only if their weight is trained. It
            saves nothing in a model whose weights are all trained.
        recompute: The number of operations that the backward may compute again for the input of a convolution, which is
            then not kept: ReLUs, batch norms, sums and max pools, whose inputs are kept. A ResNet keeps about half of
            what it keeps natively with 16. It includes `relu`, and takes time. It acts in eager mode only.
        gates: Patterns for the paths of the modules that multiply ``silu(gate)`` and another tensor. Only there is the
            output of a SiLU computed again. An empty list for none.

    Source: the rules ``exact_*``. `freegrad_fx.memory` shows what is kept.

    Example:
        >>> import freegrad_fx as fg
        >>> print(fg.tables.save_memory(gates=[])[0])
        on('max_pool', optional=True).backward('exact_max_pool')
    """
    ops = ["max_pool", "avg_pool", "layer_norm", "rms_norm", "leaky_relu", "dropout"]
    again = bool(recompute)
    ops += ["relu"] * (relu or again) + ["batch_norm"] * (frozen or again) + ["add"] * again
    entries = [on(op, optional=True).backward(f"exact_{op}") for op in ops]
    if frozen or again:
        conv = get("exact_conv")(recompute=recompute) if again else "exact_conv"
        entries.append(on("conv", optional=True).backward(conv))
    if gates:
        inside = [p for path in gates for p in (path, f"{path}.*")]
        entries.append(on("silu", module=inside, optional=True).backward("exact_silu"))
        entries.append(on("mul", module=list(gates), optional=True).backward("exact_mul"))
    return RuleTable(entries)


def _weights() -> Selection:
    kinds: list[Any] = [nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d]
    return on(parameter="*weight", type=kinds)


def _epsilon(epsilon: float) -> Entry:
    return on(["linear_bn", "linear"], optional=True).backward("lrp_epsilon", epsilon=epsilon)


def _stopped_patterns() -> list[Entry]:
    """No gradient passes an attention pattern, in an own softmax or inside of PyTorch's attention."""
    return [
        on("softmax", at="output", optional=True).backward("stop"),
        on(_ATTENTION, at=["query", "key"], optional=True).backward("stop"),
    ]


def _frozen_norms() -> list[Entry]:
    """The denominators of norms are constant.

    That of a norm in separate operations which is not found as one operation is an `rsqrt` or a `sqrt`.
    """
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

"""The targets, as data: the limits for the time or the memory, relative to another candidate of the same group.

A candidate without a target is shown relative to native PyTorch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import freegrad_fx as fg

from ._cases import (
    CHAIN,
    EXTENSION,
    FUSED,
    LESS_THAN_X,
    MASKED,
    MEASURED,
    NATIVE,
    NATIVE_RELU,
    SPIKING_STEPS,
    STEP_RULES,
    is_ours,
)  # fmt: skip
from ._measure import Comparison, Spread
from ._networks import LAYERS, SMALL_RULES, SPIKING
from ._peers import PEERS, peer_of
from .memory import CASES

FASTEST_PEER = "the fastest peer"


@dataclass(frozen=True)
class Target:
    """A limit.

    Attributes:
        section: The section that the target applies to.
        over: The candidate that the limit is relative to: a candidate, a peer, or `FASTEST_PEER`.
        limit: The maximum of the median; None to show a ratio without a limit.
        names: The candidates that it applies to; empty for all of this package.
        groups: The groups that it applies to; empty for all.
        median_limit: A higher limit of the median, for noisy measurements. If it is given, a first quartile within
            `limit`, or a median within `median_limit`, counts as "within noise".
    """

    section: str
    over: str
    limit: float | None
    names: tuple[str, ...] = ()
    groups: tuple[str, ...] = ()
    median_limit: float | None = None

    def verdict(self, found: Spread) -> str:
        """Whether a measurement meets the target: "met", "missed" or "within noise"; empty without a limit."""
        if self.limit is None:
            return ""
        if found.median <= self.limit:
            return "met"
        if self.median_limit is None:
            return "missed"
        near = found.low <= self.limit or found.median <= self.median_limit
        return "within noise" if near else "missed"


# Rules that read only the gradient, without those that draw random numbers.
GRADIENT_ALONE = ("d(Linear)", "straight_through", "scale", "reverse", "clip_value")
# The forward of snnTorch's and SpikingJelly's surrogates.
ON_HEAVISIDE = ("triangular on heaviside", "fast_sigmoid on heaviside", "arctan on heaviside")
PIECES = ("triangular", "fast_sigmoid", "triangular on heaviside", "fast_sigmoid on heaviside")
OTHERS = (
    "arctan", "arctan on heaviside", "noise", "full_jam", "positive_jam", "rectangular_jam",
)  # fmt: skip
# Rules that the extension runs as one kernel.
LIGHT = (*GRADIENT_ALONE, "rectangular", "d(ReLU)", "triangular", "fast_sigmoid", "arctan")
# Rules by what they save. A rule of y saves nothing more, as the next layer keeps its input.
OF_NOTHING = (*(name for name in MEASURED if not fg.get(name).inputs), "a rule of y")
OF_X = (*(name for name in MEASURED if "x" in fg.get(name).inputs and name not in LESS_THAN_X),)
# Whose mask is computed in one pass; random rules spend their time in the generator.
LIGHT_MASKS = tuple(
    f"{n}, save=mask" for n in ("d(ReLU)", "guided", "rectangular", "clipped_straight_through")
)
OF_A_MASK = (*(f"{name}, save=mask" for name in MASKED),)
# Usual networks, in which a rule is hardly visible.
USUAL = ("MLP 8×256", "resnet18", "vgg11_bn", "ViT, 4 layers of 128")


def extended(names: tuple[str, ...]) -> tuple[str, ...]:
    """The candidates with the C++ extension."""
    return (*(f"{name}{EXTENSION}" for name in names),)


SURROGATES = (*SMALL_RULES[SPIKING],)
# In `steps`.
PLAIN = (*(name for name, (_, options) in STEP_RULES.items() if not options),)
SPIKING_RULES = (*PLAIN, "arctan, heaviside")

TARGETS = (
    Target("operators", NATIVE_RELU, 1.3, (*GRADIENT_ALONE, "d(ReLU)")),
    Target("operators", NATIVE_RELU, 1.5, ("rectangular", "clipped_straight_through", "guided")),
    Target("operators", NATIVE_RELU, 1.4, extended(LIGHT_MASKS)),
    Target("operators", FASTEST_PEER, 0.4, (*PIECES, *extended(PIECES))),
    Target("operators", FASTEST_PEER, 0.5, (*OTHERS, *extended(OTHERS))),
    Target("small", NATIVE_RELU, 1.7, LIGHT),
    Target("small", NATIVE_RELU, 1.05, extended(LIGHT)),
    *(
        Target("small", peer, limit, names)
        for peer in ("snnTorch", "SpikingJelly", "FreeGrad")
        for limit, names in (
            (None, (*LIGHT, *ON_HEAVISIDE)),
            (0.4, extended((*LIGHT, *ON_HEAVISIDE))),
        )
    ),
    Target("small-steps", NATIVE, 1.4, tuple(SMALL_RULES[LAYERS]), (LAYERS,)),
    Target("small-steps", NATIVE, 1.03, extended(tuple(SMALL_RULES[LAYERS])), (LAYERS,)),
    Target("small-steps", NATIVE, 1.03, extended(SURROGATES), (SPIKING,)),
    Target("small-steps", "snnTorch", 0.8, extended(SURROGATES), (SPIKING,)),
    Target("compiled", NATIVE_RELU, 2.0),
    Target("compiled", f"{NATIVE_RELU}, compiled", None),
    *(Target("fuse", rule, None, (f"{rule}, fuse",)) for rule in FUSED),
    Target("steps", NATIVE, 1.02, (*PLAIN, *extended(PLAIN)), USUAL),
    Target("steps", NATIVE, 1.03, extended(SPIKING_RULES), (SPIKING_STEPS,)),
    Target("steps", "snnTorch", 0.8, extended(("arctan, heaviside",)), (SPIKING_STEPS,)),
    Target("compiled-steps", NATIVE, 1.0, median_limit=1.02),
    Target("transform", f"{NATIVE} symbolic_trace", 2.5, groups=("resnet152", "vit_l_16")),
    Target("transform", "transform, 1000", 4.5, groups=(CHAIN,)),
    Target("memory", NATIVE, 0.0, OF_NOTHING),
    Target("memory", NATIVE, 4.0, OF_X),
    Target("memory", NATIVE, 1.0, OF_A_MASK),
    *(
        Target("model-memory", NATIVE, case.target, (case.table,), (case.name,))
        for case in CASES
        if case.target is not None
    ),
    Target("compile", NATIVE, 1.2),
)


def targets(section: str, group: str, name: str) -> Iterator[Target]:
    """The targets of a candidate."""
    if not is_ours(name):
        return
    for target in TARGETS:
        here = target.section == section and (not target.groups or group in target.groups)
        if here and name != target.over and (not target.names or name in target.names):
            yield target


def baseline(target: Target, times: Comparison) -> str | None:
    """The candidate that a target is relative to; None if the peer does not have the rule."""
    names = list(times.times)
    if target.over == FASTEST_PEER:
        return min(filter(peer_of, names), key=times.seconds, default=None)
    if target.over in PEERS:
        theirs = [name for name in names if peer_of(name) == target.over]
        return min(theirs, key=times.seconds, default=None)
    return target.over if target.over in names else None

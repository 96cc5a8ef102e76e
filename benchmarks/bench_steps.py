"""A training step of a whole model: forward, backward, SGD; native and with rules. Compare within a group."""

from __future__ import annotations

from typing import Any

import pytest

from . import _cases as cases


@pytest.mark.parametrize("candidate", [cases.NATIVE, *cases.STEP_RULES])
@pytest.mark.parametrize("name", cases.MODELS)
def bench_step(benchmark: Any, name: str, candidate: str, quick: bool) -> None:
    """In eager mode."""
    benchmark.group = name
    model = cases.made(candidate, cases.step_models(name, quick)[candidate])
    step = cases.training_step(model, cases.MODELS[name].input(quick))
    step()
    benchmark(step)


@pytest.mark.parametrize("candidate", [cases.NATIVE, *cases.COMPILED_RULES])
@pytest.mark.parametrize("name", cases.MODELS)
@pytest.mark.usefixtures("compiler")
def bench_compiled_step(benchmark: Any, name: str, candidate: str, quick: bool) -> None:
    """With torch.compile. The compilation is not measured, but takes minutes."""
    if quick and (not name.startswith("MLP") or candidate not in (cases.NATIVE, "rectangular")):
        pytest.skip("--quick compiles the MLP under one rule alone")
    benchmark.group = f"{name}, compiled"
    model = cases.compiled(cases.step_models(name, quick)[candidate]())
    step = cases.training_step(model, cases.MODELS[name].input(quick))
    step()
    benchmark(step)


@pytest.mark.parametrize(
    "candidate",
    ["native gradient", "guided", "Captum GuidedBackprop", "zennit GuidedBackprop"],
)
@pytest.mark.filterwarnings("ignore:Setting backward hooks on ReLU activations")
def bench_attribution(benchmark: Any, candidate: str, quick: bool) -> None:
    """Guided backpropagation of a small network."""
    benchmark.group = "guided backpropagation"
    steps = cases.attributions(quick)
    if candidate not in steps:
        pytest.skip(f"{candidate.split()[0]} is not installed: pip install -e '.[peers]'")
    benchmark(steps[candidate])

"""`freegrad_fx.compat.freegrad` beside the package `freegrad` itself, and under that package's own tests."""

from __future__ import annotations

import importlib
import inspect
import os
import pkgutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import freegrad as theirs
import freegrad.functional
import freegrad.hook
import freegrad.registry
import freegrad.wrappers
import pytest
import torch
from torch import Tensor, nn

import freegrad_fx as fg
import freegrad_fx.compat.freegrad as ours
from places import IMPORTABLE

FORWARDS = [*theirs.wrappers._FWD_MAP]
# A rule, values for its parameters, and whether it can do without an input.
RULES: dict[str, tuple[str, dict[str, Any], bool]] = {
    "d(ReLU)": ("d(ReLU)", {}, True),
    "d(Linear)": ("d(Linear)", {}, True),
    "rectangular": ("rectangular", {"a": -0.3, "b": 0.8}, False),
    "triangular": ("triangular", {"width": 0.7}, False),
    "scale": ("scale", {"s": -2.0}, True),
    "clip_norm": ("clip_norm", {"max_norm": 0.1}, True),
    "noise": ("noise", {"sigma": 0.3}, True),
    "centralize": ("centralize", {"dim": 0}, True),
    "full_jam": ("full_jam", {}, True),
    "positive_jam": ("positive_jam", {}, True),
    "rectangular_jam": ("rectangular_jam", {"a": -0.5, "b": 1.0}, True),
    "parameters that a rule does not know": ("scale", {"s": 3.0, "a": 7}, True),
}
ENDS = torch.tensor([[0.0, -0.0, 6.0, -0.3, 0.8], [1.0, -2.0, 0.1, 7.0, 0.5]])


def input_or_none(ctx: Any, grad_out: Tensor, tin: Tensor | None, **params: Any) -> Tensor:
    assert ctx is None
    return grad_out * params["s"] * (2.0 if tin is None else tin.cos())


@pytest.fixture(autouse=True)
def _a_rule_that_both_know(monkeypatch: pytest.MonkeyPatch) -> None:
    for package in (theirs, ours):
        registry = importlib.import_module(f"{package.__name__}.registry")
        monkeypatch.setattr(registry, "_RULES", dict(registry._RULES))
        package.register("test: input or none")(input_or_none)


def gradient(package: ModuleType, run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    torch.manual_seed(0)
    x = x.clone().requires_grad_()
    (result,) = torch.autograd.grad(run(x).pow(2).sum(), x)
    return result


def packages_in(package: ModuleType) -> Iterator[str]:
    yield ""
    for module in pkgutil.walk_packages(package.__path__):
        yield f".{module.name}"
    yield from (".transforms.basic", ".transforms.jamming")


# --- names and signatures ---


@pytest.mark.parametrize(
    "path", sorted(set(packages_in(theirs))), ids=lambda path: path or "freegrad"
)
def test_every_public_name_is_there_with_its_signature(path: str) -> None:
    original = importlib.import_module(f"freegrad{path}")
    compatible = importlib.import_module(f"freegrad_fx.compat.freegrad{path}")
    for name, value in vars(original).items():
        if name.startswith("_") or getattr(value, "__module__", None) != original.__name__:
            continue
        assert hasattr(compatible, name) or name == "nullcontext", name
        if inspect.isfunction(value) or name in ("use", "Activation"):
            found = [*inspect.signature(getattr(compatible, name)).parameters.values()]
            wanted = [*inspect.signature(value).parameters.values()]
            assert [(p.name, p.kind, p.default) for p in found] == [
                (p.name, p.kind, p.default) for p in wanted
            ], name
    assert set(getattr(original, "__all__", ())) <= set(dir(compatible))


def test_the_same_rules_are_registered() -> None:
    """Those of the packages alone: test modules register some at import."""
    found = {n for n, f in ours.registry._RULES.items() if f.__module__.startswith("freegrad_fx.")}
    assert found == {n for n in theirs.registry._RULES if "test" not in n}


# --- layers ---


@pytest.mark.sampled(3)
@pytest.mark.parametrize("forward", FORWARDS)
@pytest.mark.parametrize("case", RULES)
def test_a_layer_under_a_rule_computes_what_freegrads_does(forward: str, case: str) -> None:
    rule, params, _ = RULES[case]

    def run(package: ModuleType) -> tuple[Tensor, Tensor]:
        layer = package.wrappers.Activation(forward)
        with package.use(rule, params=params):
            return layer(ENDS), gradient(package, layer, ENDS)

    for found, wanted in zip(run(ours), run(theirs), strict=True):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("forward", [f for f in FORWARDS if f != "Heaviside"])
def test_a_layer_without_a_rule_has_the_gradient_that_freegrads_has(forward: str) -> None:
    found = gradient(ours, ours.Activation(forward), ENDS)
    assert torch.equal(found, gradient(theirs, theirs.Activation(forward), ENDS))


def test_the_native_gradient_of_a_step_is_zero_where_freegrad_has_none() -> None:
    with pytest.raises(RuntimeError, match="heaviside"):
        gradient(theirs, theirs.Activation("Heaviside"), ENDS)
    assert not gradient(ours, ours.Activation("Heaviside"), ENDS).any()


@pytest.mark.parametrize("forward", [f for f in FORWARDS if f != "Heaviside"])
def test_second_derivatives_without_a_rule_are_torchs_own(forward: str) -> None:
    x = torch.randn(6, dtype=torch.float64, requires_grad=True)
    layer = ours.Activation(forward)
    assert torch.autograd.gradgradcheck(lambda t: layer(t) * t, x)


@pytest.mark.slow
def test_layers_compile_into_one_graph_and_follow_the_blocks() -> None:
    layer = nn.Sequential(ours.Activation("Tanh"), ours.Activation("ReLU6"))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    native = gradient(ours, layer, ENDS)
    assert torch.equal(gradient(ours, compiled, ENDS), native)
    for rule, params in [("scale", {"s": 3.0}), ("rectangular", {}), ("scale", {"s": 4.0})]:
        with theirs.use(rule, params):
            wanted = gradient(
                theirs, nn.Sequential(theirs.Activation("Tanh"), theirs.Activation("ReLU6")), ENDS
            )
        with ours.use(rule, params):
            torch.testing.assert_close(gradient(ours, compiled, ENDS), wanted)
    assert torch.equal(gradient(ours, compiled, ENDS), native)


def test_ambient_sites_of_a_transformed_model_follow_the_blocks_too() -> None:
    gm = fg.transform(nn.Sequential(nn.ReLU()))
    with ours.use("test: input or none", {"s": 2.0}):
        found = gradient(ours, gm, ENDS)
    with theirs.use("test: input or none", {"s": 2.0}):
        assert torch.equal(found, gradient(theirs, theirs.Activation("ReLU"), ENDS))


# --- blocks ---


def nested(package: ModuleType) -> list[Tensor]:
    """Blocks in blocks, with other rules, parameters and scopes, an exception, and a backward outside."""
    layer, seen = package.wrappers.Activation("ReLU"), []

    def look() -> None:
        seen.append(gradient(package, layer, ENDS))

    look()
    with package.use("scale", {"s": 2.0}):
        look()
        with package.use("scale", {"s": 3.0}, scope="params"):
            look()  # the inner block's scope replaces the outer one's
            with package.use("scale"):
                look()  # and so do its parameters
        with package.use("scale", {"s": 5.0}, scope=("params", "activations")):
            look()
        with package.use("scale", {"s": 5.0}, scope="no such scope"):
            look()
        with pytest.raises(KeyError), package.use("no such rule"):
            pass
        look()
        with pytest.raises(ZeroDivisionError), package.use(lambda ctx, g, t: 9 * g):
            seen.append(1 / 0)
        look()
        x = ENDS.clone().requires_grad_()
        y = layer(x)
    look()
    return [*seen, *torch.autograd.grad(y.sum(), x)]


def test_nested_blocks_mean_what_they_mean_in_freegrad() -> None:
    for found, wanted in zip(nested(ours), nested(theirs), strict=True):
        assert torch.equal(found, wanted)


def test_a_block_is_made_before_its_rule_is_registered_and_resolves_it_on_entry() -> None:
    block = ours.use("test: registered late")
    ours.register("test: registered late")(lambda ctx, g, t, **_: g * 4)
    with block:
        assert gradient(ours, ours.Activation("Linear"), ENDS).equal(4 * 2 * ENDS)


# --- rules ---


@pytest.mark.parametrize("case", RULES)
@pytest.mark.parametrize("given", ["input", "none"])
def test_a_rule_called_by_hand_computes_what_freegrads_does(case: str, given: str) -> None:
    rule, params, without_input = RULES[case]
    results = []
    for package in (ours, theirs):
        torch.manual_seed(0)
        function = package.get(rule)
        if given == "none" and not without_input:
            with pytest.raises((AttributeError, TypeError)):
                function(None, ENDS, None, **params)
            return
        results.append(function(None, ENDS.cos(), ENDS if given == "input" else None, **params))
    torch.testing.assert_close(*results)


def test_the_parts_of_a_composition_share_their_parameters() -> None:
    for package in (ours, theirs):
        both = package.compose("scale", lambda ctx, g, t, **p: g + p["s"], "scale")
        assert both(None, torch.ones(2), None, s=3.0).tolist() == [18.0, 18.0]


def test_registering_and_getting_fail_as_in_freegrad() -> None:
    for package in (ours, theirs):
        assert issubclass(package.registry.RuleError, KeyError)
        with pytest.raises(package.registry.RuleError, match="scale"):
            package.register("scale")(lambda ctx, g, t: g)
        with pytest.raises(package.registry.RuleError):
            package.compose("scale", "no such rule")
    with pytest.raises(ours.registry.RuleError, match="Did you mean 'rectangular'"):
        ours.get("rectanglar")
    with pytest.raises(ValueError, match="Did you mean 'ReLU'"):
        ours.Activation("Relu")


# --- parameters ---


@pytest.mark.parametrize("case", [c for c in RULES if RULES[c][2]])
@pytest.mark.parametrize("scope", ["all", "activations", "params"])
def test_hooks_put_the_gradients_of_parameters_through_the_rule(case: str, scope: str) -> None:
    rule, params, _ = RULES[case]

    def run(package: ModuleType) -> list[Tensor]:
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 2))
        package.hook.attach_param_hooks(model)
        y = model(ENDS).sum()
        torch.manual_seed(2)
        with package.use(
            rule, params, scope=scope
        ):  # the block that counts is that of the backward
            y.backward()
        return [p.grad for p in model.parameters()]

    for found, wanted in zip(run(ours), run(theirs), strict=True):
        torch.testing.assert_close(found, wanted)


def test_hooks_that_run_in_a_thread_of_torchs_own_warn() -> None:
    model = nn.Linear(2, 2, device="meta")
    ours.hook.attach_param_hooks(model)
    with pytest.warns(fg.FreegradWarning, match=r"freegrad_fx\.transform\(model\)"):
        model(torch.ones(1, 2, device="meta")).sum().backward()


# --- functional ---


def test_vjp_and_jvp_are_those_of_freegrad() -> None:
    x, v = torch.randn(5, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    for rule in (None, "scale"):
        results = []
        for package in (ours, theirs):
            layer = package.wrappers.Activation("Tanh")
            params = {"s": 3.0} if rule else None
            y, pull = package.functional.vjp(layer, x, rule=rule, params=params)
            results += [y, pull(v), package.functional.jvp(layer, x, v, rule=rule, params=params)]
        for found, wanted in zip(results[:3], results[3:], strict=True):
            assert torch.equal(found, wanted)


# --- FreeGrad's own tests ---

# What `import freegrad` finds. It puts the package in its place, and runs it anew: one of the tests imports twice.
SHIM = """
import importlib, sys
import freegrad_fx.compat.freegrad as package
importlib.reload(package)
for name in [name for name in sys.modules if name.startswith(package.__name__)]:
    sys.modules[name.replace(package.__name__, "freegrad", 1)] = sys.modules[name]
"""


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """FreeGrad's source, with its tests, from the package index."""
    folder = tmp_path_factory.mktemp("sdist")
    source = ["--no-deps", "--no-binary=:all:", "freegrad==1.0.1"]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--dest", str(folder), *source]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        pytest.skip(f"the source of freegrad 1.0.1 cannot be downloaded: {error.stderr or error}")
    (archive,) = folder.glob("freegrad-1.0.1.tar.gz")
    with tarfile.open(archive) as packed:
        packed.extractall(folder, filter="data")
    return folder / "freegrad-1.0.1"


@pytest.mark.slow
def test_freegrads_own_tests_pass_unchanged(sdist: Path, tmp_path: Path) -> None:
    (tmp_path / "freegrad.py").write_text(SHIM, "utf-8")
    path = os.pathsep.join([str(tmp_path), *IMPORTABLE])
    proof = (
        "import freegrad.wrappers as w; assert w.__name__.startswith('freegrad_fx.'), w.__name__"
    )
    run = {"env": {**os.environ, "PYTHONPATH": path}, "capture_output": True, "text": True}
    subprocess.run([sys.executable, "-c", proof], check=True, **run)
    command = [sys.executable, "-m", "pytest", "-q", "-W", "error", "-p", "no:cacheprovider"]
    done = subprocess.run([*command, str(sdist / "tests")], **run)
    assert done.returncode == 0, done.stdout
    assert "30 passed" in done.stdout
    assert "skipped" not in done.stdout

"""Tests of the benchmarks: clock, memory, cases, peers, targets. No real times are measured."""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import freegrad_fx as fg
from freegrad_fx.extension import library
from places import DOCS, ROOT

# a package of the checkout, which is not installed
sys.path.append(str(ROOT))

from benchmarks import _cases as cases
from benchmarks import _compiling as compiling
from benchmarks import _gpu_rules as gpu_rules
from benchmarks import _networks as networks
from benchmarks import _pages as pages
from benchmarks import _peers as peers
from benchmarks import _results as results
from benchmarks import compare as command
from benchmarks import gpu, memory
from benchmarks._measure import Comparison, Spread, compare, machine, saved_bytes
from benchmarks._tables import SECTIONS, Row, as_text, memory_rows, timed_rows
from benchmarks._targets import FASTEST_PEER, TARGETS, Target, baseline, targets


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads, extension = torch.get_num_threads(), library.current() is not None
    torch.set_num_threads(1)  # more threads wait for each other on a busy machine
    yield
    torch.set_num_threads(threads)
    library.switch(on=extension)


# --- the clock ---


class FakeTime:
    """A clock that the candidates advance: each call by the next of its durations."""

    def __init__(self) -> None:
        self.now, self.calls = 0.0, []

    def __call__(self) -> float:
        return self.now

    def taking(self, name: str, duration: Callable[[int], float]) -> Callable[[], None]:
        def call() -> None:
            self.now += duration(self.calls.count(name))
            self.calls.append(name)

        return call


WARM_UPS = 3


def test_every_candidate_is_called_once_per_round_in_changing_order() -> None:
    clock = FakeTime()
    found = compare(
        {name: clock.taking(name, lambda call: 1.0) for name in "abc"}, least=8, clock=clock
    )
    assert found.rounds == 8
    rounds = [tuple(clock.calls[i : i + 3]) for i in range(3 * WARM_UPS, len(clock.calls), 3)]
    assert len(rounds) == 8
    assert all(sorted(names) == ["a", "b", "c"] for names in rounds)
    assert len(set(rounds)) > 1


def test_what_prepares_a_candidate_is_not_timed() -> None:
    clock, prepared = FakeTime(), list[str]()

    def prepare(name: str) -> None:
        prepared.append(name)
        clock.now += 100.0

    found = compare(
        {name: clock.taking(name, lambda call: 1.0) for name in "ab"},
        least=3,
        before=prepare,
        clock=clock,
    )
    assert found.times == {"a": [1.0] * 3, "b": [1.0] * 3}
    assert sorted(prepared) == ["a"] * 4 + ["b"] * 4
    rounds = clock.calls[2 * WARM_UPS :]
    assert prepared[2:] == rounds


def test_slow_candidates_have_fewer_rounds_but_at_least_three() -> None:
    for takes, rounds in ((0.1, 15), (10.0, 6), (100.0, 3)):
        clock = FakeTime()
        candidate = {"slow": clock.taking("slow", lambda call, takes=takes: takes)}
        assert compare(candidate, seconds=1.0, longest=60.0, clock=clock).rounds == rounds


def test_ratios_are_medians_and_quartiles_over_rounds() -> None:
    clock = FakeTime()
    durations = [1.0] * WARM_UPS + [3.0, 1.0, 5.0, 2.0, 4.0]
    found = compare(
        {"native": clock.taking("native", lambda call: 2.0), "ours": clock.taking("ours", durations.__getitem__)},
        least=5,
        clock=clock,
    )  # fmt: skip
    assert found.seconds("ours") == 3.0
    assert found.ratio("ours", over="native") == Spread(median=1.5, low=1.0, high=2.0)
    assert found.ratio("native", over="native") == Spread(1.0, 1.0, 1.0)


def test_a_machine_that_slows_down_changes_times_and_not_ratios() -> None:
    clock = FakeTime()
    found = compare(
        {
            "native": clock.taking("native", lambda call: 1.0 + call),
            "ours": clock.taking("ours", lambda call: 3.0 + 3 * call),
        },
        least=10,
        longest=1000.0,
        clock=clock,
    )
    assert len(set(found.times["native"])) == 10
    assert found.ratio("ours", over="native") == Spread(3.0, 3.0, 3.0)


def test_a_fast_call_is_measured_many_at_a_time() -> None:
    clock = FakeTime()
    found = compare({"fast": clock.taking("fast", lambda call: 1e-5)}, least=2, most=2, clock=clock)
    assert len(clock.calls) == pytest.approx(WARM_UPS + 2 * 200, abs=2)
    assert found.seconds("fast") == pytest.approx(1e-5)


def test_garbage_collection_is_enabled_again_after_measuring() -> None:
    gc.unfreeze()  # what others have frozen

    def fail_later(calls: list[int] = []) -> None:  # noqa: B006
        assert len(calls) < WARM_UPS, "measuring"
        calls.append(1)

    with pytest.raises(AssertionError, match="measuring"):
        compare({"native": fail_later})
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0


def test_a_single_measurement_is_its_own_median() -> None:
    assert Spread.of([2.0]) == Spread(2.0, 2.0, 2.0)


# --- memory ---


def test_a_tensor_that_is_saved_twice_or_known_is_not_counted_again() -> None:
    x = torch.randn(1000, requires_grad=True)
    assert saved_bytes(lambda: torch.relu(x)) == 4000  # its result
    assert saved_bytes(lambda: x.square()) == 4000  # its input
    assert saved_bytes(lambda: x.square(), known=[x]) == 0
    assert saved_bytes(lambda: torch.relu(x).square(), known=[x]) == 4000
    assert saved_bytes(lambda: x + 1) == 0


BEYOND_NATIVE = {
    "d(Linear)": 0, "straight_through": 0, "noise": 0, "a rule of y": 0,
    "rectangular": 4, "arctan": 4, "rectangular, save=mask": 1, "guided, save=mask": 1,
}  # fmt: skip


@pytest.mark.slow
def test_an_activation_saves_what_its_rule_needs() -> None:
    found = dict(cases.operator_memory())
    assert found["native relu"] == 4.0
    beyond = {name: found[name] - found["native relu"] for name in BEYOND_NATIVE}
    assert beyond == BEYOND_NATIVE


def test_a_step_saves_the_same_for_each_of_its_activations() -> None:
    found = dict(cases.step_memory("MLP 8×256", quick=True))
    assert found["native"] == found["d(Linear)"] == 4.0
    assert found["rectangular"] == 8.0
    assert found["rectangular, save=mask"] == 5.0


# --- the cases ---


@pytest.mark.sampled(4)
@pytest.mark.parametrize("rule", cases.MEASURED)
def test_our_operators_return_the_gradient_of_the_formula(rule: str) -> None:
    x, grad = cases.input_and_gradient((64, 64))
    torch.manual_seed(1)
    y = torch.relu(x.detach())
    rule_there = cases.rule_of(rule).at_operation(torch.relu)
    expected = rule_there.backward(grad, x=x.detach(), y=y)
    for candidate, module in cases.operator(rule).items():
        if cases.is_ours(candidate):
            torch.testing.assert_close(cases.gradient(module), expected, msg=candidate)


@pytest.mark.sampled(4)
@pytest.mark.parametrize("rule", cases.MEASURED)
def test_native_and_ours_are_modules_with_the_same_forward(rule: str) -> None:
    native, ours = list(cases.operator(rule).values())[:2]
    x, _ = cases.input_and_gradient((8, 8))
    assert isinstance(native, nn.Module)
    assert torch.equal(ours(x), native(x))


PEERS_OPERATORS = [(rule, name) for rule, found in peers.OPERATORS.items() for name in found]


@pytest.mark.parametrize(("rule", "candidate"), PEERS_OPERATORS, ids=str)
def test_a_peer_is_compared_only_with_a_rule_of_the_same_formula(rule: str, candidate: str) -> None:
    if peers.peer_of(candidate) in peers.missing():
        pytest.skip(f"{peers.peer_of(candidate)} is not installed")
    makers = cases.operator_makers(rule)
    gradients = cases.gradients({n: cases.made(n, makers[n]) for n in (rule, candidate)})
    assert cases.differences(gradients) == {}


def test_a_different_gradient_is_reported() -> None:
    gradients = {
        "native": torch.zeros(3),
        "arctan": torch.tensor([1.0, 2.0, 3.0]),
        "snnTorch atan": torch.tensor([1.0, 2.0, 3.5]),
        "SpikingJelly ATan": torch.tensor([1.0, 2.0, 3.0]),
    }
    assert cases.differences(gradients) == {"snnTorch atan": "another gradient: up to 0.5 apart"}


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow if i else ()) for i, n in enumerate(cases.MODELS)],
)
def test_every_training_step_runs_and_every_model_has_its_rule(name: str) -> None:
    models, x = cases.step_models(name, quick=True), cases.MODELS[name].input(quick=True)
    native = models["native"]().eval()
    for candidate, make in models.items():
        if candidate == "native":
            continue
        ours = make()
        assert any(node.target is fg.ops.decoupled for node in ours.graph.nodes), candidate
        if "heaviside" not in candidate:
            assert torch.equal(ours.eval()(x), native(x)), candidate
    for step in cases.steps(name, quick=True).values():
        step()


@pytest.mark.filterwarnings("ignore:Setting backward hooks on ReLU activations")
def test_attributions_are_the_peers_own() -> None:
    maps = {name: explain() for name, explain in cases.attributions(quick=True).items()}
    assert cases.differences(maps) == {}
    assert not torch.equal(maps["guided"], maps["native gradient"])


def test_transforms_can_be_measured() -> None:
    for step in (cases.transform("resnet18") | cases.transform_chain(quick=True)).values():
        assert isinstance(step(), nn.Module)


def test_cold_is_cold_and_warm_has_the_caches_of_cold(monkeypatch: pytest.MonkeyPatch) -> None:
    caches: list[str] = []

    def process(model: str, rule: str, quick: bool, environment: Mapping[str, str]) -> float:
        directory = Path(environment["TORCHINDUCTOR_CACHE_DIR"])
        caches.append(str(directory))
        warm = directory.exists()
        directory.mkdir(exist_ok=True)
        return 1.0 if warm else 5.0

    monkeypatch.setattr(compiling, "_in_a_process", process)
    found = compiling.compile_times("MLP 8×256", quick=True)
    assert found["cold"].times == {"native": [5.0], "rectangular": [5.0]}
    assert found["warm"].times == {"native": [1.0], "rectangular": [1.0]}
    first, again, second, _ = caches
    assert first == again != second
    assert not Path(first).exists()


# --- targets and tables ---


def candidates_of(section: str) -> set[str]:
    found: dict[str, Callable[[], Iterable[Iterable[str]]]] = {
        "operators": lambda: map(cases.operator_makers, cases.MEASURED),
        "small": lambda: map(cases.operator_makers, cases.MEASURED),
        "small-steps": lambda: map(networks.small_models, networks.SMALL),
        "fuse": lambda: [(rule, f"{rule}, fuse") for rule in cases.FUSED],
        "steps": lambda: (cases.step_models(model, quick=True) for model in cases.MODELS),
        "memory": lambda: [dict(cases.operator_memory())],
        "model-memory": lambda: [[case.table for case in memory.CASES]],
    }
    return {name for names in found[section]() for name in names} if section in found else set()


def test_every_target_applies_to_a_measured_candidate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fg.extension, "status", lambda: library.Status(True, "assumed", None))
    for section in {target.section for target in TARGETS}:
        here = [target for target in TARGETS if target.section == section]
        assert {name for t in here for name in t.names} <= candidates_of(section), section
        groups = {name for name, _ in command.groups(section, quick=False, seconds=0)}
        assert {name for t in here for name in t.groups} <= groups, section


@pytest.mark.parametrize(
    ("section", "name", "expected"),
    [
        ("operators", "d(ReLU)", [("native relu", 1.3)]),
        ("operators", "rectangular", [("native relu", 1.5)]),
        ("operators", "guided, save=mask, extension", [("native relu", 1.4)]),
        ("operators", "arctan", [(FASTEST_PEER, 0.5)]),
        ("operators", "fast_sigmoid, extension", [(FASTEST_PEER, 0.4)]),
        ("small", "clip_norm", []),
        (
            "small",
            "arctan, extension",
            [("native relu", 1.05), ("snnTorch", 0.4), ("SpikingJelly", 0.4), ("FreeGrad", 0.4)],
        ),
        ("compiled", "arctan", [("native relu", 2.0), ("native relu, compiled", None)]),
        ("compiled-steps", "triangular", [("native", 1.0)]),
        ("memory", "d(Linear)", [("native", 0.0)]),
        ("memory", "arctan", [("native", 4.0)]),
        ("memory", "guided, save=mask", [("native", 1.0)]),
        ("compile", "rectangular", [("native", 1.2)]),
        ("operators", "snnTorch atan", []),
        ("operators", "native relu", []),
    ],
)
def test_a_candidate_has_the_targets_of_its_kind(
    section: str, name: str, expected: list[tuple[str, float]]
) -> None:
    assert [(t.over, t.limit) for t in targets(section, "any", name)] == expected


@pytest.mark.parametrize(
    ("section", "group", "name", "expected"),
    [
        ("steps", "resnet18", "triangular", [("native", 1.02)]),
        ("steps", "resnet18", "rectangular, save=mask, extension", []),
        ("steps", cases.SPIKING_STEPS, "triangular", []),
        ("steps", cases.SPIKING_STEPS, "arctan, heaviside, extension", [("native", 1.03), ("snnTorch", 0.8)]),
        ("small-steps", networks.LAYERS, "rectangular", [("native", 1.4)]),
        ("small-steps", networks.LAYERS, "rectangular, extension", [("native", 1.03)]),
        ("model-memory", "resnet50", "save_memory(recompute=4)", [("native", 0.75)]),
    ],
)  # fmt: skip
def test_some_targets_are_those_of_a_group(
    section: str, group: str, name: str, expected: list[tuple[str, float]]
) -> None:
    assert [(t.over, t.limit) for t in targets(section, group, name)] == expected


def test_a_measurement_near_a_target_does_not_count_as_met() -> None:
    target = Target("compiled-steps", "native", 1.0, median_limit=1.02)
    assert target.verdict(Spread(1.0, 0.99, 1.1)) == "met"
    assert target.verdict(Spread(1.05, 0.99, 1.1)) == "within noise"
    assert target.verdict(Spread(1.02, 1.01, 1.1)) == "within noise"
    assert target.verdict(Spread(1.03, 1.01, 1.1)) == "missed"
    plain = Target("steps", "native", 1.05)
    assert plain.verdict(Spread(1.05, 0.9, 1.2)) == "met"
    assert plain.verdict(Spread(1.06, 0.9, 1.2)) == "missed"


TIMES = Comparison(
    {"native relu": [1.0], "arctan": [2.0], "snnTorch atan": [8.0], "SpikingJelly ATan": [5.0]}
)


def test_a_target_can_be_relative_to_the_fastest_peer() -> None:
    assert baseline(Target("operators", FASTEST_PEER, 0.5), TIMES) == "SpikingJelly ATan"
    assert baseline(Target("small", "snnTorch", 0.7), TIMES) == "snnTorch atan"
    assert baseline(Target("small", "FreeGrad", 0.7), TIMES) is None
    alone = Comparison({"native relu": [1.0], "reverse": [2.0]})
    assert baseline(Target("operators", FASTEST_PEER, 0.5), alone) is None


def test_tables_hold_ratios_targets_and_notes() -> None:
    notes = {"snnTorch atan": "another gradient"}
    rows = timed_rows("operators", "arctan", TIMES, notes)
    assert [(r.name, r.over, r.relative.median, r.verdict) for r in rows] == [
        ("native relu", "native relu", 1.0, ""),
        ("arctan", "native relu", 2.0, ""),
        ("arctan", "SpikingJelly ATan", 0.4, "met"),
        ("snnTorch atan", "native relu", 8.0, ""),
        ("SpikingJelly ATan", "native relu", 5.0, ""),
    ]
    text = as_text(rows)
    assert "≤ 0.5" in text
    assert "another gradient" in text

    rows = memory_rows("memory", "one activation", [("native relu", 4.0), ("arctan", 9.0)])
    assert rows[-1].verdict == "missed"
    found = [("native", 8.0), ("save_memory(recompute=4)", 5.0)]
    rows = memory_rows("model-memory", "resnet50", found, ratio=True)
    assert (rows[-1].relative.median, rows[-1].verdict) == (0.625, "met")


# --- results and pages ---


def results_of(*groups: tuple[str, str, float]) -> list[Row]:
    """A row over native for each group."""
    return [
        Row(section, group, "rectangular", 2.0, "native", Spread.of([ratio]), 20)
        for section, group, ratio in groups
    ]


def test_results_of_several_runs_are_put_together(tmp_path: Path) -> None:
    path = tmp_path / "new" / "results.json"
    assert results.Results.read(path).rows == []
    first = results_of(("steps", "resnet18", 1.1), ("steps", "vgg11_bn", 1.2), ("small", "x", 2.0))
    results.Results().with_run({"processor": "abacus", "quick": False}, first).write(path)
    second = results_of(("steps", "vgg11_bn", 1.3), ("compiled", "x", 1.4))
    found = results.Results.read(path).with_run({"processor": "quipu", "quick": False}, second)
    found.write(path)
    again = results.Results.read(path)
    assert again == found
    assert [(run, row.section, row.group, row.relative.median) for run, row in again.rows] == [
        (0, "small", "x", 2.0), (1, "compiled", "x", 1.4),
        (0, "steps", "resnet18", 1.1), (1, "steps", "vgg11_bn", 1.3),
    ]  # fmt: skip
    text = pages.all_tables(again)
    assert "Measured on: processor abacus; processor quipu." in text  # steps
    assert text.count("Measured on: processor quipu.") == 1  # compiled
    assert text.count("Not measured yet.") == sum(s.on_page for s in SECTIONS.values()) - 3
    more = again.with_run(found.runs[0], results_of(("memory", "x", 1.0)))
    assert (more.runs, more.rows[-1][0]) == (found.runs, 0)
    last = again.with_run({"processor": "tally", "quick": False}, first[:1] + first[2:])
    assert [run["processor"] for run in last.runs] == [
        "quipu",
        "tally",
    ]  # nothing is left of the first


def test_a_page_shows_no_targets_and_only_what_was_measured() -> None:
    rows = timed_rows("operators", "arctan", TIMES, {"snnTorch atan": "another gradient"})
    found = results.Results().with_run({"processor": "abacus", "gpu": None, "quick": False}, rows)
    text = pages.all_tables(found)
    assert "Measured on: processor abacus." in text.splitlines()
    tables = [line for line in text.splitlines() if line.startswith("|")]
    assert len(tables) == 2 + len(rows)
    assert {line.count("|") for line in tables} == {8}
    assert "another gradient" in text
    assert "≤" not in text
    assert "target" not in text
    beside = pages.peers_table(found).splitlines()
    assert beside[2:] == [
        "| what | rule | uncompiled |",
        "| --- | --- | --- |",
        "| forward and backward of a million numbers | `arctan` | 0.25 of snnTorch, 0.40 of SpikingJelly |",
    ]


# --- the command ---


def once(candidates: Mapping[str, Callable[[], Any]], **options: Any) -> Comparison:
    """Call each candidate once instead of timing it."""
    for call in candidates.values():
        call()
    return Comparison({name: [1.0] for name in candidates})


EAGER = (
    "operators", "small", "small-steps", "steps", "blocks", "spiking", "attribution", "transform", "memory",
    "model-memory",
)  # fmt: skip
COMPILED = ("compiled", "fuse", "compiled-steps")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Setting backward hooks on ReLU activations")
def test_every_section_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    assert {*EAGER, *COMPILED, "compile"} == set(SECTIONS)
    monkeypatch.setattr(command, "compare", once)
    for section in EAGER:
        groups = list(command.measure(section, quick=True, seconds=0))
        assert groups or (section == "spiking" and {*networks.LIBRARIES} <= {*peers.missing()})
        assert not [row for rows in groups for row in rows if row.note], section


@pytest.mark.slow
@pytest.mark.inductor
@pytest.mark.parametrize("section", COMPILED)
def test_every_section_with_a_compiler(section: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "compare", once)
    with torch._dynamo.config.patch(recompile_limit=8):  # put back afterwards
        assert list(command.measure(section, quick=True, seconds=0))


@pytest.mark.slow
@pytest.mark.inductor
@pytest.mark.usefixtures("extension")
def test_candidates_with_the_extension_have_the_same_gradients(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(command, "compare", once)
    library.switch(on=True)
    assert list(command.measure("fuse", quick=True, seconds=0, only=["arctan"]))  # has none of them
    for section, only in (("operators", ["arctan"]), ("blocks", ["MLP"]), ("spiking", None)):
        for rows in command.measure(section, quick=True, seconds=0, only=only):
            assert [row for row in rows if row.name.endswith(", extension")]
            assert not [row for row in rows if row.note], section
    for group in networks.SMALL:
        makers = networks.small_models(group)
        ours = {name: make for name, make in makers.items() if cases.is_ours(name)}
        found = cases.gradients({name: cases.made(name, make) for name, make in ours.items()})
        for name in networks.SMALL_RULES[group]:
            assert torch.equal(found[name], found[f"{name}, extension"]), name


@pytest.mark.skipif("snnTorch" in peers.missing(), reason="snnTorch is not installed")
def test_a_rule_gives_a_network_of_a_library_the_gradients_of_its_own_surrogate() -> None:
    steps, notes = networks.library_steps("snnTorch")
    assert {"snnTorch atan", "snnTorch fast_sigmoid", "arctan, use", "fast_sigmoid, use"} <= {
        *steps
    }
    assert notes == {}


@pytest.mark.slow
def test_the_command_writes_json_and_says_which_peers_are_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(peers, "missing", lambda: list(peers.PEERS))
    absent = library.Status(False, "it has not been built.", None)
    monkeypatch.setattr(fg.extension, "status", lambda: absent)
    out = tmp_path / "new" / "compare.json"
    command.main(
        [
            *("--quick", "--processor-time", "--only", "memory", "attribution"),
            *("--groups", "one", "--out", str(out)),
        ]
    )
    printed = capsys.readouterr().out
    assert f"Not installed, and so not measured: {', '.join(peers.PEERS)}." in printed
    assert "The C++ extension is not measured: not in use: " in printed
    assert "rectangular, save=mask" in printed
    assert "≤ 4: met" in printed

    data = json.loads(out.read_text("utf-8"))
    (run,) = data["runs"]
    assert run["missing"] == list(peers.PEERS)
    assert run["quick"]
    assert run["clock"] == "processor time of the thread"
    assert run.keys() >= machine().keys()
    assert run["torch"] == torch.__version__
    assert {row["group"] for row in data["rows"]} == {"one activation"}
    assert not [row for row in data["rows"] if peers.peer_of(row["name"])]
    (row,) = [row for row in data["rows"] if row["name"] == "clipped_straight_through"]
    assert row["relative"]["median"] == 4.0


def test_the_documentation_shows_no_quick_results(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(["--quick", "--docs"])
    assert "omit --quick or --docs" in capsys.readouterr().err


def test_peers_that_are_installed_are_named_with_their_versions() -> None:
    assert peers.versions()["FreeGrad"] == "1.0.1"
    assert set(peers.versions()) | set(peers.missing()) == set(peers.PEERS)
    assert isinstance(cases.gradient(peers.operators("rectangular")["FreeGrad"]()), Tensor)


# --- memory of whole models, and GPUs ---


@pytest.mark.slow
def test_memory_of_whole_models_is_counted(tmp_path: Path) -> None:
    found = memory.main(["--quick", "--write", str(tmp_path / "table.md")])
    assert [case for case, _ in found] == [*memory.CASES]
    assert all(0 < report.kept < report.native for _, report in found)
    assert (tmp_path / "table.md").read_text("utf-8") == memory.as_markdown(found)


def test_every_rule_is_run_on_a_gpu_at_operations_that_it_is_meant_for() -> None:
    registered = map(fg.rules.get, fg.rules.available())
    built_in = {r.name for r in registered if r.declaration.module.startswith("freegrad_fx.rules")}
    assert {rule.name for rule in gpu_rules.RULES} == built_in
    for rule in gpu_rules.RULES:
        places = gpu_rules.places(rule)
        known = {*rule.info.meant_for} & fg.vocabulary.OPS.keys()
        assert {*places} <= known or places in (("tanh",), ("parameter",)), rule.name
        assert not (rule.declaration.needs_operation and places == ("tanh",)), rule.name


def test_a_gradient_that_is_wrong_on_a_gpu_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def found(change: Callable[[Tensor], Tensor], name: str = "arctan") -> list[str]:
        calls: list[int] = []

        def changed(*given: Any) -> list[Tensor]:
            calls.append(1)
            gradients = original(*given)
            return [*map(change, gradients)] if len(calls) == 1 else gradients

        original = gpu_rules.gradients
        with monkeypatch.context() as patch:
            patch.setattr(gpu_rules, "gradients", changed)
            rule = fg.rules.get(name)
            return list(gpu_rules.differences(rule, torch.device("cpu"), torch.float32))

    assert found(lambda grad: grad) == []
    assert found(lambda grad: grad + 1e-3) == ["arctan at tanh: 100.0% of the entries differ"]
    assert found(lambda grad: grad * torch.nan) == ["arctan at tanh: 100.0% of the entries differ"]
    assert found(torch.Tensor.double) == ["arctan at tanh: a gradient of torch.float64 on cpu"]
    assert found(lambda grad: grad + 1, "noise") == ["noise at tanh: another gradient for the same seed"]  # fmt: skip


@pytest.mark.slow
def test_the_checks_for_a_gpu_run_on_a_cpu_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert "FAILED" not in printed
    for what in (
        "rules in float16",
        "channels last",
        "under autocast",
        "compiled",
        "FSDP2 in bfloat16",
        "a step of",
        "bytes kept",
    ):
        assert what in printed


# --- what the docs show of it ---


def test_the_table_of_memory_has_every_case() -> None:
    rows = (DOCS / "_tables/memory.md").read_text("utf-8").splitlines()[4:]
    names = [(case.name, f"`{case.table}`") for case in memory.CASES]
    assert [tuple(cell.strip() for cell in row.split("|")[1:3]) for row in rows] == names


def test_the_pages_show_the_measured_numbers() -> None:
    found = results.Results.read(pages.DATA)
    assert not found.quick
    assert not [run["missing"] for run in found.runs if run["missing"]]
    for path, text in pages.files(found).items():
        assert path.read_text("utf-8") == text, f"{path.name}: nox -s compare -- --docs --only"

"""The generator and the shrinker: what they make runs, is the same at each run, and has everything in it."""

from __future__ import annotations

from collections import Counter

from fuzz_cases import Case, check, random_case
from fuzz_generator import Generator
from fuzz_programs import Block, Class, Program, load, make, sample, unload, walk
from fuzz_shrink import shrink, size
from fuzz_tables import Entry, Table, random_table

PROGRAMS = [Generator(seed, risky=0.3).program() for seed in range(150)]


def test_the_same_seed_gives_the_same_case() -> None:
    assert random_case(3, "symbolic") == random_case(3, "symbolic")
    assert random_case(3, "symbolic") != random_case(4, "symbolic")


def test_most_programs_run() -> None:
    failed = Counter[str]()
    for made in PROGRAMS[:60]:
        module = load(made)
        try:
            args, kwargs = sample(made, 1)
            make(made, module)(*args, **kwargs)
        except Exception as error:
            failed[str(error)[:60]] += 1
        finally:
            unload(module)
    assert failed.total() <= 9, failed


def test_programs_have_everything_in_them() -> None:
    seen = frozenset().union(*(made.features for made in PROGRAMS))
    statements = {
        "activation", "inplace", "part in place", "arithmetic", "inplace arithmetic", "view", "layer", "part", "random",
        "state", "function", "branch", "grad", "loop", "container", "checkpoint", "tensor hook", "python state",
        "data branch", "unused", "made inside",
    }  # fmt: skip
    others = {
        "Sequential", "ModuleList", "ModuleDict", "shared module", "tied weights", "parametrization", "frozen", "hook",
        "float64", "float32", "bfloat16", "argument: positional", "argument: keyword", "argument: default",
    }  # fmt: skip
    assert statements | others <= seen


def test_tables_have_everything_in_them() -> None:
    tables = [random_table(seed, made) for seed, made in enumerate(PROGRAMS)]
    entries = [entry for table in tables for entry in table.entries]
    for name in ("module", "type", "parameter", "call", "forward", "save"):
        assert any(getattr(entry, name) is not None for entry in entries), name
    assert any(entry.rules is None for entry in entries)
    assert any(entry.rules and len(entry.rules) > 1 for entry in entries)
    assert {table.block[1] for table in tables if table.block} == {"activations", "params", "all"}
    assert any(table.is_native for table in tables)


BODY = (
    "a = self.fc(a)",
    Block(
        "if self.training",
        ("b = b * 2", Block("for _ in range(2)", ("a = torch.tanh(a)",))),
        ("c = -c",),
    ),
    "a = F.relu(a)",
    "c = c + 1",
)
LARGE = Case(
    Program(
        (
            Class("Block0", (), ("a = F.gelu(a)",)),
            Class("Model", ("self.fc = nn.Linear(4, 4)", "self.part0 = Block0()"), BODY, "(a, b)"),
        ),
        dtype="float32",
    ),
    Table(
        (
            Entry(
                (("reverse", (("alpha", 0.75),)), ("d(Linear)", ())),
                op=("relu", "gelu"),
                module="*",
            ),
            Entry(None, op=("softmax",)),
        )
    ),
    steps=((True, 1, True), (False, 2, True), (True, 3, True)),
    carried="deepcopy",
)


def test_shrinking_keeps_what_the_failure_needs() -> None:
    def fails(case: Case) -> bool:
        model = case.program.classes[-1]
        return any(isinstance(s, str) and "tanh" in s for s in walk(model.body)) and any(
            "relu" in entry.op for entry in case.table.entries
        )

    small = shrink(LARGE, fails)
    (model,) = small.program.classes
    assert (model.body, model.init, model.returns) == (("a = torch.tanh(a)",), (), "a")
    assert small.program.dtype == "float64"
    (entry,) = small.table.entries
    assert entry == Entry((("scale", (("s", 0.5),)),), op=("relu",))
    assert (len(small.steps), small.carried) == (1, "")


def test_shrinking_ends_where_nothing_smaller_fails() -> None:
    assert shrink(LARGE, lambda case: False) == LARGE
    tried = Counter[int]()

    def fails(case: Case) -> bool:
        tried[0] += 1
        return True

    small = shrink(LARGE, fails, attempts=40)
    assert tried[0] <= 41
    assert size(small) < size(LARGE)


def test_a_failure_is_printed_as_a_program_that_can_be_pasted() -> None:
    text = str(LARGE)
    exec(
        compile(text[: text.index("# table:")], "<pasted>", "exec"), space := {"__name__": "pasted"}
    )
    assert len(space["Model"]()(sample(LARGE.program, 1)[0][0])) == 2
    assert "door: symbolic" in text
    assert "alpha" in text


def test_a_refusal_has_to_name_a_way_in() -> None:
    refused = Case(
        Program((Class("Model", (), (Block("if a.sum() > 0", ("a = F.relu(a)",)),)),)),
        Table((Entry((("scale", (("s", 0.5),)),), op=("relu",)),)),
    )
    assert check(refused).kind == "refused"

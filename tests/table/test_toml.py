"""Tables in files: what is written reads back to the same table, and every mistake is one kind of error."""

from __future__ import annotations

import contextlib
import functools
import json
import re
import string
import sys
import tomllib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import freegrad_fx as fg
from places import DOCS
from tables import tables

EXAMPLE = """\
version = 1

[[rule]]
op = "relu"
module = ["layer3.*", "layer4.*"]
call = [0, "2:"]
backward = "rectangular"
params = { a = -1.0, b = inf }

[[rule]]
type = "torch.nn.GELU"
forward = "heaviside"
backward = "arctan"
params = { alpha = 2.0 }

[[rule]]
parameter = "re:.*\\\\.weight"
backward = [{ rule = "clip_norm", max_norm = 1.0, eps = 1e-12 }, "d(ReLU)", "d(Linear)"]

[[rule]]
op = "params"
backward = "centralize"
params = { dim = [1, 2] }

[[rule]]
parameter = "*.bias"
forward = { op = "quantize", bits = 4, low = -1.5, symmetric = false }
backward = "straight_through"

[[rule]]
op = ["softmax", "all"]
backward = "native"
"""

TABLE = fg.RuleTable(
    [
        fg.on("relu", module=["layer3.*", "layer4.*"], call=[0, slice(2, None)]).backward(
            "rectangular", a=-1.0, b=float("inf")
        ),
        fg.on(type="torch.nn.GELU", forward="heaviside").backward("arctan", alpha=2.0),
        fg.on(parameter=r"re:.*\.weight").backward(
            fg.compose(fg.rules.clip_norm(max_norm=1.0), "d(ReLU)", "d(Linear)")
        ),
        fg.on("params").backward("centralize", dim=(1, 2)),
        fg.on(
            parameter="*.bias",
            forward=fg.forward("quantize", bits=4, low=-1.5, symmetric=False),
        ).backward("straight_through"),
        fg.on(["softmax", "all"]).backward(None),
    ]
)


# --- there and back ---


def test_a_file_is_read_as_it_says() -> None:
    assert fg.RuleTable.from_toml(EXAMPLE) == TABLE


def test_a_table_is_written_as_people_write_it() -> None:
    assert TABLE.to_toml() == EXAMPLE


@given(tables)
def test_what_is_written_as_toml_reads_back_to_the_same_table(table: fg.RuleTable) -> None:
    written = table.to_toml()
    assert fg.RuleTable.from_toml(written) == table
    assert fg.RuleTable.from_toml(written).to_toml() == written
    assert fg.RuleTable.from_toml(written.replace("\n", "\r\n")) == table


@given(tables)
def test_what_is_written_as_data_survives_json(table: fg.RuleTable) -> None:
    data = table.to_dict()
    again = json.loads(json.dumps(data, allow_nan=False))
    assert again == data
    assert fg.RuleTable.from_dict(again) == table


@given(tables)
def test_toml_and_data_have_one_shape(table: fg.RuleTable) -> None:
    def shape(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: shape(item) for key, item in value.items()}
        return [shape(item) for item in value] if isinstance(value, list) else str(value)

    read = tomllib.loads(table.to_toml())
    assert shape(read) == shape({k: v for k, v in table.to_dict().items() if v != []})


class Net(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(2, 2), nn.ReLU(), nn.GELU())


def test_a_path_is_taken_wherever_rules_are(tmp_path: Path) -> None:
    table = fg.RuleTable.of({"relu": "scale", "gelu": None})
    path = tmp_path / "rules.toml"
    path.write_text(table.to_toml(), "utf-8")
    for rules in (path, str(path)):
        assert fg.RuleTable.of(rules) == fg.RuleTable.from_toml(rules) == table
        assert fg.explain(Net(), rules) == fg.explain(Net(), table)
        assert fg.report(fg.transform(Net(), rules)).table == table
    other = tmp_path / "rules"
    other.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())  # as some editors begin a file
    assert fg.RuleTable.of(other) == table


def test_a_file_that_is_not_there_is_an_error_of_the_system(tmp_path: Path) -> None:
    for path in (tmp_path / "none.toml", str(tmp_path / "none.toml")):
        with pytest.raises(FileNotFoundError):
            fg.explain(Net(), path)


def test_what_can_be_no_path_is_text() -> None:
    assert len(fg.RuleTable.from_toml("version = 1\n# rules.toml")) == 0
    with pytest.raises(fg.TableError, match="invalid TOML"):
        fg.RuleTable.from_toml("\0.toml")


def test_a_version_and_entries_can_be_left_out() -> None:
    assert fg.RuleTable.from_toml("") == fg.RuleTable()
    assert fg.RuleTable.from_toml("# nothing yet\n") == fg.RuleTable()
    assert len(fg.RuleTable.from_toml("[[rule]]\nbackward = 'scale'")) == 1


# --- mistakes ---

HEAD = "version = 1\n\n[[rule]]\nop = 'gelu'\nbackward = 'scale'\n\n"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("version = 2", "tables of version 1, got 2"),
        ("version = '1'", "tables of version 1, got '1'"),
        ("version = true", "tables of version 1, got True"),
        ("rules = []", "unknown key 'rules'. Did you mean 'rule'?"),
        ("[rule]\nop = 'relu'", "rule has to be a list of entries, in TOML each below [[rule]]"),
        ("rule = 3", "rule has to be a list of entries"),
        ("rule = ['relu']", "entry 1: an entry has to be a table of fields, got 'relu'"),
        ("version = 1\nop = x", "invalid TOML: Invalid value (at line 2"),
        ("version = 1\nversion = 1", "invalid TOML: Cannot overwrite a value"),
        ("a = 9" + "9" * 5000, "invalid TOML"),
        ("rule = " + "[" * 5000, "TOML"),
    ],
)
def test_a_file_that_is_no_table_is_an_error(text: str, words: str) -> None:
    with pytest.raises(fg.TableError) as error:
        fg.RuleTable.from_toml(text)
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ("op = 'rellu'\nbackward = 'scale'", "unknown op or group 'rellu'. Did you mean 'relu'?"),
        ("op = 3\nbackward = 'scale'", "unknown op or group '3 of type int'"),
        ("op = {}\nbackward = 'scale'", "unknown op or group '{} of type dict'"),
        ("op = 1979-05-27\nbackward = 'scale'", "unknown op or group"),
        ("op = ['relu', 'relu']\nbackward = 'scale'", "op contains 'relu' twice"),
        ("op = []\nbackward = 'scale'", "op is an empty list"),
        ("modul = 'a'\nbackward = 'scale'", "unknown field 'modul'. Did you mean 'module'?"),
        ("where = 'a'\nbackward = 'scale'", "unknown field 'where'"),
        ("module = 'layer[4'\nbackward = 'scale'", "'layer[4' is not a valid glob"),
        ("module = 're:('\nbackward = 'scale'", "'re:(' is not a valid regular expression"),
        ("module = 1.5\nbackward = 'scale'", "module has to be a glob"),
        ("type = 'ReLU'\nbackward = 'scale'", "Did you mean 'torch.nn.ReLU'?"),
        ("type = 'torch.nn.RelU'\nbackward = 'scale'", "unknown type 'torch.nn.RelU'"),
        ("call = -1\nbackward = 'scale'", "negative indices are not supported"),
        (
            "call = 0x" + "f" * 5000 + "\nbackward = 'native'\nforward = 'tanh'",
            "the largest index is",
        ),
        ("call = [1, 1_000_000_000]\nbackward = 'scale'", "the largest index is 999999999"),
        ("call = '1-3'\nbackward = 'scale'", "a slice of indices ('1:3'), got '1-3'"),
        ("call = '1:2:3:4'\nbackward = 'scale'", "a slice of indices"),
        ("call = '::0'\nbackward = 'scale'", "step of a slice of calls has to be at least 1"),
        ("op = 'relu'\nparameter = '*'\nbackward = 'scale'", "op='relu' selects operations"),
        (
            "op = 'relu'",
            "backward is missing; to keep the native backward, write backward = 'native'",
        ),
        ("backward = 'rectanguler'", "unknown rule 'rectanguler'. Did you mean 'rectangular'?"),
        (
            "backward = true",
            "backward has to be a rule's name, a list of rules, or 'native', got True",
        ),
        ("backward = []", "compose() needs at least one rule"),
        (
            "backward = 'scale'\nparams = { t = 1 }",
            "unknown parameter of rule 'scale': 't'. Valid: compile, over, s, save",
        ),
        ("backward = 'scale'\nparams = { s = 'a' }", "parameter 's' of rule 'scale' must be float"),
        ("backward = 'scale'\nparams = { s = true }", "must be float, got True"),
        ("backward = 'scale'\nparams = { s = nan }", "parameter 's' of rule 'scale' is NaN"),
        ("backward = 'scale'\nparams = { s = 1" + "0" * 400 + " }", "too large for a float"),
        (
            "backward = 'centralize'\nparams = { dim = ['a'] }",
            "'dim' of rule 'centralize' must be int",
        ),
        ("backward = 'scale'\nparams = [1]", "params has to be a table of the rule's parameters"),
        ("backward = 'noise'\nparams = { sigma = -1 }", "rule 'noise' requires sigma >= 0"),
        ("backward = 'native'\nparams = {}", "the native backward does not take params"),
        ("backward = 'native'\nforward = 'tanh'", "but has no rule"),
        (
            "backward = ['scale']\nparams = { s = 1 }",
            "params belongs to a single rule. In a list, give each rule its own",
        ),
        ("backward = ['scale', 3]", "a part of a composition has to be a rule's name or"),
        ("backward = [{ s = 1.0 }]", "a part of a composition has to be a rule's name or"),
        ("backward = [{ rule = 'scale', t = 1.0 }]", "unknown parameter of rule 'scale': 't'"),
        (
            "forward = 'heavyside'\nbackward = 'scale'",
            "unknown forward 'heavyside'. Did you mean 'heaviside'?",
        ),
        ("forward = 3\nbackward = 'scale'", "forward has to be the name of an op or a function"),
        ("backward = 'os:getcwd'", "'os:getcwd' has to be imported, which runs the code"),
        ("forward = 'os:getcwd'\nbackward = 'scale'", "has to be imported"),
    ],
)
def test_a_mistake_in_an_entry_is_an_error_that_says_where_and_what(
    fields: str, words: str, tmp_path: Path
) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(f"{HEAD}[[rule]]\n{fields}\n", "utf-8")
    with pytest.raises(fg.TableError) as error:
        fg.RuleTable.from_toml(path)
    assert str(error.value).startswith(f"{path}: entry 2 (line 7): ")
    assert words in str(error.value)
    with pytest.raises(fg.TableError) as error:
        fg.RuleTable.from_dict(tomllib.loads(path.read_text("utf-8")))
    assert str(error.value).startswith("entry 2: ")
    assert words in str(error.value)


def test_a_line_is_told_only_where_it_is_certain() -> None:
    text = "rule = [{ op = 'gelu', backward = 'scale' }, { op = 'rellu', backward = 'scale' }]"
    with pytest.raises(fg.TableError, match=r"^entry 2: unknown op"):
        fg.RuleTable.from_toml(text)
    text = "[[rule]]\nop = '''\n[[rule]]'''\nbackward = 'scale'"
    with pytest.raises(fg.TableError, match=r"^entry 1: unknown op"):
        fg.RuleTable.from_toml(text)


@pytest.mark.parametrize("end", ["\x85", "\u2028", "\u2029"])
def test_a_line_is_counted_as_an_editor_counts_it(end: str) -> None:
    with pytest.raises(fg.TableError, match=r"^entry 1 \(line 2\): unknown op"):
        fg.RuleTable.from_toml(f"# a{end}b\n[[rule]]\nop = 'rellu'\nbackward = 'scale'")


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_text_is_read_as_editors_of_every_system_write_it(
    mark: str, end: str, tmp_path: Path
) -> None:
    text = mark + EXAMPLE.replace("\n", end)
    path = tmp_path / "mine.toml"
    path.write_bytes(text.encode())
    assert fg.RuleTable.from_toml(text) == fg.RuleTable.from_toml(path) == TABLE


def test_a_file_that_is_no_text_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_bytes(b"version = 1 # \xff")
    with pytest.raises(fg.TableError, match=r"mine\.toml: the file is not UTF-8 text"):
        fg.RuleTable.from_toml(path)


# --- rules and forwards of the user's ---

MODULE = """
import torch
import freegrad_fx as fg

@fg.register("halved", overwrite=True)
def halved(grad, *, by: float = 2.0):
    "grad/by"
    return grad / by

def step(x):
    return (x > 0).to(x.dtype)

class Names:
    inner = staticmethod(step)

number = 3
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    name = "a_package_of_the_user_s"
    (tmp_path / f"{name}.py").write_text(MODULE, "utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield name
    # its rule ends with the test, so that another test has to import it again
    sys.modules.pop(name, None)


def test_what_is_the_user_s_is_imported_where_that_is_allowed(package: str) -> None:
    text = (
        f"[[rule]]\nop = 'relu'\nforward = '{package}:step'\nbackward = '{package}:halved'\n"
        f"params = {{ by = 4.0 }}\n\n[[rule]]\nbackward = [{{ rule = '{package}:halved' }}, 'scale']\n"
    )
    for source in (text, text.replace("step", "Names.inner")):
        with pytest.raises(fg.TableError, match="has to be imported, which runs the code"):
            fg.RuleTable.from_toml(source)
        assert "halved" not in fg.rules.available()
    table = fg.RuleTable.from_toml(text, allow_imports=True)
    assert table[0].rules == (fg.get("halved")(by=4.0),)
    assert table[0].forward(torch.ones(1)).tolist() == [1.0]
    assert fg.RuleTable.from_toml(table.to_toml(), allow_imports=True) == table
    assert f'backward = "{package}:halved"' in table.to_toml()
    assert f'forward = "{package}:step"' in table.to_toml()


@pytest.mark.parametrize("name", fg.quantizers.__all__)
def test_a_quantizer_is_written_so_that_it_quantizes_again(name: str) -> None:
    table = fg.RuleTable([fg.on(parameter="weight").backward(getattr(fg.quantizers, name)())])
    again = fg.RuleTable.from_toml(table.to_toml())
    assert again.to_toml() == table.to_toml()
    model, x = nn.Linear(4, 3), torch.randn(2, 4)
    assert torch.equal(fg.transform(model, again)(x), fg.transform(model, table)(x))


def test_a_quantizer_is_named_in_a_file_with_its_arguments() -> None:
    text = '[[rule]]\nparameter = "weight"\nbackward = "quantizers.lsq"\nparams = { bits = 2 }'
    model, x = nn.Linear(4, 3), torch.randn(2, 4)
    gm = fg.transform(model, fg.RuleTable.from_toml(text))
    (step,) = gm.rule_state_dict().values()
    expected = nn.functional.linear(x, (model.weight / step).round().clamp(-2, 1) * step)
    torch.testing.assert_close(gm(x), expected + model.bias)


@pytest.mark.parametrize(
    ("backward", "words"),
    [
        ('"quantizers.int5"', "unknown quantizer 'int5'. Did you mean 'int4'?"),
        ('"quantizers.lsq"\nparams = { bitz = 4 }', "parameter of quantizers.lsq: 'bitz'"),
        ('"quantizers.lsq"\nparams = { bits = 99 }', "from 2 to 16, got 99"),
    ],
)
def test_a_mistake_in_a_quantizer_is_an_error(backward: str, words: str) -> None:
    with pytest.raises(fg.TableError, match=rf"entry 1 .*{re.escape(words)}"):
        fg.RuleTable.from_toml(f'[[rule]]\nparameter = "*"\nbackward = {backward}')


def test_a_quantizer_that_was_changed_cannot_be_written() -> None:
    table = fg.RuleTable([fg.on(parameter="*").backward(fg.quantizers.lsq()(bits=8))])
    with pytest.raises(fg.TableError, match=r"not as quantizers\.lsq returns them"):
        table.to_toml()


def test_a_rule_that_is_registered_is_known_by_its_name() -> None:
    fg.register("third")(lambda grad: grad / 3)
    fg.register("a:b")(lambda grad: grad)
    text = "[[rule]]\nbackward = ['third', 'a:b']"
    assert [r.name for r in fg.RuleTable.from_toml(text)[0].rules] == ["third", "a:b"]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("no_such_package:rule", "cannot be imported: ModuleNotFoundError"),
        ("{}:none", "cannot be imported: AttributeError"),
        ("{}:number", "is not a Rule but 3"),
        (":rule", "cannot be imported"),
        ("{}:", "cannot be imported"),
        ("..:x", "cannot be imported"),
    ],
)
def test_what_cannot_be_imported_is_an_error_of_the_table(
    package: str, name: str, words: str
) -> None:
    text = f"[[rule]]\nbackward = '{name.format(package)}'"
    with pytest.raises(fg.TableError) as error:
        fg.RuleTable.from_toml(text, allow_imports=True)
    assert words in str(error.value)


def test_a_module_that_fails_is_an_error_of_the_table(tmp_path: Path, package: str) -> None:
    (tmp_path / "failing_of_the_user_s.py").write_text("1 / 0", "utf-8")
    text = "[[rule]]\nforward = 'failing_of_the_user_s:f'\nbackward = 'scale'"
    with pytest.raises(fg.TableError, match="cannot be imported: ZeroDivisionError"):
        fg.RuleTable.from_toml(text, allow_imports=True)
    text = f"[[rule]]\nforward = '{package}:number'\nbackward = 'scale'"
    with pytest.raises(fg.TableError, match="is not a function but 3"):
        fg.RuleTable.from_toml(text, allow_imports=True)


# --- what cannot be written ---


def local_rule() -> fg.Rule:
    return fg.register("local", overwrite=True)(lambda grad: grad)


def odd_rule() -> fg.Rule:
    @fg.register("odd", overwrite=True)
    def odd(grad: Tensor, *, value: Any = 0.0) -> Tensor:
        return grad

    return odd


class Local:
    @staticmethod
    def made() -> type[nn.Module]:
        class Hidden(nn.Module):
            pass

        return Hidden


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        (lambda: fg.on("relu", where=callable).backward("scale"), "`where` is a function"),
        (lambda: fg.on(type=Local.made()).backward("scale"), "the class Hidden cannot be imported by name"),
        (lambda: fg.on("relu").backward("scale", s=torch.tensor(1.0)), "parameter 's' of rule 'scale' is a tensor"),
        (lambda: fg.on("relu").backward(local_rule()), "rule 'local' cannot be imported; define it at the top level"),
        (lambda: fg.on("relu", forward=lambda x: x).backward("scale"), "the forward cannot be imported"),
        (lambda: fg.on("relu", forward=functools.partial(torch.mul, 2.0)).backward("scale"), "cannot be imported"),
        (lambda: fg.on(forward=fg.forward("clamp", min=torch.ones(()))).backward("scale"), "'min' of forward 'clamp'"),
    ],
)  # fmt: skip
def test_what_is_python_alone_cannot_be_written_and_the_error_says_which(
    entry: Any, words: str
) -> None:
    table = fg.RuleTable.of({"gelu": "scale"}) + fg.RuleTable([entry()])
    for write in (table.to_toml, table.to_dict):
        with pytest.raises(fg.TableError) as error:
            write()
        assert str(error.value).startswith(f"entry 2 ({table[1].selector}) cannot be written")
        assert words in str(error.value)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fg.FreegradWarning)
        fg.explain(Net(), table)  # in Python it works


def test_a_value_that_would_not_read_back_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "loose_of_the_user_s.py").write_text(
        "import freegrad_fx as fg\n"
        "@fg.register('loose', overwrite=True)\n"
        "def loose(grad, *, value: object = 0.0, mode: object = None):\n"
        "    return grad\n",
        "utf-8",
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    import loose_of_the_user_s as user  # type: ignore[import-not-found]

    def written(**values: Any) -> fg.RuleTable:
        table = fg.RuleTable([fg.on("relu").backward(user.loose, **values)])
        assert fg.RuleTable.from_toml(table.to_toml(), allow_imports=True) == table
        return table

    for value in (1, 1.5, "a", True, [1, "b"], 10**30):
        written(value=value)
    assert "mode" not in written(mode=None).to_toml()
    for value, words in (
        ((1, 2), "a value would be read back with another type"),
        (None, "parameter 'value' of rule 'loose' is a NoneType"),
        (torch.float32, "parameter 'value' of rule 'loose' is a dtype"),
        ({"a": 1}, "parameter 'value' of rule 'loose' is a dict"),
    ):
        with pytest.raises(fg.TableError, match=words):
            written(value=value)


# --- whatever else a file may hold ---

KEYS = st.sampled_from(
    [
        "version",
        "rule",
        "op",
        "module",
        "type",
        "parameter",
        "call",
        "forward",
        "backward",
        "params",
        "s",
        "a",
    ]
) | st.text(max_size=4)
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=6)
    | st.dates()
    | st.sampled_from(
        [
            "relu",
            "activations",
            "scale",
            "noise",
            "native",
            "re:(",
            "[",
            "1:2",
            ":",
            "a:b",
            "inf",
            "torch.nn.ReLU",
            "x.y",
        ]
    )
    | st.sampled_from([10**400, -1, 0, 1, 2])
)
DATA = st.recursive(
    SCALARS, lambda v: st.lists(v, max_size=3) | st.dictionaries(KEYS, v, max_size=4), max_leaves=12
)
ENTRIES = st.fixed_dictionaries(
    {"backward": DATA},
    optional=dict.fromkeys([*fg.on.__kwdefaults__, "op", "params", "sp"], DATA),
)


@given(DATA | st.fixed_dictionaries({"rule": st.lists(ENTRIES, max_size=3)}), st.booleans())
@settings(max_examples=300)
def test_no_data_raises_anything_but_the_one_error(data: Any, allow_imports: bool) -> None:
    with contextlib.suppress(fg.TableError):
        fg.RuleTable.from_dict(data, allow_imports=allow_imports)


def _mutations(text: str) -> st.SearchStrategy[str]:
    pieces = st.sampled_from(
        [*string.printable, "[[rule]]", "{", "}", '"', "'''", "= ", "\n", "é", "\0", "0x"]
    )
    cut = st.tuples(st.integers(0, len(text)), st.integers(0, 8), pieces | st.just(""))

    def mutated(cuts: list[tuple[int, int, str]]) -> str:
        result = text
        for start, length, new in cuts:
            result = result[:start] + new + result[start + length :]
        return result

    return st.lists(cut, min_size=1, max_size=6).map(mutated)


@given(_mutations(EXAMPLE) | st.text() | st.text(string.printable))
@settings(max_examples=300)
def test_no_text_raises_anything_but_the_one_error(text: str) -> None:
    try:
        table = fg.RuleTable.from_toml(text)
    except fg.TableError:
        return
    except OSError:
        assert text.endswith(".toml")  # it is a path
        return
    assert fg.RuleTable.from_toml(table.to_toml()) == table


@given(content=st.binary(max_size=60) | _mutations(EXAMPLE).map(str.encode))
@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_file_raises_anything_but_the_one_error(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "fuzzed.toml"
    path.write_bytes(content)
    with contextlib.suppress(fg.TableError):
        fg.RuleTable.from_toml(path)


# --- the tutorial ---


def test_the_tutorial_shows_the_same_table_in_python_and_in_toml() -> None:
    page = (DOCS / "tutorial.md").read_text("utf-8")
    section = page.partition("<!-- table -->")[2].partition("<!-- end of table -->")[0]
    blocks = dict(re.findall(r"^```(\w+)\n(.*?)^```$", section, re.DOTALL | re.MULTILINE))
    names: dict[str, Any] = {
        "fg": fg,
        "model": nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.GELU()),
    }
    exec(blocks["python"], names)
    assert fg.RuleTable.from_toml(blocks["toml"]) == names["table"]

"""The command line: every command with good and with bad input, compared with what the functions return."""

from __future__ import annotations

import json
import os
import pkgutil
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import freegrad_fx as fg
from places import IMPORTABLE, ROOT

typer = pytest.importorskip(
    "typer", reason="the command line needs typer: the extra freegrad_fx[cli]"
)
pytest.importorskip("rich", reason="the command line needs rich: the extra freegrad_fx[cli]")

from typer.testing import CliRunner  # noqa: E402

from freegrad_fx.cli import main  # noqa: E402
from freegrad_fx.cli.app import app  # noqa: E402
from freegrad_fx.cli.models import model_of, read_inputs  # noqa: E402
from freegrad_fx.vocabulary.activations import GROUPS, OPS  # noqa: E402

MINE = """
import freegrad_fx as fg
from torch import nn

net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.GELU())
number = 3

class Inner:
    net = net

class Branch(nn.Module):
    def forward(self, x):
        return x.relu() if x.shape[0] > 2 else x

class Masked(nn.Module):
    def forward(self, ids, mask):
        return ids.float().relu() * mask

def broken():
    raise KeyError("a fault")

def wants(argument):
    return net

@fg.register("doubled_by_test_cli")
def doubled(grad, *, by: float = 2.0):
    return by * grad
"""

TABLE = """
[[rule]]
op = "relu"
backward = "rectangular"
params = { a = -1.0, b = 1.0 }

[[rule]]
op = "gelu"
backward = "native"
"""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a module, a table and faulty tables, in which the commands run."""
    (tmp_path / "mine_of_test_cli.py").write_text(MINE, "utf-8")
    (tmp_path / "good.toml").write_text(TABLE, "utf-8")
    (tmp_path / "syntax.toml").write_text("[[rule]]\nop = relu\n", "utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "mine_of_test_cli", raising=False)
    return tmp_path


def run(*arguments: str, code: int = 0) -> Any:
    found = CliRunner().invoke(app, arguments)
    assert found.exit_code == code, (found.output, found.exception)
    assert found.exception is None or isinstance(found.exception, SystemExit)
    return found


def fails(*arguments: str) -> str:
    """The message of a user's error: on stderr, with nothing on stdout."""
    found = run(*arguments, code=1)
    assert found.stdout == ""
    assert found.stderr.startswith("error: ")
    assert "Traceback" not in found.stderr
    return str(found.stderr)


# --- rules and ops ---


def test_rules_are_listed_as_list_rules_lists_them() -> None:
    lines = run("rules").stdout.splitlines()[2:]
    names = fg.list_rules()
    assert len(lines) == len(names)
    assert all(line.startswith(name) for line, name in zip(lines, names, strict=True))
    options = ("--family", "surrogate", "--op", "relu")
    found = json.loads(run("rules", *options, "--json").stdout)
    assert [rule["name"] for rule in found] == fg.list_rules("surrogate", "relu")


def test_a_rule_is_shown_with_what_it_declares() -> None:
    assert run("rules", "show", "reste").stdout == f"{fg.get('reste').info}\n"
    found = json.loads(run("rules", "show", "rectangular", "--json").stdout)
    assert found["parameters"]["a"] == {"value": -0.5, "types": "float", "range": "a <= b"}
    assert (found["saves"], found["saved_bytes"]) == (["x"], 4)


def test_a_rule_of_your_own_is_shown() -> None:
    shown = run("rules", "show", "mine_of_test_cli:doubled").stdout
    assert shown.startswith("doubled_by_test_cli: ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["rules", "--family", "surogate"], "Did you mean 'surrogate'?"),
        (["rules", "--op", "rellu"], "Did you mean 'relu'?"),
        (["rules", "show", "arctn"], "unknown rule 'arctn'. Did you mean 'arctan'?"),
        (["rules", "show", "native"], "native is not a rule"),
        (["rules", "show", "mine_of_test_cli:number"], "is not a Rule"),
        (["ops", "--group", "softmaxes"], "unknown group 'softmaxes'. Did you mean 'softmax'?"),
    ],
)
def test_an_unknown_name_is_an_error_with_the_nearest_names(
    arguments: list[str], message: str
) -> None:
    assert message in fails(*arguments)


def test_ops_are_those_of_the_vocabulary() -> None:
    found = json.loads(run("ops", "--json").stdout)
    assert [line["op"] for line in found] == list(OPS)
    (relu,) = [line for line in found if line["op"] == "relu"]
    assert relu["modules"] == ["nn.ReLU"]
    assert relu["replaces_forwards"]
    lines = run("ops", "--group", "softmax").stdout.splitlines()[2:]
    assert {line.split()[0] for line in lines} == GROUPS["softmax"]


# --- explain ---


def test_explain_prints_the_plan() -> None:
    module = "mine_of_test_cli:net"
    printed = run("explain", module, "--rules", "good.toml").stdout
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.GELU())
    plan = fg.explain(net, "good.toml")
    # nothing of a Sequential is the user's code, so that there is no line
    decisions = json.loads(run("explain", module, "-r", "good.toml", "--json").stdout)["sites"]
    assert [site["source"] for site in decisions] == ["", ""]
    assert [(s["site"], s["action"]) for s in decisions] == [
        (d.site.name, d.action) for d in plan.decisions
    ]
    assert printed.startswith("Sequential, 2 sites: 1 rewritten, 1 left native.\n")
    assert "rectangular(a=-1.0, b=1.0)" in printed
    assert "0.weight" in run("explain", module).stdout


def test_a_rule_of_explain_has_parameters() -> None:
    arguments = ("-r", "rectangular", "-p", "a=-2", "-p", "save=mask", "--json")
    found = json.loads(run("explain", "mine_of_test_cli:Inner.net", *arguments).stdout)
    (rule,) = found["sites"][0]["rules"]
    assert rule == {
        "rule": "rectangular",
        "params": fg.rules.rectangular(a=-2.0, save="mask").given,
    }
    own = ("-r", "mine_of_test_cli:doubled", "-p", "by=3.0", "--json")
    found = json.loads(run("explain", "mine_of_test_cli:net", *own).stdout)
    assert found["sites"][1]["rules"] == [{"rule": "doubled_by_test_cli", "params": {"by": 3.0}}]


def test_example_inputs_capture_what_is_not_traced() -> None:
    model = "mine_of_test_cli:Branch"
    message = fails("explain", model, "-r", "arctan")
    assert "On the command line, --input gives example inputs" in message
    assert "1 site: 1 rewritten" in run("explain", model, "-r", "arctan", "-i", "3,4").stdout
    named = ("-i", "mask=bool:3,4", "--input", "ids=int:3,4")
    on_meta = run("explain", "mine_of_test_cli:Masked", "-r", "arctan", "--meta", *named)
    assert "1 site: 1 rewritten" in on_meta.stdout


def test_inputs_are_read() -> None:
    assert read_inputs([]) is None
    values = read_inputs(["2,3", "int:4", "bool:1"])
    assert isinstance(values, tuple)
    assert [(tuple(v.shape), v.dtype) for v in values] == [
        ((2, 3), torch.float32), ((4,), torch.int64), ((1,), torch.bool)
    ]  # fmt: skip
    named = read_inputs(["x=2,3"])
    assert isinstance(named, dict)
    assert named["x"].shape == (2, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "'nothing' names no model"),
        (["no_such_module_at_all:f"], "there is no module 'no_such_module_at_all'"),
        (["mine_of_test_cli:nett"], "Did you mean 'net'? Valid: net, Branch, Inner"),
        (["mine_of_test_cli:number"], "is not a model but of type int"),
        (["mine_of_test_cli:broken"], "cannot be built: KeyError: 'a fault'"),
        (["mine_of_test_cli:wants"], "missing 1 required positional argument"),
        (["hf:nothing.json"], "nothing is downloaded"),
        (["hf:good.toml"], "is not the config of a transformers model"),
        (["torchvision:resnet19"], "Did you mean 'resnet18'?"),
        (["mine_of_test_cli:net", "-i", "3,5"], "does not take the example inputs"),
        (["mine_of_test_cli:net", "-r", "none.toml"], "none.toml cannot be read: No such file"),
        (["mine_of_test_cli:net", "-r", "syntax.toml"], "invalid TOML"),
        (["mine_of_test_cli:net", "-r", "arctn"], "unknown rule 'arctn'"),
        (["mine_of_test_cli:net", "-r", "arctan", "-p", "alpha=high"], "error: parameter 'alpha'"),
        (["mine_of_test_cli:net", "-r", "arctan", "-p", "beta=1"], "Valid: alpha"),
        (["mine_of_test_cli:Branch", "-i", "3,4", "-r", "only_gelu.toml", "--strict"], "strict: "),
    ],
)  # fmt: skip
def test_what_explain_cannot_do_is_an_error(arguments: list[str], message: str, here: Path) -> None:
    (here / "only_gelu.toml").write_text('[[rule]]\nop = "gelu"\nbackward = "stop"\n', "utf-8")
    assert message in fails("explain", *arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        ["explian"],
        ["explain"],
        ["explain", "mine_of_test_cli:net", "--rulez", "arctan"],
        ["explain", "mine_of_test_cli:net", "-i", "3,x"],
        ["explain", "mine_of_test_cli:net", "-i", "long:3"],
        ["explain", "mine_of_test_cli:net", "-i", "a=3", "-i", "4"],
        ["explain", "mine_of_test_cli:net", "-r", "arctan", "-p", "alpha"],
        ["explain", "mine_of_test_cli:net", "-p", "alpha=1"],
        ["explain", "mine_of_test_cli:net", "-r", "good.toml", "-p", "alpha=1"],
        ["compare", "mine_of_test_cli:net", "-r", "arctan"],
        ["memory", "mine_of_test_cli:net"],
        ["compare", "mine_of_test_cli:net", "-i", "3,4"],
        ["plot", "arctan"],
        ["plot", "arctan", "-o", "a.png", "--low", "x"],
        ["check"],
    ],
)
def test_a_wrong_option_is_an_error_of_usage(arguments: list[str]) -> None:
    found = run(*arguments, code=2)
    assert found.stdout == ""
    assert "Usage: " in found.stderr


@pytest.mark.filterwarnings("default")
def test_a_warning_is_a_line_on_stderr() -> None:
    found = run("explain", "mine_of_test_cli:Branch", "-i", "3,4", "-r", "gelu.toml", code=1)
    assert found.stdout == ""
    Path("gelu.toml").write_text('[[rule]]\nop = "gelu"\nbackward = "stop"\n', "utf-8")
    found = run("explain", "mine_of_test_cli:Branch", "-i", "3,4", "-r", "gelu.toml")
    assert found.stderr.startswith("warning: the entry 'gelu' matches nothing in Branch")
    assert "MATCHES NOTHING" in found.stdout
    assert "\x1b" not in found.output, "colour, and this is no terminal"


def test_a_traceback_is_shown_if_it_is_asked_for() -> None:
    found = CliRunner().invoke(app, ["--traceback", "explain", "mine_of_test_cli:broken"])
    assert found.exit_code == 1
    assert isinstance(found.exception.__cause__, KeyError)  # type: ignore[union-attr]


def test_a_torchvision_that_does_not_load_is_an_error(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (here / "torchvision.py").write_text("raise RuntimeError('operator does not exist')", "utf-8")
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    monkeypatch.syspath_prepend(here)
    message = fails("explain", "torchvision:resnet18")
    assert "does not load: RuntimeError: operator does not exist" in message
    assert torch.__version__ in message
    assert json.loads(run("doctor", "--json").stdout)["faults"].keys() == {"torchvision"}
    monkeypatch.setitem(sys.modules, "timm", None)
    assert "timm is not installed: pip install timm" in fails("explain", "timm:resnet18")


def test_a_model_of_torchvision_is_built_without_weights() -> None:
    models = pytest.importorskip("torchvision").models
    with torch.device("meta"):
        assert type(model_of("torchvision:resnet18")) is type(models.resnet18())
        # the builder would download a backbone otherwise
        assert isinstance(model_of("torchvision:lraspp_mobilenet_v3_large"), nn.Module)


@pytest.mark.slow
def test_models_of_timm_and_transformers(transformers: Any, here: Path) -> None:
    pytest.importorskip("timm")
    assert "17 rewritten" in run("explain", "timm:resnet18", "--meta", "-r", "guided").stdout
    assert "Did you mean" in fails("explain", "timm:resnet18x")
    config = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 32, "vocab_size": 10}
    config |= {"num_hidden_layers": 2, "num_attention_heads": 2}
    (here / "config.json").write_text(json.dumps(config), "utf-8")
    found = run("explain", f"hf:{here}", "-i", "int:1,8", "--meta", "-r", "identity_rule", "--json")
    assert [s["op"] for s in json.loads(found.stdout)["sites"]] == ["silu", "silu"]
    config["architectures"] = ["LlamaForCausalLM"]
    (here / "config.json").write_text(json.dumps(config), "utf-8")
    assert type(model_of("hf:config.json")) is transformers.LlamaForCausalLM
    (here / "config.json").write_text('{"model_type": "lama"}', "utf-8")
    assert "Did you mean 'llama'?" in fails("explain", "hf:config.json")


# --- compare ---


def test_compare_prints_the_comparison(here: Path) -> None:
    arguments = ("-i", "16,4", "-r", "native", "-r", "d(Linear)", "-r", "good.toml", "--seeds", "2")
    found = run("compare", "mine_of_test_cli:net", *arguments)
    head = "Sequential: gradients beside the native ones, 1 batch, 2 seeds\n"
    assert found.stdout.startswith(head)
    compared = run("compare", "mine_of_test_cli:net", *arguments, "--batches", "2", "--json")
    rows = json.loads(compared.stdout)["rows"]
    assert list(dict.fromkeys(row["table"] for row in rows)) == ["native", "d(Linear)", "good.toml"]
    same = [row["cosine"]["mean"] for row in rows if row["table"] == "native"]
    assert same == pytest.approx([1.0] * len(same))
    (changed,) = [row for row in rows if row["table"] == "d(Linear)" and row["name"] == "0.weight"]
    assert changed["cosine"]["mean"] < 0.999


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-r", "arctan", "-i", "3,5"], "(3x5 and 4x8). `freegrad-fx --traceback"),
        (["-r", "arctn", "-i", "3,4"], "unknown rule 'arctn'"),
    ],
)
def test_what_compare_cannot_do_is_an_error(arguments: list[str], message: str) -> None:
    assert message in fails("compare", "mine_of_test_cli:net", *arguments)


# --- memory ---


def test_memory_counts_what_is_kept(here: Path) -> None:
    found = run("memory", "mine_of_test_cli:net", "-i", "16,4", "--json", "-r", "few_bit")
    rows = {row["site"]: row for row in json.loads(found.stdout)["rows"]}
    assert (rows["3:gelu"]["native"], rows["3:gelu"]["kept"]) == (16 * 8 * 4, 16 * 8 * 3 // 8)
    assert rows["3:gelu"]["rule"] == "few_bit"
    text = run("memory", "mine_of_test_cli:net", "-i", "16,4", "--eval").stdout
    assert text.startswith("Sequential: 1.00 KiB kept for the backward, 1.00 KiB natively")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-i", "3,5"], "what mine_of_test_cli:net keeps cannot be counted: RuntimeError"),
        (["-r", "arctn", "-i", "3,4"], "unknown rule 'arctn'"),
        (["-r", "missing.toml", "-i", "3,4"], "missing.toml cannot be read"),
    ],
)
def test_what_memory_cannot_do_is_an_error(arguments: list[str], message: str) -> None:
    assert message in fails("memory", "mine_of_test_cli:net", *arguments)


# --- check ---


def test_a_valid_table_is_printed() -> None:
    found = run("check", "good.toml").stdout
    assert found.startswith("good.toml is valid.\n")
    assert re.search(r"^2 +relu +rectangular\(a=-1.0, b=1.0\)$", found, re.MULTILINE)
    entries = json.loads(run("check", "good.toml", "--json").stdout)["entries"]
    assert [(e["line"], e["backward"]) for e in entries][1] == (7, "native")


def test_all_faults_of_a_table_are_listed_with_their_lines(here: Path) -> None:
    faulty = TABLE.replace('"relu"', '"rellu"').replace('"native"', '"arctn"')
    (here / "faulty.toml").write_text(f"version = 1\n{faulty}\n[[rule]]\nop = 'eluu'\n", "utf-8")
    lines = run("check", "faulty.toml", code=1).stdout.splitlines()
    assert [line.partition(" ")[0] for line in lines] == [
        f"faulty.toml:{n}:" for n in (3, 8, 12, 12)
    ]
    assert "Did you mean 'relu'?" in lines[0]
    assert "backward" in lines[2]
    assert "Did you mean 'elu'?" in lines[3]
    faults = json.loads(run("check", "faulty.toml", "--json", code=1).stdout)["faults"]
    assert [fault["line"] for fault in faults] == [3, 8, 12, 12]


@pytest.mark.parametrize(
    ("text", "place", "message"),
    [
        ("[[rule]]\nop = relu\n", "bad.toml:2:", "invalid TOML"),
        ("version = 7\n[[rule]]\nbackward = 'stop'", "bad.toml:", "tables of version 1"),
        ("rule = 3", "bad.toml:", "rule has to be a list"),
        ("[[rule]]\nbackward = 'mine_of_test_cli:doubled'", "bad.toml:1:", "allow_imports"),
        ("\N{EURO SIGN}", "bad.toml:", "not UTF-8"),
    ],
)  # fmt: skip
def test_a_fault_of_a_table(text: str, place: str, message: str, here: Path) -> None:
    (here / "bad.toml").write_bytes(text.encode("cp1252"))
    found = run("check", "bad.toml", code=1).stdout
    assert found.startswith(place)
    assert message in found


def test_check_imports_only_if_it_is_allowed(here: Path) -> None:
    (here / "own.toml").write_text("[[rule]]\nbackward = 'mine_of_test_cli:doubled'", "utf-8")
    assert "mine_of_test_cli" not in sys.modules
    run("check", "own.toml", code=1)
    assert "mine_of_test_cli" not in sys.modules
    run("check", "own.toml", "--allow-imports")
    assert "none.toml cannot be read" in fails("check", "none.toml")


# --- tables ---


def test_ready_tables_are_printed_as_files_of_tables() -> None:
    listed = json.loads(run("tables", "--json").stdout)
    assert [line["table"] for line in listed] == fg.tables.__all__
    assert [line.split()[0] for line in run("tables").stdout.splitlines()[2:]] == fg.tables.__all__
    for name in fg.tables.__all__:
        table = getattr(fg.tables, name)()
        # not the tables themselves: of two tables, each has steps of its own to learn
        assert fg.RuleTable.from_toml(run("tables", name).stdout).to_toml() == table.to_toml()
    found = run("explain", "mine_of_test_cli:net", "-r", "attn_lrp", "--json").stdout
    plan = fg.explain(model_of("mine_of_test_cli:net"), fg.tables.attn_lrp())
    assert json.loads(found)["entries"] == json.loads(plan.to_json())["entries"]
    assert (
        fg.RuleTable.from_dict(json.loads(run("tables", "gim", "--json").stdout)) == fg.tables.gim()
    )
    assert "Did you mean 'gim'?" in fails("tables", "gimm")


# --- plot ---


def test_a_picture_is_written(here: Path) -> None:
    pytest.importorskip("matplotlib")
    run("plot", "arctan", "-p", "alpha=3.0", "--op", "heaviside", "--low", "-2", "-o", "a.svg")
    picture = (here / "a.svg").read_text("utf-8")
    assert "<!-- arctan(alpha=3.0) -->" in picture
    assert "<!-- heaviside(x) -->" in picture


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["arctan", "-o", "a.xyz"], "a.xyz cannot be written: Format 'xyz' is not supported"),
        (["arctan", "-o", "none/a.png"], "none/a.png cannot be written: No such file"),
        (["arctan", "-o", "a.png", "--op", "rellu"], "Did you mean 'relu'?"),
        (["arctan", "-o", "a.png", "--low", "4"], "from low to high"),
        (["native", "-o", "a.png"], "native is not a rule"),
    ],
)
def test_what_plot_cannot_do_is_an_error(arguments: list[str], message: str) -> None:
    pytest.importorskip("matplotlib")
    assert message in fails("plot", *arguments)


def test_plot_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert "plot needs matplotlib: pip install matplotlib" in fails("plot", "arctan", "-o", "a.png")


# --- draw ---


def test_a_model_is_drawn(here: Path) -> None:
    model = ["draw", "mine_of_test_cli:net", "-r", "good.toml"]
    run(*model, "-o", "a.svg", "--theme", "dark")
    picture = (here / "a.svg").read_text("utf-8")
    assert picture.startswith("<svg")
    assert "rectangular(a=-1.0, b=1.0)" in picture
    run(*model, "-o", "b.svg", "-i", "1,4", "--depth", "0")
    assert "linear</text>" in (here / "b.svg").read_text("utf-8")  # as torch.export names it


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["net", "-o", "a.png"], "'a.png' ends otherwise"),
        (["net", "-o", "none/a.svg"], "none/a.svg cannot be written: No such"),
        (["net", "-o", "a.svg", "--theme", "drak"], "Did you mean 'dark'?"),
        (["Branch", "-o", "a.svg"], "--input gives example inputs"),
        (["nothing", "-o", "a.svg"], "nothing"),
    ],
)
def test_what_draw_cannot_do_is_an_error(arguments: list[str], message: str) -> None:
    model, *options = arguments
    assert message in fails("draw", f"mine_of_test_cli:{model}", "-r", "good.toml", *options)


# --- the installation ---


def test_doctor_reports_versions() -> None:
    found = json.loads(run("doctor", "--json").stdout)
    assert (found["freegrad_fx"], found["torch"]) == (fg.__version__, torch.__version__)
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found["packages"]["typer"]
    assert f"torch         {torch.__version__}" in run("doctor").stdout
    assert run("--version").stdout == f"freegrad_fx {fg.__version__}, torch {torch.__version__}\n"


def test_the_commands_run_as_a_module(here: Path) -> None:
    """In a process of its own, with a module of the current folder, and no colour in a pipe."""
    process = subprocess.run(
        [sys.executable, "-m", "freegrad_fx", "rules", "show", "mine_of_test_cli:doubled"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(IMPORTABLE)},
        cwd=here,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=120,
    )
    assert (process.returncode, process.stderr) == (0, "")
    assert process.stdout.startswith("doubled_by_test_cli: ")


def test_the_entry_point_is_the_main_function() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert pkgutil.resolve_name(project["scripts"]["freegrad-fx"]) is main
    assert {d.partition(">")[0] for d in project["optional-dependencies"]["cli"]} == {
        "rich",
        "typer",
    }


def test_without_typer_the_message_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "typer", None)
    with pytest.raises(SystemExit, match=r"needs typer: pip install typer, .*freegrad_fx\[cli\]"):
        main()


def test_the_documentation_has_every_command() -> None:
    page = ROOT / "docs" / "cli.md"
    if not page.exists():
        pytest.skip("docs/cli.md is not among the files of this sdist")
    commands = typer.main.get_command(app).commands
    missing = [name for name in commands if f"freegrad-fx {name}" not in page.read_text("utf-8")]
    assert missing == []


def test_the_demo_trains_with_each_backward_and_concludes_from_what_it_found() -> None:
    found = json.loads(run("demo", "--epochs", "40", "--json").stdout)
    results = found["results"]
    assert found["forward_is_bit_identical"]
    assert results["native"]["cosine"] == pytest.approx(1.0)
    assert all(abs(one["cosine"]) < 0.99 for name, one in results.items() if name != "native")
    assert all(one["accuracy"] > 0.6 for one in results.values())
    assert [name for name, one in results.items() if one["forward"] != "relu"] == ["spiking"]
    text = run("demo", "--epochs", "40").stdout
    assert f"the network reaches {results['native']['accuracy']:.1%}" in text
    assert all(one["backward"] in text for one in results.values())
    assert "Conclusion: " in text


def test_the_demo_needs_an_epoch() -> None:
    result = run("demo", "--epochs", "0", code=2)
    assert "--epochs" in result.stderr

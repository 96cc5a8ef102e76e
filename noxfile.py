"""The tasks of the project. Each session installs everything that it needs.

``nox -l`` lists them, ``nox -s NAME`` runs one, and ``nox -r -s NAME`` keeps the environment of the
last run. All sessions except ``tests-on`` install the versions of ``constraints.txt``, which were tested together.
"""

import re
import sys
import tempfile
from pathlib import Path

import nox

nox.needs_version = ">=2024.10.9"
nox.options.default_venv_backend = "venv"
nox.options.sessions = ["lint", "types", "tests"]
nox.options.error_on_missing_interpreters = True

ROOT = Path(__file__).parent
CONSTRAINTS = ROOT / "constraints.txt"
README = ROOT / "README.md"

# The supported releases of PyTorch, each with the matching torchvision.
RELEASES = {
    "2.12": ("torch==2.12.1", "torchvision==0.27.1"),
    "2.13": ("torch==2.13.0", "torchvision==0.28.0"),
    "2.14": ("torch==2.14.1", "torchvision==0.29.1"),
    "2.15": ("torch==2.15.0", "torchvision==0.29.2"),
}
NEWEST = "newest"  # the newest release on the package index

# Tests the built wheel, in an environment that contains only the wheel and torch.
WHEEL_TRIAL = """
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
import sys

import torch
import freegrad_fx as fg

wheel = sys.argv[1]
assert Path(sys.prefix) in Path(fg.__file__).parents, f"not the wheel: {fg.__file__}"
assert fg.__version__ == version("freegrad_fx") == wheel.split("-")[1], (fg.__version__, wheel)
assert files("freegrad_fx").joinpath("py.typed").is_file(), "py.typed is not in the wheel"

model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 1))
gm = fg.transform(model, {"relu": "d(Linear)"})
x = torch.randn(16, 4, requires_grad=True)
y = gm(x)
assert torch.equal(y, model(x)), "the forward changed"
(grad,) = torch.autograd.grad(y.sum(), x)
expected = (model[2].weight @ model[0].weight).expand(16, 4)
torch.testing.assert_close(grad, expected)
print(fg.report(gm))
print(f"{wheel} works with torch {torch.__version__}")
"""


def install(session: nox.Session, *what: str) -> None:
    """Install packages, in the versions of ``constraints.txt``."""
    session.install("-c", str(CONSTRAINTS), *what)


def install_project(session: nox.Session, extra: str) -> None:
    """Install the package itself, editable, with one of its extras."""
    install(session, "-e", f"{ROOT}[{extra}]")


@nox.session
def demo(session: nox.Session) -> None:
    """Transform resnet18 and a small network, train the latter with four backwards; takes under two minutes."""
    install_project(session, "examples")
    session.run("python", "examples/demo.py", *session.posargs)


@nox.session
def tests(session: nox.Session) -> None:
    """Run the tests without the slow ones. Arguments after ``--`` replace this selection: ``-- -m slow``."""
    install_project(session, "test")
    session.run("pytest", *parallel(), *(session.posargs or ["-m", "not slow"]))


@nox.session(name="tests-on")
@nox.parametrize("torch", [*RELEASES, NEWEST])
def tests_on(session: nox.Session, torch: str) -> None:
    """Run the tests without the slow ones with a release of PyTorch; ``--force-python 3.13`` chooses the Python.

    The newest release is installed as a user installs it: with the wheel, in the versions that pip chooses.
    """
    temporary = Path(session.create_tmp()).resolve()
    if torch == NEWEST:
        session.install("build")
        wheel = build_into(session, temporary / "dist", "--wheel")
        session.install("--upgrade", "torch", "torchvision", str(wheel))
        try_wheel(session, "python", wheel)
    packages = RELEASES.get(torch, ())
    others = temporary / "constraints.txt"
    pinned = CONSTRAINTS.read_text("utf-8").splitlines()
    of_torch = re.compile(r"(torch|torchvision|torchaudio)==")
    others.write_text("\n".join(line for line in pinned if not of_torch.match(line)), "utf-8")
    session.install("-c", str(others), *packages, "-e", f"{ROOT}[test]")
    version = "import sys, torch; print('Python', sys.version, 'torch', torch.__version__)"
    session.run("python", "-c", version)
    session.run("pytest", *parallel(), *(session.posargs or ["-m", "not slow"]))


@nox.session
def frameworks(session: nox.Session) -> None:
    """Run the tests and the documentation of trainers and of what else is wrapped around a model."""
    install_project(session, "frameworks")
    pages = "trainers.md or frameworks.md"
    session.run("pytest", "tests/integrations", *session.posargs)
    session.run("pytest", "tests/project/test_docs.py", "-k", pages, *session.posargs)


@nox.session
def coverage(session: nox.Session) -> None:
    """Run all tests and measure their coverage: a table, coverage.xml and htmlcov/."""
    install_project(session, "test")
    reports = ["--cov-report=term", "--cov-report=xml", "--cov-report=html"]
    session.run("pytest", *parallel(), "--cov", *reports, *session.posargs)


def parallel() -> list[str]:
    """Return pytest's options for parallel workers: at most four, as each worker imports torch."""
    return ["--numprocesses=auto", "--maxprocesses=4", "--dist=worksteal"]


@nox.session
def lint(session: nox.Session) -> None:
    """Check style and formatting; ``nox -s lint -- --fix`` fixes what can be fixed automatically."""
    # Only ruff, not the package: linting does not need torch.
    install(session, "ruff")
    fix = "--fix" in session.posargs
    session.run("ruff", "check", *(["--fix"] if fix else []), ".")
    session.run("ruff", "format", *([] if fix else ["--check"]), ".")


@nox.session
def types(session: nox.Session) -> None:
    """Check the types of the package with ``mypy --strict``."""
    install_project(session, "types")
    session.run("mypy", *session.posargs)


@nox.session
def docs(session: nox.Session) -> None:
    """Build the documentation into docs/_build/html; a warning is an error."""
    install_project(session, "docs")
    options = ["-W", "--keep-going", "--nitpicky", "--fresh-env", "--builder=html"]
    session.run("sphinx-build", *options, "docs", "docs/_build/html", *session.posargs)


@nox.session
def bench(session: nox.Session) -> None:
    """Run the benchmarks and write out/benchmarks.json; ``-- --quick`` only checks that they run."""
    install_project(session, "bench")
    results = ROOT / "out" / "benchmarks.json"
    results.parent.mkdir(exist_ok=True)
    session.run("pytest", "benchmarks", f"--benchmark-json={results}", *session.posargs)


@nox.session
def compare(session: nox.Session) -> None:
    """Compare with native PyTorch and other libraries, and write out/compare.json; ``-- --help`` lists the options."""
    install_project(session, "bench,extension,peers")
    session.run("python", "-m", "benchmarks.compare", *session.posargs)


@nox.session
def conformance(session: nox.Session) -> None:
    """Compare the rules with those of other libraries, and write the table of the documentation."""
    install_project(session, "bench,peers")
    table = ROOT / "docs" / "_tables" / "conformance.md"
    session.run("python", "-m", "benchmarks.conformance", "--write", str(table), *session.posargs)


@nox.session
def memory(session: nox.Session) -> None:
    """Count what whole models keep for their backward, and write the table of the documentation."""
    install_project(session, "bench")
    table = ROOT / "docs" / "_tables" / "memory.md"
    session.run("python", "-m", "benchmarks.memory", "--write", str(table), *session.posargs)


@nox.session
def gpu(session: nox.Session) -> None:
    """Check and measure the rules on a GPU of CUDA; on a CPU with small sizes."""
    install_project(session, "bench")
    session.run("python", "-m", "benchmarks.gpu", *session.posargs)


@nox.session
def examples(session: nox.Session) -> None:
    """Run every script of examples/ with ``--quick``, and the code in the README."""
    install_project(session, "examples")
    install(session, "transformers")  # for attribution_llm.py
    program = Path(session.create_tmp()).resolve() / "readme.py"
    blocks = re.findall(
        r"^```python\n(.*?)^```$", README.read_text("utf-8"), re.DOTALL | re.MULTILINE
    )
    program.write_text("\n".join(blocks), "utf-8")
    session.run("python", str(program))
    for script in sorted(Path("examples").glob("[!_]*.py")):
        session.run("python", str(script), "--quick", *session.posargs)


@nox.session
def build(session: nox.Session) -> None:
    """Build sdist and wheel, check their metadata, and test the wheel in a clean environment."""
    install(session, "build", "twine")
    dist = ROOT / "dist"
    wheel = build_into(session, dist)
    session.run("twine", "check", "--strict", *map(str, dist.glob("freegrad_fx-*")))

    clean = Path(session.create_tmp()).resolve() / "clean"
    session.run("python", "-m", "venv", "--clear", str(clean))
    python = str(clean / ("Scripts" if sys.platform == "win32" else "bin") / "python")
    session.run(python, "-m", "pip", "install", "-c", str(CONSTRAINTS), str(wheel), external=True)
    try_wheel(session, python, wheel)


def build_into(session: nox.Session, dist: Path, *options: str) -> Path:
    """Build the package into a folder, after deleting earlier builds there; return the wheel."""
    for old in dist.glob("freegrad_fx-*"):
        old.unlink()
    session.run("python", "-m", "build", "--outdir", str(dist), *options, str(ROOT))
    (wheel,) = dist.glob("freegrad_fx-*.whl")
    return wheel


def try_wheel(session: nox.Session, python: str, wheel: Path) -> None:
    """Run the trial with an installed wheel, outside of the checkout."""
    with tempfile.TemporaryDirectory() as elsewhere, session.chdir(elsewhere):
        # -I: the current folder and PYTHONPATH are ignored, so the checkout cannot be imported.
        session.run(python, "-I", "-c", WHEEL_TRIAL, wheel.name, external=True)


@nox.session(name="import-time")
def import_time(session: nox.Session) -> None:
    """Measure `import freegrad_fx` after `import torch`: CPU time and number of modules."""
    install_project(session, "bench")
    session.run("python", "-m", "benchmarks.import_time", *session.posargs)

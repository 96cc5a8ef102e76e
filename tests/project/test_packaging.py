"""The supported versions are the same in all files, and the metadata of the package are complete."""

from __future__ import annotations

import ast
import re
import tomllib
from importlib.metadata import metadata, version
from typing import Any

import pytest

import freegrad_fx as fg
from freegrad_fx._torch.releases import TESTED
from places import ROOT

PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
PYTHONS = ("3.11", "3.12", "3.13")


def text_of(name: str) -> str:
    file = ROOT / name
    if not file.exists():
        pytest.skip(f"{name} is not among the files of this sdist")
    return file.read_text("utf-8")


def releases_of_nox() -> list[str]:
    for node in ast.parse(text_of("noxfile.py")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "RELEASES":
            return [str(release) for release in ast.literal_eval(node.value)]
    raise AssertionError("noxfile.py has no RELEASES")


def test_the_version_has_one_source() -> None:
    assert PROJECT["dynamic"] == ["version"]
    assert fg.__version__ == version("freegrad_fx")
    assert f"\nversion: {fg.__version__}\n" in text_of("CITATION.cff")
    assert f"## [{fg.__version__}]" in text_of("CHANGELOG.md")


def test_the_same_releases_of_pytorch_are_supported_everywhere() -> None:
    assert releases_of_nox() == list(TESTED)
    assert PROJECT["dependencies"] == [f"torch>={TESTED[0]}"]
    listed = re.findall(r"^\| (2\.\d+)\.", text_of("docs/releases.md"), re.MULTILINE)
    assert list(dict.fromkeys(listed)) == list(TESTED)
    assert f"torch {', '.join(TESTED[:-1])} and {TESTED[-1]}" in text_of("README.md")


def test_the_same_pythons_are_supported_everywhere() -> None:
    classified = [c.rpartition(" ")[2] for c in PROJECT["classifiers"] if "Python :: 3." in c]
    assert tuple(classified) == PYTHONS
    assert PROJECT["requires-python"] == f">={PYTHONS[0]}"
    assert f"Python {', '.join(PYTHONS[:-1])} and {PYTHONS[-1]}" in text_of("README.md")
    tried = re.findall(r"^\| 2\.\S+ \| (3\.\d+)", text_of("docs/releases.md"), re.MULTILINE)
    assert set(tried) == set(PYTHONS)


def test_the_metadata_of_the_package_are_complete() -> None:
    found = metadata("freegrad_fx")
    for field in ("Summary", "Author", "Keywords", "Requires-Python", "License-Expression"):
        assert found[field], field
    assert found.get_all("Project-URL")
    assert found["Description-Content-Type"] == "text/markdown"
    assert [r for r in found.get_all("Requires-Dist") or [] if "extra ==" not in r] == [
        f"torch>={TESTED[0]}"
    ]

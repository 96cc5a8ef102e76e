"""Sphinx directives for what the package holds: its rules and its activations.

A page names a directive, and what it shows is read from the package while the page is built: it
cannot differ from the code. Nothing here knows a rule or an activation by name.
"""

import builtins
import importlib
import inspect
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.ext.napoleon import GoogleDocstring
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective
from sphinx.util.typing import ExtensionMetadata

import freegrad_fx
from freegrad_fx import rules, vocabulary

_log = logging.getLogger(__name__)

# What a rule's reference can cite, and where that is to be read.
_CITATION = re.compile(r"(doi:10\.[^\s,;)]+|arXiv:\d{4}\.\d{4,5})")
_SITES = {"doi": "https://doi.org/", "arXiv": "https://arxiv.org/abs/"}

# Where everyone's code finds functions, and how it calls these places.
_PLACES = {
    "F.": torch.nn.functional,
    "torch.": torch,
    "torch.special.": torch.special,
    "": builtins,
}


def code(*names: str) -> nodes.paragraph:
    """A cell with names in it, as code."""
    cell = nodes.paragraph()
    for number, name in enumerate(names):
        cell += [nodes.Text(", ")] * (number > 0) + [nodes.literal(name, name)]
    return cell


def after(text: str, cell: nodes.paragraph) -> nodes.paragraph:
    """The cell, with text in front of it."""
    cell.insert(0, nodes.Text(text))
    return cell


def linked(text: str) -> nodes.paragraph:
    """A cell with text in it; a DOI or an arXiv number becomes a link."""
    cell = nodes.paragraph()
    for part in _CITATION.split(text):
        kind, _, number = part.partition(":")
        if _CITATION.fullmatch(part):
            cell += nodes.reference(part, part, refuri=_SITES[kind] + number)
        else:
            cell += nodes.Text(part)
    return cell


def table(heads: Sequence[str], rows: Iterable[Sequence[list[nodes.Node]]]) -> nodes.table:
    """A table with a head; each cell is a list of paragraphs."""
    head, body = nodes.thead(), nodes.tbody()
    group = nodes.tgroup(cols=len(heads))
    group += [nodes.colspec(colwidth=1) for _ in heads] + [head, body]
    for target, cells in [
        (head, [[nodes.paragraph(text=h)] for h in heads]),
        *((body, r) for r in rows),
    ]:
        row = nodes.row()
        row += [nodes.entry("", *cell) for cell in cells]
        target += row
    return nodes.table("", group, classes=["package-table"])


def families() -> dict[str, list[rules.Rule]]:
    """The registered rules by their families, in the order of registration."""
    found: dict[str, list[rules.Rule]] = {}
    for name in rules.available():
        rule = rules.get(name)
        found.setdefault(rule.declaration.module, []).append(rule)
    return found


def first_line(module: str) -> str:
    """What a module says it is for, without the full stop."""
    return (
        (inspect.getdoc(importlib.import_module(module)) or module).partition("\n")[0].rstrip(".")
    )


class RulesTable(SphinxDirective):
    """All rules: a list of the families, and for each a heading and a table."""

    def run(self) -> list[nodes.Node]:
        heads = ["Rule and defaults", "Gradient for x", "Saves", "Reference"]
        index, sections = nodes.bullet_list(), []
        for module, family in families().items():
            title, name = first_line(module), "rules-" + module.rpartition(".")[2]
            link = nodes.reference("", title, refid=name, internal=True)
            index += nodes.list_item("", nodes.paragraph("", "", link))
            section = nodes.section("", nodes.title(text=title), ids=[name])
            listed = table(heads, [self.row(rule) for rule in family])
            listed["classes"].append("rules-table")
            section += listed
            sections.append(section)
        return [index, *sections]

    def row(self, rule: rules.Rule) -> list[list[nodes.Node]]:
        defaults = ", ".join(
            f"{name}={value!r}" for name, value in rule.declaration.defaults.items()
        )
        call = f"{rule.name}({defaults})" if defaults else rule.name
        info = rule.info
        requires = [constraint.text for constraint in rule.declaration.requires]
        saves = ["x or mask" if "mask" in info.properties and n == "x" else n for n in info.saves]
        return [
            [code(call), *([after("requires ", code(*requires))] if requires else [])],
            [code(info.formula)],
            [code(*saves)],
            [
                linked(info.source),
                *([nodes.paragraph(text=f"Also in: {', '.join(info.peers)}")] * bool(info.peers)),
            ],
        ]


class RulesReference(SphinxDirective):
    """All rules, as entries of the API reference that other pages can link to.

    Docstrings are reStructuredText: in a MyST page this directive stands in an ``eval-rst`` block.
    """

    def run(self) -> list[nodes.Node]:
        lines: list[str] = []
        for module, family in families().items():
            lines += [f".. rubric:: {first_line(module)}", ""]
            for rule in family:
                lines += [*self.entry(rule), ""]
        return self.parse_text_to_nodes("\n".join(lines))

    def entry(self, rule: rules.Rule) -> list[str]:
        values = [
            p
            for p in inspect.signature(rule.function).parameters.values()
            if p.name in rule.declaration.parameters
        ]
        # Annotations are strings there, which a signature shows in quotes
        signature = re.sub(r": '([^']*)'", r": \1", str(inspect.Signature(values)))
        formula, _, rest = (inspect.getdoc(rule.function) or "").partition("\n")
        details = GoogleDocstring(rest, self.config, what="function").lines()
        details = [magnitudes_escaped(line) for line in details]
        info = rule.info
        properties = [name for name in info.properties if name != "mask"]  # named in the table
        size = info.saved_bytes()
        saved = "less than it reads" if size is None else f"{size} bytes for each float32 entry"
        facts = [
            f"Registered as ``{rule.name!r}``. It is {', '.join(properties)}, and saves {saved}.",
            f"It gives a gradient to {' and '.join(f'``{name}``' for name in info.learns)}, if learnt."
            if info.learns
            else "",
            f"Reference: {escaped(info.source)}." if info.source else "",
            f"Also in: {escaped(', '.join(info.peers))}." if info.peers else "",
        ]
        body = [f"``{formula}``", "", *facts, "", *details]
        head = f".. py:function:: {rule.function.__name__}{signature}"
        return [head, "   :module: freegrad_fx.rules", "", *(f"   {line}" for line in body)]


def magnitudes_escaped(line: str) -> str:
    """The line with ``|x|`` as text: outside of code, reStructuredText reads it as a substitution."""
    parts = re.split(r"(``.*?``)", line)
    return "".join(p if p.startswith("``") else p.replace("|", "\\|") for p in parts)


def escaped(text: str) -> str:
    """Text as reStructuredText that says the same: ``clip_grad_`` is no link."""
    return re.sub(r"([\\*_`|])", r"\\\1", text)


class ActivationsTable(SphinxDirective):
    """The whole vocabulary: every activation, its groups, and how a model may spell it."""

    def run(self) -> list[nodes.Node]:
        heads = ["Name", "Groups", "Elementwise", "Modules", "Functions", "Methods"]
        heads_on_demand = ["Name", "Operands", *heads[3:]]
        listed = [op for op in vocabulary.OPS.values() if not op.on_demand]
        on_demand = [op for op in vocabulary.OPS.values() if op.on_demand]
        return [
            table(heads, [self.row(op) for op in listed]),
            table(heads_on_demand, [self.row_on_demand(op) for op in on_demand]),
        ]

    def row(self, op: vocabulary.Op) -> list[list[nodes.Node]]:
        return [
            [code(op.name)],
            [code(*sorted(op.groups))],
            [nodes.paragraph(text="yes" if op.elementwise else "no")],
            *self.spellings(op),
        ]

    def row_on_demand(self, op: vocabulary.Op) -> list[list[nodes.Node]]:
        return [[code(op.name)], [code(*op.operands)], *self.spellings(op)]

    def spellings(self, op: vocabulary.Op) -> list[list[nodes.Node]]:
        return [
            [code(*(module.__name__ for module in op.modules))],
            [code(*public_names((*op.functions, *op.inplace_functions)))],
            [code(*(method for method in op.methods if not method.startswith("_")))],
        ]


def public_names(functions: Iterable[Callable[..., Any]]) -> list[str]:
    """The names under which everyone's code can call these functions: ``F.relu``, ``torch.relu``."""
    wanted = {id(function) for function in functions}
    return [
        prefix + name
        for prefix, place in _PLACES.items()
        for name in sorted(vars(place))
        if id(vars(place)[name]) in wanted and not name.startswith("_")
    ]


def read_whole_property(
    app: Sphinx, what: str, name: str, obj: Any, options: object, lines: list[str]
) -> None:
    """Undo napoleon's reading of a property's docstring as ``type: description``."""
    if what == "property" and obj.__doc__:
        lines[:] = GoogleDocstring(inspect.cleandoc(obj.__doc__), app.config, what="method").lines()


def name_aliases(
    app: Sphinx, what: str, name: str, obj: Any, options: object, signature: str, returns: str
) -> tuple[str | None, str | None]:
    """Write ``Alias | None`` where Sphinx writes ``TypeAliasForwardRef('Alias') | None``."""
    pattern = r"TypeAliasForwardRef\('([\w.]+)'\)"
    return tuple(text and re.sub(pattern, r"\1", text) for text in (signature, returns))


def check_public_names(app: Sphinx, env: BuildEnvironment) -> None:
    """Warn about a public name of the package that no page describes."""
    described = env.domains["py"].objects
    for name in freegrad_fx.__all__:
        if f"freegrad_fx.{name}" not in described and not inspect.ismodule(
            getattr(freegrad_fx, name)
        ):
            _log.warning(
                "freegrad_fx.%s is public, and no page describes it: add it to api.md", name
            )


def check_paths(app: Sphinx, doctree: nodes.document) -> None:
    """Warn about a file of the checkout that a page names and that does not exist."""
    for name in doctree.findall(nodes.literal):
        path = name.astext()
        is_path = re.match(r"(src|tests|docs|examples|benchmarks)/", path)
        if is_path and not (app.srcdir.parent / path).exists():
            _log.warning("there is no %s", path, location=name)


def setup(app: Sphinx) -> ExtensionMetadata:
    """Register the directives."""
    app.add_directive("rules-table", RulesTable)
    app.add_directive("rules-reference", RulesReference)
    app.add_directive("activations-table", ActivationsTable)
    app.connect("autodoc-process-docstring", read_whole_property, priority=600)  # after napoleon's
    app.connect("autodoc-process-signature", name_aliases)
    app.connect("doctree-read", check_paths)
    app.connect("env-check-consistency", check_public_names)
    return {"parallel_read_safe": True}

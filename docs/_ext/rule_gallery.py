"""A Sphinx directive that draws every rule with `plot_rule`, family by family. It knows no rule by name."""

import warnings
from pathlib import Path

import matplotlib as mpl
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective
from sphinx.util.typing import ExtensionMetadata

import freegrad_fx
from freegrad_fx import rules
from package_tables import families, first_line

# The operation that the rules of a family usually stand behind
_OPERATIONS = {
    "attribution": "relu",
    "masks": "relu",
    "straight_through": "sign",
    "surrogate": "heaviside",
    "surrogate_asymmetric": "heaviside",
}
_FOLDER = "_images/rules"


class RulesGallery(SphinxDirective):
    """Pictures of all rules that can be drawn without a value for a parameter, with a heading for each family."""

    def run(self) -> list[nodes.Node]:
        folder = Path(self.env.app.outdir) / _FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        found: list[nodes.Node] = []
        for module, family in families().items():
            operation = _OPERATIONS.get(module.rpartition(".")[2])
            pictures = [
                f'<img src="{_FOLDER}/{name}" alt="{rule.name}" width="32%">'
                for number, rule in enumerate(family)
                if (name := drawn(rule, operation, folder, f"{module}_{number}.svg"))
            ]
            if not pictures:
                continue
            found.append(nodes.rubric(text=first_line(module)))
            found.append(nodes.raw("", "\n".join(pictures), format="html"))
        return found


def drawn(rule: rules.Rule, operation: str | None, folder: Path, name: str) -> str:
    """Draw a rule into a file, and return the name of the file; ``""`` for one that needs a value or operands."""
    from matplotlib import pyplot

    if rule.parameters.keys() - rule.bound.keys() or rule.declaration.needs_operation:
        return ""
    meant = rule.declaration.meant_for
    axes = freegrad_fx.plot_rule(rule, None if meant else operation)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a glyph that a font lacks
        axes.figure.savefig(folder / name)
    pyplot.close(axes.figure)
    return name


def setup(app: Sphinx) -> ExtensionMetadata:
    """Register the directive."""
    mpl.use("agg")
    mpl.rcParams["svg.hashsalt"] = "freegrad_fx"  # the same files in every build
    app.add_directive("rules-gallery", RulesGallery)
    return {"version": freegrad_fx.__version__, "parallel_read_safe": True}

"""The results of comparisons as JSON. A file can hold the results of several runs, each of a part of the sections."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ._measure import Spread
from ._tables import SECTIONS, Row

__all__ = ["Results"]


@dataclass
class Results:
    """Rows, and where each of them was measured.

    Attributes:
        runs: For each run its machine, with the versions of all packages, and whether it was quick.
        rows: Each row with the number of its run.
    """

    runs: list[dict[str, Any]] = field(default_factory=list)
    rows: list[tuple[int, Row]] = field(default_factory=list)

    @classmethod
    def read(cls, path: Path) -> Results:
        """The results in a file; none if it does not exist. Sections that no longer exist are left out."""
        if not path.exists():
            return cls()
        data = json.loads(path.read_text("utf-8"))
        rows = [
            (given.pop("run"), Row(**{**given, "relative": Spread(**given["relative"])}))
            for given in data["rows"]
            if given["section"] in SECTIONS
        ]
        return cls(data["runs"], rows)._without_unused()

    def write(self, path: Path) -> None:
        """Write the file."""
        rows = []
        for run, row in self.rows:
            data = asdict(row)
            del data["target"]  # targets change; they are compared when a table is printed
            rows.append({"run": run, **data})
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"runs": self.runs, "rows": rows}, indent=1, ensure_ascii=False)
        path.write_text(text + "\n", "utf-8")

    def with_run(self, about: Mapping[str, Any], rows: Iterable[Row]) -> Results:
        """The results with those of another run, which replace those of the same groups."""
        new = [*rows]
        replaced = {(row.section, row.group) for row in new}
        kept = [(run, row) for run, row in self.rows if (row.section, row.group) not in replaced]
        runs = self.runs if dict(about) in self.runs else [*self.runs, dict(about)]
        merged = kept + [(runs.index(dict(about)), row) for row in new]
        order = list(SECTIONS)
        merged.sort(key=lambda pair: order.index(pair[1].section))  # stable
        return Results(runs, merged)._without_unused()

    def section(self, name: str) -> list[tuple[int, Row]]:
        """The rows of a section."""
        return [pair for pair in self.rows if pair[1].section == name]

    @property
    def quick(self) -> bool:
        """Whether one of the runs was quick, so that its numbers mean nothing."""
        return any(run["quick"] for run in self.runs)

    def _without_unused(self) -> Results:
        """The same without runs that have no rows."""
        used = sorted({run for run, _ in self.rows})
        number = {old: new for new, old in enumerate(used)}
        rows = [(number[run], row) for run, row in self.rows]
        return Results([self.runs[run] for run in used], rows)

"""Measures `import freegrad_fx` after `import torch`: CPU seconds and number of modules, each in a new process.

python -m benchmarks.import_time [--repeats N]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys

_MEASURED = """
import json, sys, time
import torch
before, start = set(sys.modules), time.process_time()
import freegrad_fx
seconds = time.process_time() - start
added = set(sys.modules) - before
heavy = [m for m in ("sympy", "torch._dynamo", "torch._inductor") if m in added]
print(json.dumps({"seconds": seconds, "modules": len(added), "heavy": heavy}))
"""


def measure(repeats: int) -> dict[str, object]:
    """The median of several processes. The first one is excluded, because it can compile Python files."""
    found = []
    for _ in range(repeats + 1):
        done = subprocess.run([sys.executable, "-c", _MEASURED], capture_output=True, check=True)
        found.append(json.loads(done.stdout))
    seconds = [one["seconds"] for one in found[1:]]
    return {
        "seconds": round(statistics.median(seconds), 3),
        "least": round(min(seconds), 3),
        "most": round(max(seconds), 3),
        "modules": found[-1]["modules"],
        "heavy": found[-1]["heavy"],
    }


def main() -> None:
    """Print the measurement as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--repeats", type=int, default=7, help="how many processes count")
    print(json.dumps(measure(parser.parse_args().repeats)))


if __name__ == "__main__":
    main()

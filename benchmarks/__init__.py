"""The benchmarks. `_cases` defines the measured cases, `_peers` the other libraries, and `_targets` the targets."""

import sys
from pathlib import Path

# for _torchvision, which makes torchvision importable with a CPU build of torch
sys.path.append(str(Path(__file__).resolve().parent.parent / "examples"))

"""The benchmarks. What they measure stands in `_cases`; the peers in `_peers`, the issue's targets in `_targets`."""

import sys
from pathlib import Path

# for _torchvision, which makes torchvision importable beside a CPU build of torch
sys.path.append(str(Path(__file__).resolve().parent.parent / "examples"))

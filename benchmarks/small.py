"""``python -m benchmarks.small``: the sections of `benchmarks.compare` with small tensors, in processor time.

It takes the options of `benchmarks.compare`, such as ``--build`` and ``--seconds``.
"""

from __future__ import annotations

import sys

from . import compare

SECTIONS = ("small", "small-steps")

if __name__ == "__main__":
    compare.main(["--only", *SECTIONS, "--processor-time", *sys.argv[1:]])

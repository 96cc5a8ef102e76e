"""Makes torchvision importable if its compiled operators cannot be loaded.

torchvision's released wheels are built for one CUDA release. With a CPU build of torch, their compiled
library cannot be loaded. ``import torchvision`` then fails, because it registers fake implementations of
operators (first ``nms``) that this library would have declared. Declaring two schemas beforehand is
enough: models, transforms and data sets work, and only the detection operators are missing.

Import this module before torchvision. It does nothing if torchvision can be imported without it, and
does not depend on freegrad_fx.
"""

import sys

import torch

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)

# The declarations exist as long as this object.
_library: torch.library.Library | None = None

try:
    import torchvision
except RuntimeError as error:
    if "operator torchvision::nms does not exist" not in str(error):
        raise
    # The failed import leaves partially initialised submodules, which the second import must not use.
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
    _library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in _SCHEMAS:
        _library.define(schema)
    import torchvision

__all__ = ["torchvision"]

"""Import torchvision, also where its compiled operators cannot load.

torchvision's released wheels are built for one CUDA release. Beside a CPU build of torch their
compiled library does not load. ``import torchvision`` then fails, because it describes operators,
``nms`` first, that this library would have declared. Declaring two schemas beforehand is enough:
models, transforms and data sets work, and only the detection operators are missing.

Import this module before torchvision. It knows nothing of freegrad_fx, and it does nothing where
torchvision imports without help.
"""

import sys

import torch

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)

# The declarations last as long as the object that made them.
_library: torch.library.Library | None = None

try:
    import torchvision
except RuntimeError as error:
    if "operator torchvision::nms does not exist" not in str(error):
        raise
    # The failed import leaves submodules behind: the second one must not meet them half done.
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
    _library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in _SCHEMAS:
        _library.define(schema)
    import torchvision

__all__ = ["torchvision"]

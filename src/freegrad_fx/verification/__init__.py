"""A transformed or compiled model beside its original: `verify`, and the check of a capture from example inputs.

- `observe`: calls of a model, and everything of them that can be seen from outside
- `values`: values of any nesting taken apart, and tensors compared bit by bit
- `snapshot`: what a model holds, recorded and put back
- `comparison`: what tells two calls apart
- `locate`: the first submodule that differs
- `report`: the differences, and what they can come from
- `verify`: the public function
- `examples`: the check of a capture from example inputs
- `undisturbed`: calls of a model that change nothing

Nothing in this package knows rules.
"""

from .comparison import Difference
from .examples import do_the_same, lacks_values, verify_examples
from .observe import Inputs
from .report import Verification
from .undisturbed import undisturbed
from .verify import Pair, verify

__all__ = [
    "Difference",
    "Inputs",
    "Pair",
    "Verification",
    "do_the_same",
    "lacks_values",
    "undisturbed",
    "verify",
    "verify_examples",
]

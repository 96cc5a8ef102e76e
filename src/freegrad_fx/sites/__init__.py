"""The places of a captured model where a backward can be replaced, and the code that hides such places.

`site` is what one is; `operations` and `parameters` find them in graphs; `opaque` finds what hides them; `remarks` is
what reports say of that. Knows nothing of rules.
"""

from .opaque import find_opaque
from .operations import find_sites
from .parameters import find_parameters, unused_parameters
from .remarks import Lost, Opaque
from .site import Located, LocatedOperation, LocatedParameter, Site

__all__ = [
    "Located",
    "LocatedOperation",
    "LocatedParameter",
    "Lost",
    "Opaque",
    "Site",
    "find_opaque",
    "find_parameters",
    "find_sites",
    "unused_parameters",
]

"""Sites: the places in a captured model where a backward can be replaced.

`site` defines them. `operations` and `parameters` find them in graphs. `opaque` finds code that was not traced and may
contain further sites. `remarks` defines how reports describe such code. Independent of rules.
"""

from .opaque import find_opaque
from .operations import find_sites
from .parameters import find_parameters, unused_parameters
from .remarks import Cache, Lost, Opaque
from .site import Located, LocatedOperation, LocatedParameter, Site

__all__ = [
    "Cache",
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

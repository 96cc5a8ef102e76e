"""Nested tuples, lists, dicts and registered classes: flattening, mapping and their structure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .releases import private

__all__ = [
    "TreeSpec",
    "dump_spec",
    "key_text",
    "leaves",
    "load_spec",
    "map_leaves",
    "map_only",
    "same_structure",
    "structure",
    "unflatten",
]

_NESTED = "taking nested inputs apart"

leaves = private("torch.utils._pytree.tree_leaves", _NESTED)
map_leaves = private("torch.utils._pytree.tree_map", _NESTED)
map_only = private("torch.utils._pytree.tree_map_only", _NESTED)
structure = private("torch.utils._pytree.tree_structure", _NESTED)
unflatten = private("torch.utils._pytree.tree_unflatten", _NESTED)
key_text = private("torch.utils._pytree.keystr", _NESTED)
_text_of = private("torch.utils._pytree.treespec_dumps", _NESTED)
_from_text = private("torch.utils._pytree.treespec_loads", _NESTED)
_leaf = private("torch.utils._pytree.treespec_leaf", _NESTED)

if TYPE_CHECKING:
    from torch.utils._pytree import TreeSpec
else:
    TreeSpec = private("torch.utils._pytree.TreeSpec", _NESTED)


def same_structure(one: Any, other: Any) -> bool:
    """Whether two values are nested in the same way."""
    if not isinstance(one, tuple | list | dict) and type(one) is type(other):
        return True  # a fast path for tensors
    return bool(structure(one) == structure(other))


def dump_spec(spec: TreeSpec) -> Any:
    """Convert a structure to plain data that can be pickled, if its classes can; see `load_spec`.

    PyTorch's own text is used where it gives the same structure again. It does not support classes without a registered
    name, such as most namedtuples, and it makes lists of keys that are tuples.
    """
    try:
        text = _text_of(spec)
        if _equal(_from_text(text), spec):
            return text
    except (NotImplementedError, TypeError, ValueError, AttributeError, LookupError, ImportError):
        pass  # from the serializer that is registered for a class
    return _nested(spec)


def load_spec(dump: Any) -> TreeSpec:
    """Rebuild a structure from the result of `dump_spec`."""
    if isinstance(dump, str):
        return _from_text(dump)  # type: ignore[no-any-return]
    if dump is None:
        return _leaf()  # type: ignore[no-any-return]
    kind, context, children = dump
    return TreeSpec(kind, context, [load_spec(child) for child in children])


def _nested(spec: TreeSpec) -> Any:
    if spec.is_leaf():
        return None
    return spec.type, spec.context, [_nested(child) for child in spec.children()]


def _equal(one: TreeSpec, other: TreeSpec) -> bool:
    """Whether two structures are equal, also in their classes, which PyTorch compares by name."""
    if one.type is not other.type or one.context != other.context:
        return False
    return len(one.children()) == len(other.children()) and all(
        map(_equal, one.children(), other.children())
    )

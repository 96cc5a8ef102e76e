"""Nested tuples, lists, dicts and registered classes: flattening, mapping and their structure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .releases import private

__all__ = ["TreeSpec", "dump_spec", "key_text", "leaves", "load_spec", "map_leaves", "map_only"]

_NESTED = "taking nested inputs apart"

leaves = private("torch.utils._pytree.tree_leaves", _NESTED)
map_leaves = private("torch.utils._pytree.tree_map", _NESTED)
map_only = private("torch.utils._pytree.tree_map_only", _NESTED)
key_text = private("torch.utils._pytree.keystr", _NESTED)
dump_spec = private("torch.utils._pytree.treespec_dumps", _NESTED)
load_spec = private("torch.utils._pytree.treespec_loads", _NESTED)

if TYPE_CHECKING:
    from torch.utils._pytree import TreeSpec
else:
    TreeSpec = private("torch.utils._pytree.TreeSpec", _NESTED)

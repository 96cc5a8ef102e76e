"""How nested values are taken to be taken apart and put together."""

from __future__ import annotations

import pickle
from collections import OrderedDict, defaultdict, namedtuple
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from freegrad_fx._torch import tree

Pair = namedtuple("Pair", ["first", "second"])

NESTED: dict[str, Any] = {
    "leaf": 1,
    "tuple": (1, (2, 3)),
    "list": [1, [2], []],
    "dict": {"b": 1, "a": {"c": 2}},
    "ordered dict": OrderedDict(z=1, y=2),
    "named tuple": Pair(1, [2, 3]),
    "arguments": ((1, 2), {"mask": 3}),
    "keys that are tuples": {(1, "a"): 1, (2, None): [2]},
    "dict with a default": defaultdict(list, a=1, b=Pair(2, 3)),
}
nested = pytest.mark.parametrize("value", NESTED.values(), ids=NESTED)


@nested
def test_mapping_keeps_the_structure(value: Any) -> None:
    same = tree.map_leaves(lambda leaf: leaf, value)
    assert same == value
    assert type(same) is type(value)


@nested
def test_every_leaf_is_mapped_in_the_order_of_the_leaves(value: Any) -> None:
    seen: list[int] = []
    tree.map_leaves(seen.append, value)
    assert seen == tree.leaves(value)
    assert sorted(seen) == list(range(1, len(seen) + 1))


def test_strings_and_objects_are_leaves() -> None:
    sentinel = object()
    assert tree.leaves(["ab", sentinel, {1, 2}]) == ["ab", sentinel, {1, 2}]


def test_none_is_a_leaf() -> None:
    assert tree.leaves((None, 1)) == [None, 1]


def test_map_only_leaves_other_leaves_as_they_are() -> None:
    x = torch.ones(2)
    found = tree.map_only(Tensor, lambda t: t + 1, [x, {"a": 3, "b": x}, "text"])
    assert found[0].tolist() == found[1]["b"].tolist() == [2, 2]
    assert (found[1]["a"], found[2]) == (3, "text")


def test_the_text_of_a_key_is_python_for_reaching_the_leaf() -> None:
    value = {"x": [1, (2, {"y": 3})]}
    pairs, _ = pytree.tree_flatten_with_path(value)
    assert [leaf for _, leaf in pairs] == [1, 2, 3]
    assert [eval("v" + tree.key_text(path), {"v": value}) for path, _ in pairs] == [1, 2, 3]
    assert [path[0].key for path, _ in pairs] == ["x"] * 3


@nested
def test_a_structure_survives_being_written_as_plain_data(value: Any) -> None:
    leaves, spec = pytree.tree_flatten(value)
    loaded = tree.load_spec(pickle.loads(pickle.dumps(tree.dump_spec(spec))))
    assert isinstance(loaded, tree.TreeSpec)
    assert loaded == spec
    assert pytree.tree_unflatten(leaves, loaded) == value


def test_a_structure_that_pytorch_wrote_as_text_is_read() -> None:
    _, spec = pytree.tree_flatten(NESTED["arguments"])
    assert tree.load_spec(pytree.treespec_dumps(spec)) == spec


@nested
def test_a_structure_flattens_values_of_its_own_kind(value: Any) -> None:
    _, spec = pytree.tree_flatten(value)
    assert spec.flatten_up_to(value) == tree.leaves(value)


@pytest.mark.parametrize("other", [((1,), {}), ((1, 2), {"b": 3}), ([1, 2], {"a": 3}), ((1, 2),)])
def test_a_structure_refuses_values_of_another_kind_with_a_value_error(other: Any) -> None:
    _, spec = pytree.tree_flatten(((1, 2), {"a": 3}))
    with pytest.raises(ValueError):  # noqa: PT011
        spec.flatten_up_to(other)

"""What an `nn.Module` is taken to hold, and how it is taken to be called."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from freegrad_fx._torch import modules
from freegrad_fx._torch.modules import (
    BUFFERS,
    CHILDREN,
    COMPILED_CALL,
    FRESH_BASES,
    PARAMETERS,
    buffers_of,
    call_code,
    children_of,
    compiled_model,
    has_backward_hooks,
    has_forward_hooks,
    has_global_forward_hooks,
    has_global_hooks,
    has_hooks,
    is_compiled_wrapper,
    make_replica,
    parameters_of,
    with_parameters,
)

# --- the tables of a module ---


def test_the_tables_are_what_attributes_are_read_from() -> None:
    module = nn.BatchNorm1d(2)
    module.part = nn.ReLU()
    weight, mean, part = nn.Parameter(torch.ones(2)), torch.ones(2), nn.Tanh()
    parameters_of(module)["weight"] = weight
    buffers_of(module)["running_mean"] = mean
    children_of(module)["part"] = part
    assert module.weight is weight
    assert module.running_mean is mean
    assert module.part is part


def test_the_tables_are_what_attributes_are_written_to() -> None:
    module = nn.BatchNorm1d(2)
    module.part = nn.ReLU()
    module.weight = nn.Parameter(torch.ones(2))
    module.running_mean = torch.ones(2)
    assert parameters_of(module)["weight"] is module.weight
    assert buffers_of(module)["running_mean"] is module.running_mean
    assert children_of(module)["part"] is module.part


def test_a_table_has_none_where_there_is_nothing_and_not_what_submodules_hold() -> None:
    assert parameters_of(nn.Linear(2, 2, bias=False))["bias"] is None
    assert buffers_of(nn.BatchNorm1d(2, track_running_stats=False))["running_mean"] is None
    assert parameters_of(nn.Sequential(nn.Linear(2, 2))) == {}


def test_the_tables_stand_in_the_dict_of_a_module_under_known_names() -> None:
    module = nn.Sequential(nn.BatchNorm1d(2))
    assert vars(module)[PARAMETERS] is parameters_of(module)
    assert vars(module)[BUFFERS] is buffers_of(module)
    assert vars(module)[CHILDREN] is children_of(module)


def test_an_object_with_another_dict_for_its_tables_is_a_view_of_a_module() -> None:
    linear, x = nn.Linear(2, 2), torch.ones(1, 2)
    view: nn.Module = object.__new__(nn.Linear)
    weight = torch.zeros(2, 2)
    view.__dict__ = {**vars(linear), PARAMETERS: {**parameters_of(linear), "weight": weight}}
    assert torch.equal(view(x), linear.bias[None])
    assert not torch.equal(linear(x), linear.bias[None])


def test_a_new_module_has_every_attribute_that_modules_have_before_their_own() -> None:
    """Attributes that are not among these are taken for the model's."""
    blank = set(vars(nn.Module()))
    assert {PARAMETERS, BUFFERS, CHILDREN, "training"} <= blank
    own = set(vars(nn.Linear(2, 3))) - blank
    assert own == {"in_features", "out_features"}


def test_a_property_on_the_class_answers_for_the_training_flag() -> None:
    """The flag is an entry of a module's dict, which goes behind a property that can also be written."""
    module = nn.Dropout()
    assert "training" in vars(module)
    nn.Module.training = property(lambda self: "asked", lambda self, value: None)  # type: ignore[assignment]
    try:
        assert module.training == "asked"
    finally:
        del nn.Module.training
    assert module.training is True


def test_reading_the_training_flag_of_a_call_is_done_by_the_module_that_is_called() -> None:
    readers = []

    def read(module: nn.Module) -> bool:
        readers.append(sys._getframe(1).f_locals.get("self"))
        return False

    dropout, x = nn.Dropout(), torch.ones(2)
    nn.Module.training = property(read, lambda self, value: None)  # type: ignore[assignment]
    try:
        assert dropout(x) is x
    finally:
        del nn.Module.training
    assert readers == [dropout]


# --- hooks ---

FORWARD_HOOKS: dict[str, Callable[[nn.Module], Any]] = {
    "forward": lambda m: m.register_forward_hook(lambda *_: None),
    "forward with keywords": lambda m: m.register_forward_hook(lambda *_: None, with_kwargs=True),
    "forward always": lambda m: m.register_forward_hook(lambda *_: None, always_call=True),
    "before": lambda m: m.register_forward_pre_hook(lambda *_: None),
    "before with keywords": lambda m: m.register_forward_pre_hook(
        lambda *_: None, with_kwargs=True
    ),
}
BACKWARD_HOOKS: dict[str, Callable[[nn.Module], Any]] = {
    "backward": lambda m: m.register_full_backward_hook(lambda *_: None),
    "before the backward": lambda m: m.register_full_backward_pre_hook(lambda *_: None),
    "old": lambda m: m.register_backward_hook(lambda *_: None),
}
GLOBAL_HOOKS: dict[str, Callable[[], Any]] = {
    "forward": lambda: torch_module.register_module_forward_hook(lambda *_: None),
    "before": lambda: torch_module.register_module_forward_pre_hook(lambda *_: None),
    "backward": lambda: torch_module.register_module_full_backward_hook(lambda *_: None),
    "before the backward": lambda: torch_module.register_module_full_backward_pre_hook(
        lambda *_: None
    ),
}


def answers(module: nn.Module) -> tuple[bool, bool, bool]:
    return has_forward_hooks(module), has_backward_hooks(module), has_hooks(module)


@pytest.mark.parametrize("register", FORWARD_HOOKS.values(), ids=FORWARD_HOOKS)
def test_every_forward_hook_is_seen_until_it_is_removed(register: Any) -> None:
    module = nn.ReLU()
    assert answers(module) == (False, False, False)
    handle = register(module)
    assert answers(module) == (True, False, True)
    handle.remove()
    assert answers(module) == (False, False, False)


@pytest.mark.parametrize("register", BACKWARD_HOOKS.values(), ids=BACKWARD_HOOKS)
def test_every_backward_hook_is_seen_until_it_is_removed(register: Any) -> None:
    module = nn.ReLU()
    handle = register(module)
    assert answers(module) == (False, True, True)
    handle.remove()
    assert answers(module) == (False, False, False)


@pytest.mark.parametrize("name", GLOBAL_HOOKS)
def test_every_hook_around_all_modules_is_seen_until_it_is_removed(name: str) -> None:
    assert not has_global_hooks()
    assert not has_global_forward_hooks()
    handle = GLOBAL_HOOKS[name]()
    try:
        assert has_global_hooks()
        assert has_global_forward_hooks() == ("backward" not in name)
        assert answers(nn.ReLU()) == (False, False, False)
    finally:
        handle.remove()
    assert not has_global_hooks()


def test_hooks_are_off_while_the_tables_that_end_in_hooks_are_empty() -> None:
    """Of the tables of a module those of `state_dict` alone are for something else."""
    called = []
    module = nn.ReLU()
    module.register_forward_hook(lambda *_: called.append("after"))
    module.register_forward_pre_hook(lambda *_: called.append("before"))
    tables = [n for n in vars(module) if n.endswith("_hooks") and "state_dict" not in n]
    kept = {name: vars(module)[name] for name in tables}
    vars(module).update({name: type(table)() for name, table in kept.items()})
    module(torch.ones(2))
    assert called == []
    vars(module).update(kept)
    module(torch.ones(2))
    assert called == ["before", "after"]


# --- calls with other parameters ---


def test_a_module_has_other_tensors_for_its_parameters_in_the_block_alone() -> None:
    model, x = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), torch.ones(1, 2)
    before = dict(model.named_parameters())
    zeros = {"0.weight": torch.zeros(2, 2), "0.bias": torch.zeros(2)}
    with with_parameters(model, zeros):
        assert model[0].weight is zeros["0.weight"]
        assert model[1].weight is before["1.weight"]
        assert torch.equal(model(x), before["1.bias"][None])
    assert all(value is before[name] for name, value in model.named_parameters())


def test_a_module_has_its_own_parameters_again_after_an_error() -> None:
    linear = nn.Linear(2, 2)
    weight = linear.weight
    with pytest.raises(ZeroDivisionError), with_parameters(linear, {"weight": torch.zeros(2, 2)}):
        raise ZeroDivisionError
    assert linear.weight is weight
    assert list(dict(linear.named_parameters())) == ["weight", "bias"]


def test_a_parameter_that_is_tied_to_another_is_not_exchanged_with_it() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    shared = model[1].weight = model[0].weight
    with with_parameters(model, {"0.weight": torch.zeros(2, 2)}):
        assert model[0].weight is not shared
        assert model[1].weight is shared
    assert model[0].weight is model[1].weight is shared


def test_the_tensor_that_stands_for_a_parameter_gets_the_gradient() -> None:
    linear, other = nn.Linear(2, 1), torch.ones(1, 2, requires_grad=True)
    with with_parameters(linear, {"weight": other}):
        linear(torch.ones(1, 2)).sum().backward()
    assert other.grad is not None
    assert linear.weight.grad is None


# --- calls on the stack ---


class Asking(nn.Module):
    def __init__(self, part: nn.Module | None = None) -> None:
        super().__init__()
        self.part = part
        self.callers: list[Any] = []

    def forward(self, x: Tensor) -> Tensor:
        frame = sys._getframe(1)
        while frame is not None:
            if frame.f_code is call_code():
                self.callers.append(frame.f_locals["self"])
            frame = frame.f_back
        return x if self.part is None else self.part(x)


@pytest.mark.parametrize("hooks", [False, True])
def test_the_modules_that_are_being_called_stand_on_the_stack(hooks: bool) -> None:
    inner = Asking()
    outer = Asking(nn.Sequential(inner))
    if hooks:
        for module in outer.modules():
            module.register_forward_hook(lambda *_: None)
            module.register_full_backward_hook(lambda *_: None)
    outer(torch.ones(2, requires_grad=True))
    assert inner.callers == [inner, outer.part, outer]
    assert outer.callers == [outer]


def test_a_direct_call_of_forward_is_not_taken_for_a_call_of_the_module() -> None:
    inner = Asking()
    inner.forward(torch.ones(2))
    assert inner.callers == []


# --- compiled modules ---


def test_what_torch_compile_returns_for_a_module_is_told_from_modules() -> None:
    model = nn.ReLU()
    wrapper = torch.compile(model, backend="eager")
    assert is_compiled_wrapper(wrapper)
    assert compiled_model(wrapper) is model
    assert not is_compiled_wrapper(model)
    assert compiled_model(model) is None


def test_a_module_that_is_compiled_in_place_is_no_wrapper_and_holds_its_compiled_call() -> None:
    graphs = []

    def backend(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(gm)
        return gm.forward

    class Doubled(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2

    model, x = Doubled(), torch.ones(2)
    assert getattr(model, COMPILED_CALL) is None
    model.compile(backend=backend)
    assert not is_compiled_wrapper(model)
    assert vars(model)[COMPILED_CALL] is not None
    del vars(model)[COMPILED_CALL]
    model(x)
    assert graphs == []
    model.compile(backend=backend)
    model(x)
    assert len(graphs) == 1


@pytest.mark.slow
def test_asking_whether_a_module_is_compiled_imports_no_compiler() -> None:
    code = (
        "import sys; from torch import nn; from freegrad_fx._torch import modules; "
        "assert not modules.is_compiled_wrapper(nn.ReLU()); print('torch._dynamo' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


# --- replicas ---


def test_a_replica_is_what_data_parallel_makes_of_a_module() -> None:
    linear = nn.Linear(2, 2)
    made, theirs = copy.copy(linear), linear._replicate_for_data_parallel()
    make_replica(made)
    before, own, others = vars(linear), vars(made), vars(theirs)
    assert own.keys() == others.keys()
    assert own[PARAMETERS] == others[PARAMETERS] == {}
    assert {n: own[n] for n in own.keys() - before.keys()} == {
        n: others[n] for n in others.keys() - before.keys()
    }
    assert list(parameters_of(linear)) == ["weight", "bias"]


def test_a_replica_takes_plain_tensors_under_the_names_of_parameters() -> None:
    linear = nn.Linear(2, 2)
    make_replica(replica := copy.copy(linear))
    replica.weight, replica.bias = torch.zeros(2, 2), torch.ones(2)  # type: ignore[assignment]
    assert replica(torch.ones(1, 2)).tolist() == [[1, 1]]
    with pytest.warns(UserWarning, match="DataParallel"):
        replica.zero_grad()


# --- modules that return memory of their own ---

FRESH: list[tuple[nn.Module, tuple[int, ...]]] = [
    (nn.Conv1d(2, 2, 1), (1, 2, 4)),
    (nn.ConvTranspose2d(2, 2, 1), (1, 2, 4, 4)),
    (nn.BatchNorm1d(2), (3, 2)),
    (nn.BatchNorm2d(2, affine=False).eval(), (3, 2, 4, 4)),
    (nn.InstanceNorm1d(2), (1, 2, 4)),
    (nn.MaxPool1d(1), (1, 2, 4)),
    (nn.MaxPool2d(1), (1, 2, 4, 4)),
    (nn.AvgPool1d(1), (1, 2, 4)),
    (nn.AvgPool2d(1), (1, 2, 4, 4)),
    (nn.LPPool1d(1, 1), (1, 2, 4)),
    (nn.LPPool2d(2, 1), (1, 2, 4, 4)),
]


@pytest.mark.parametrize(("module", "shape"), FRESH, ids=lambda v: type(v).__name__)
def test_modules_of_these_bases_return_memory_of_their_own(
    module: nn.Module, shape: tuple[int, ...]
) -> None:
    x = torch.ones(shape)
    with torch.no_grad():
        assert module(x).untyped_storage().data_ptr() != x.untyped_storage().data_ptr()


def test_every_such_base_has_modules() -> None:
    found = {base for base in FRESH_BASES for module, _ in FRESH if isinstance(module, base)}
    assert found == set(FRESH_BASES)
    assert all(isinstance(module, FRESH_BASES) for module, _ in FRESH)
    assert not isinstance(nn.Flatten(), modules.FRESH_BASES)


def test_some_buffers_are_converted_in_place() -> None:
    class Model(modules.HoldsForRules):
        _freegrad_fx_buffers = "kept"

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("kept_0", torch.tensor(2.0))
            self.register_buffer("other", torch.tensor(2.0))

    model = Model()
    kept, other = model.kept_0, model.other
    nn.Sequential(model).double()
    assert model.kept_0 is kept
    assert model.other is not other
    assert (kept.dtype, other.dtype) == (torch.double, torch.float)
    model.to_empty(device="cpu")
    assert model.kept_0 is kept
    assert kept.item() == 2.0
    model.to("meta")
    assert model.kept_0.is_meta

"""`verify`: a transformed or compiled model beside its original."""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .._torch import exporting
from .._torch.dynamo import backend_of
from .._torch.modules import compiled_model, is_compiled_wrapper, uncompiled_call
from ..blocks import native
from ..capture.outside import Outside
from ..errors import FreegradWarning, VerificationError
from ..plan import PLAN, Plan
from ..sites.remarks import Cache, Lost
from .comparison import Difference, compare, describe
from .locate import first_other_module, order_of_modules
from .observe import (
    Case,
    Inputs,
    Observation,
    empty,
    observe,
    state_of,
    without_fast_path,
)
from .report import Verification
from .snapshot import RandomNumbers, Snapshot
from .values import same_bits, take_apart

__all__ = ["Pair", "verify"]

CASES = tuple(Case(mode, grad) for mode in (True, False) for grad in (True, False))

_TOLERANCE = {
    torch.float64: 1e-9,
    torch.complex128: 1e-9,
    torch.float32: 1e-3,
    torch.complex64: 1e-3,
    torch.float16: 3e-2,
    torch.bfloat16: 1e-1,
}
_EXACT_BACKENDS = ("eager",)


def verify(
    original: nn.Module,
    transformed: Any,
    /,
    *inputs: Any,
    raise_on_difference: bool = False,
    **kwargs: Any,
) -> Verification:
    """Compare a transformed or compiled model with its original, bit by bit, while every rule is off.

    Both are called twice in a row from the same state and the same random state, in train and in eval mode, with
    gradients and under `no_grad`. Between the two calls the parameters change a little. Compared are:

    - the output, in any nesting, and the memory that it shares with inputs, parameters and buffers;
    - the gradients of parameters and of floating-point inputs, for one fixed pseudo-random cotangent of each output; a
      gradient that is None differs from zeros, because an optimizer treats them differently;
    - the inputs, buffers, parameters and other attributes after the call;
    - the random states of Python, PyTorch and NumPy after the call.

    Strides are not compared. Tensors are equal if dtype, shape, device and bits are; nan equals a nan with the same
    bits, and -0.0 differs from 0.0.

    Everything is put back, also after an error: modes, parameters, buffers, gradients, attributes, random states, and
    globals of the code of the model. The calls get copies of the inputs. If the two models do not share their tensors,
    `transformed` is given the values of `original` for the time of the comparison.

    All rules are off, as in a `native` block. A replaced forward (``forward="heaviside"``) stays replaced in such a
    block, so it differs; verify the model that is transformed without `forward=`.

    Compiled code is compared exactly with ``backend="eager"`` only. Other back ends reorder arithmetic and draw other
    random numbers: values are compared up to a tolerance, and calls that draw random numbers are not compared. Each
    of the four combinations of modes costs a compilation.

    Args:
        original: The model that was transformed or compiled.
        transformed: What `transform`, `compile` or ``torch.compile(original, backend=fg.backend(...))`` returned.
        *inputs: Positional arguments of the forward.
        raise_on_difference: Raise `VerificationError` if something differs.
        **kwargs: Keyword arguments of the forward.

    Returns:
        A report, which is true if nothing differs, and prints the differences, the first submodule that differs and
        the possible cause.

    Raises:
        TypeError: `original` or `transformed` is not a module.
        ValueError: The models have other parameters or buffers, the inputs are on another device, or the original
            raises an error in every mode.
        VerificationError: Something differs and `raise_on_difference` is set. A subclass of `CaptureError`.

    Example:
        >>> import torch, freegrad_fx as fg
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU())
        >>> gm = fg.transform(model, "straight_through")
        >>> bool(fg.verify(model, gm, torch.randn(2, 4)))
        True
    """
    pair = Pair(original, transformed)
    given = Inputs(inputs, kwargs)
    _check_devices(pair.original, given)
    with pair.kept():
        for case in CASES:
            pair.compare(case, given)
        if pair.errors and not pair.checks:
            raise ValueError(
                f"{type(original).__name__} raises an error for these inputs in every mode, so that there is "
                f"nothing to compare: {type(pair.errors[0]).__name__}: {pair.errors[0]}"
            ) from pair.errors[0]
        found = pair.result()
    if raise_on_difference and not found:
        raise VerificationError(str(found), found)
    return found


class Pair:
    """A model, and what was made of it.

    Args:
        original: The model.
        transformed: The transformed or compiled model.
        lost: What the transformed model is known to lack; by default, what its report lists.
    """

    def __init__(
        self, original: Any, transformed: Any, lost: Collection[Lost] | None = None
    ) -> None:
        for name, value in (("original", original), ("transformed", transformed)):
            if not isinstance(value, nn.Module):
                raise TypeError(
                    f"verify() takes two modules: the original and what was made of it. The argument {name} is a "
                    f"{type(value).__name__}."
                )
        self.original = _without_wrapper(original)
        self.transformed = transformed
        self.module = _without_wrapper(transformed)
        backend = backend_of(transformed)
        if self.module is self.original and backend is None:
            raise ValueError("verify() compares two models, and was given the same model twice.")
        self.backend = None if backend is None else _name_of(backend)
        self.tolerance = {} if self.backend in (None, *_EXACT_BACKENDS) else _TOLERANCE
        plan = vars(self.module).get(PLAN)
        known = plan if isinstance(plan, Plan) else None
        changed = sum(d.forward is not None for d in known.decisions) if known else 0
        lost = lost if lost is not None else known.lost if known else ()
        self.caches = [(remark.path, remark.name) for remark in lost if isinstance(remark, Cache)]
        self.differences: list[Difference] = []
        self.checks = 0
        self.cases: list[str] = []
        self.notes: list[str] = []
        if changed:
            self._note(
                f"the forward is changed on request (forward=) at {changed} site{'s' * (changed != 1)}, also in a "
                f"native() block; verify the model that is transformed without it"
            )
        self.errors: list[Exception] = []
        self.repeatable = True
        self._repeated: set[str] = set()

    # -- the state

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """Prepare both models for calls, and put everything back at the end."""
        both = (self.original, self.module)
        self.random = RandomNumbers()
        outside = self.before = Snapshot(both)
        self.globals = Outside(self.original, self.original)
        try:
            emptied = [empty(model, self.caches) for model in both]
            if self._equalise() or any(emptied):
                self.before = Snapshot(both)
            if self.caches:
                self._note(
                    f"{len(self.caches)} caches were emptied before each call, because the graph computes their "
                    f"contents at each call: {', '.join(f'{p}.{n}'.lstrip('.') for p, n in self.caches[:3])}"
                    f"{', ...' if len(self.caches) > 3 else ''}"
                )
            with native(), without_fast_path(), warnings.catch_warnings():
                # the report has a note of its own
                warnings.filterwarnings("ignore", r"native\(\) switches off", FreegradWarning)
                self.states = tuple(state_of(model, self.before) for model in both)
                yield
        finally:
            self._put_back(outside)

    def _put_back(self, before: Snapshot, thorough: bool = True) -> None:
        before.put_back(thorough)
        self.globals.put_back()
        self.random.put_back()

    def _equalise(self) -> int:
        """Give the transformed model the values of the original, and return for how many tensors it had others."""
        mine, other = (_tensors(model) for model in (self.original, self.module))
        if missing := [name for name in mine if name not in other]:
            raise ValueError(
                f"these are not a model and what was made of it: {type(self.module).__name__} has no parameter or "
                f"buffer {missing[0]!r}, which {type(self.original).__name__} has."
            )
        changed = 0
        for name, tensor in mine.items():
            copy = other[name]
            if copy is tensor or same_bits(tensor, copy):
                continue
            if (
                tensor.shape != copy.shape
                or tensor.dtype != copy.dtype
                or tensor.device != copy.device
            ):
                raise ValueError(
                    f"{name!r} is {_kind(tensor)} in the original and {_kind(copy)} in the other model. Convert or "
                    f"move both models alike."
                )
            with torch.no_grad():
                copy.data.copy_(tensor)
            changed += 1
        if changed:
            self.notes.append(
                f"the two models have other values in {changed} of {len(mine)} parameters and buffers; both were run "
                f"with those of the original"
            )
        return changed

    # -- calls

    def compare(self, case: Case, inputs: Inputs, which: str = "given") -> None:
        """Compare the calls of one case."""
        expected = self._observed(True, case, inputs)
        if expected and expected[0].error is not None:
            self.errors.append(expected[0].error)
        actual = self._observed(False, case, inputs)
        if self.tolerance and not all(map(self.random_unused, expected)):
            self._note(
                f"{case}: the forward draws random numbers, and the back end draws others, so that it is not compared"
            )
            expected = expected[: [*map(self.random_unused, expected)].index(False)]
        for one, other in zip(expected, actual, strict=False):
            if one.error is None and other.error is None:
                self.checks += 1
            if one.opaque:
                self._note("of some objects in the output only the class is compared")
        found = self._compared(expected, actual)
        if str(case) not in self.cases and expected and expected[0].error is None:
            self.cases.append(str(case))
        if found:
            found = self._repeating(found, case, inputs, expected)
        for place, (number, what) in enumerate(found):
            difference = describe(case, number + 1, what, which)
            if place == 0 and not self.differences and self.repeatable:
                difference = self._located(difference, case, inputs, [f for _, f in found])
            self.differences.append(difference)

    def result(self) -> Verification:
        """The report."""
        if self.tolerance:
            self._note(
                f"the back end {self.backend} reorders arithmetic: values were compared relative to the "
                f"largest one, up to {_TOLERANCE[torch.float32]:g} for float32 and {_TOLERANCE[torch.float64]:g} for "
                f'float64. With backend="eager", bits are compared'
            )
        return Verification(
            type(self.original).__name__,
            tuple(self.differences),
            self.checks,
            tuple(self.cases),
            tuple(self.notes),
            not self.tolerance,
            self.repeatable,
        )

    def random_unused(self, seen: Observation) -> bool:
        """Whether a call drew no random numbers. Each case starts from the same random state."""
        return not self.random.differences(seen.random)

    def _compared(
        self, expected: list[Observation], actual: list[Observation], same_model: bool = False
    ) -> list[tuple[int, tuple[str, str, str]]]:
        """What differs between the calls of the original and those of the other model, or the original's again."""
        states = self.states[0], self.states[0 if same_model else 1]
        tolerance = {} if same_model else self.tolerance
        return [
            (number, found)
            for number, (one, other) in enumerate(zip(expected, actual, strict=False))
            for found in compare(one, other, states, tolerance, not tolerance)
        ]

    def _observed(self, original: bool, case: Case, inputs: Inputs) -> list[Observation]:
        model = self.original if original else self.module
        # The original can be the compiled model itself, after nn.Module.compile
        run = uncompiled_call(self.original) if original else self.transformed
        try:
            return observe(run, model, inputs, case, self.before, True, self.caches)
        finally:
            self._put_back(self.before, case.thorough)

    def _repeating(
        self,
        found: Sequence[tuple[int, tuple[str, str, str]]],
        case: Case,
        inputs: Inputs,
        expected: list[Observation],
    ) -> list[tuple[int, tuple[str, str, str]]]:
        """The differences without those that come from kernels that do not repeat their result."""
        tensors = [*_tensors(self.original).values(), *expected[0].inputs.values()]
        if all(tensor.device.type == "cpu" for tensor in tensors):
            return self._in_one_thread(found, case, inputs, expected)
        unsteady = self._unsteady(case, inputs, expected)
        if not unsteady:
            return list(found)
        self._note(
            f"{len(unsteady)} results that the original itself does not repeat were not compared; see "
            f"torch.use_deterministic_algorithms"
        )
        return [(number, f) for number, f in found if (number, f[0], f[1]) not in unsteady]

    def _in_one_thread(
        self,
        found: Sequence[tuple[int, tuple[str, str, str]]],
        case: Case,
        inputs: Inputs,
        expected: list[Observation],
    ) -> list[tuple[int, tuple[str, str, str]]]:
        """The differences that remain in one thread, if those with several threads are not the same at each call.

        Several threads can add numbers in another order at each call.
        """
        repeats = 8 if all(f[0] == "gradient" for _, f in found) else 1
        if not any(self._unsteady(case, inputs, expected) for _ in range(repeats)):
            return list(found)
        with _one_thread():
            expected = self._observed(True, case, inputs)
            if self._unsteady(case, inputs, expected):
                self.repeatable = False
                return list(found)
            self._note(
                f"{case}: compared in one thread, because with several the original does not repeat its result"
            )
            return self._compared(expected, self._observed(False, case, inputs))

    def _unsteady(
        self, case: Case, inputs: Inputs, expected: list[Observation]
    ) -> set[tuple[int, str, str]]:
        """What the original does otherwise in another run from the same state: the call, the kind and the name."""
        again = self._observed(True, case, inputs)
        return {(number, f[0], f[1]) for number, f in self._compared(expected, again, True)}

    def _located(
        self, first: Difference, case: Case, inputs: Inputs, found: Sequence[tuple[str, str, str]]
    ) -> Difference:
        """The difference with the path of the first module that differs."""
        case = dataclasses.replace(case, calls=first.call)

        def calling(original: bool) -> Callable[[], Any]:
            return lambda: self._observed(original, case, inputs)

        if first.kind == "output":
            path = first_other_module(self.original, calling(True), calling(False))
        elif first.kind == "gradient" and first.name.startswith("the gradient of "):
            names = [name.removeprefix("the gradient of ") for _, name, _ in found]
            owners = {
                name.rpartition(".")[0]: name for name in names if not name.startswith("input ")
            }
            order = order_of_modules(self.original, calling(True))
            # A gradient comes from the end of the forward
            path = next((p for p in reversed(order) if p in owners), None)
            if path is not None:
                changed = f"the gradient of {owners[path]}"
                what = next(what for _, name, what in found if name == changed)
                first = dataclasses.replace(first, name=changed, what=what)
        else:
            return first
        return dataclasses.replace(first, module=path)

    def _note(self, note: str) -> None:
        if note not in self.notes:
            self.notes.append(note)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Let kernels on the CPU use one thread: the order of their additions is then always the same."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _without_wrapper(model: nn.Module) -> nn.Module:
    return (compiled_model(model) or model) if is_compiled_wrapper(model) else model


def _name_of(backend: Any) -> str:
    """The name of the back end that compiles the graphs."""
    inner = getattr(backend, "inner", backend)  # freegrad_fx.backend compiles with another one
    name = getattr(inner, "compiler_name", None) or getattr(inner, "__name__", type(inner).__name__)
    return inner if isinstance(inner, str) else str(name)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)} on {tensor.device}"


def _check_devices(model: nn.Module, inputs: Inputs) -> None:
    """Raise `ValueError` if there is nothing to compute with."""
    given = take_apart((inputs.args, dict(inputs.kwargs))).tensors.values()
    held = [*_tensors(model).values()]
    for tensor in (*given, *held):
        if tensor.is_meta or exporting.is_fake(tensor):
            raise ValueError(
                "verify() runs the models, so that inputs, parameters and buffers need values: there are meta or fake "
                "tensors among them."
            )
    devices = {tensor.device for tensor in held}
    if devices and (other := [t.device for t in given if t.dim() and t.device not in devices]):
        raise ValueError(
            f"the inputs are on {other[0]}, and {type(model).__name__} is on "
            f"{', '.join(map(str, devices))}. Move the inputs or the models."
        )

"""`attribute`: value times gradient under a table, for inputs and activations, in batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from ._torch.tensors import version
from .backward.paths import paths_to
from .batches import called, shown
from .capture.captured import CapturedModule
from .core.rule import Rule
from .eager import use
from .errors import unknown
from .graph.state import tensors_in
from .plan.lookup import report
from .table import RulesLike, RuleTable

__all__ = ["Target", "attribute"]

Target: TypeAlias = "int | Tensor | Callable[[Any], Tensor] | None"
"""What is explained: a class, a class for each sample, a function of the output, or None for the largest entry."""


def attribute(
    model: nn.Module,
    rules: RulesLike | None,
    inputs: Any,
    target: Target = None,
    *,
    at: str | Sequence[str] | None = None,
    multiply: bool | None = None,
    batch_size: int | None = None,
    progress: bool = False,
) -> Any:
    """Compute attributions: the value times the gradient of the target, with the backward of a table.

    Formula: R = v ⊙ ∂t/∂v, where v is an input or an activation, t is the target summed over the samples, and the
    gradient is that of the rules. In a bias-free network of linear layers and ReLUs with native rules, R sums to t.

    The model is not changed, and its parameters get no gradient. It runs as it is, in its present mode; call
    ``model.eval()`` first. The samples of a batch must not depend on each other.

    Args:
        model: The model: a plain one, for which `rules` are given, or a transformed one.
        rules: The rules, as for `use`; None for a transformed model, which has its own, and for the native gradient.
        inputs: A tensor, whose first dimension is the batch; a tuple of the positional arguments of the model; or a
            dict of its keyword arguments.
        target: What is explained, in each sample: the index of a class, in the last dimension of the output; a tensor
            of such indices, one for each sample; None for the class with the largest output; or a function that takes
            the output and returns a tensor of the scores, one for each sample, or their sum. The output is a tensor of
            shape (batch, classes), or (batch, tokens, classes), of which the last token is taken; or an object with
            such a tensor as ``logits``.
        at: The paths of modules whose outputs are attributed instead of the input, for example the embedding of a
            language model. A string for one.
        multiply: False to return the gradient alone, True to multiply it by the value. By default, it is multiplied
            unless it is what a rule of the first layer returned that declares it as the relevance itself, as
            ``lrp_zbox``, ``lrp_flat`` and ``lrp_wsquare`` do.
        batch_size: The number of samples in a batch. Default: all in one.
        progress: True for a progress bar on the standard error stream. Needs `tqdm`.

    Returns:
        For a tensor as `inputs`, a tensor of its shape. For a tuple or a dict, the same with an attribution in the
        place of each tensor of floating-point numbers, and None elsewhere. With `at` as a string, the attribution of
        the output of that module; with several paths, a dict by path. A module that is called more than once has a
        list, in the order of the calls.

    Raises:
        TypeError: `model`, `inputs`, `target` or `at` has the wrong type; or `rules` are given for a transformed model.
        ValueError: No input is a tensor of floating-point numbers, and `at` is not given; a path does not exist, its
            module was not called, or its output is not one tensor, or shares memory with its input and is written into;
            the target does not fit the output; the inputs have batches of different sizes; or `multiply` is not given,
            and a gradient is a sum of relevance and of what is to be multiplied.
        ImportError: `progress` is given, and tqdm is not installed.

    Source: Shrikumar et al. 2016 (arXiv:1605.01713) for gradient × input; Arras et al. 2025 for relevance in gradient
    space.

    Example:
        >>> import torch, freegrad_fx as fg
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 2, bias=False), torch.nn.ReLU())
        >>> x = torch.rand(1, 3)
        >>> relevance = fg.attribute(model, "d(ReLU)", x, target=0)
        >>> torch.allclose(relevance.sum(), model(x)[0, 0])
        True
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model has to be an nn.Module, got {type(model).__name__}")
    if rules is not None and any(isinstance(module, CapturedModule) for module in model.modules()):
        raise TypeError(
            "rules are given for a model that is transformed already, and has its own. Give None, or the original "
            "model."
        )
    paths = _paths(model, at)
    pieces = [
        _of_batch(model, rules, batch, where, target, paths, multiply)
        for batch, where in shown(_batches(inputs, batch_size), progress, "attribute")
    ]
    joined = _joined(pieces)
    return joined[paths[0]] if isinstance(at, str) else joined


# --- the batches ---


def _batches(inputs: Any, batch_size: int | None) -> list[tuple[Any, slice]]:
    """The inputs in batches, each with its place among the samples."""
    tensors = [v for v in _values(inputs) if isinstance(v, Tensor) and v.dim()]
    if not tensors:
        raise ValueError(
            "the inputs hold no tensor with a batch dimension; give a tensor, a tuple or a dict"
        )
    count = len(tensors[0])
    if batch_size is None:
        return [(inputs, slice(0, count))]
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size has to be a whole number from 1, got {batch_size!r}")
    sizes = {len(tensor) for tensor in tensors}
    if len(sizes) > 1:
        raise ValueError(
            f"the inputs cannot be split into batches: their first dimensions have the sizes "
            f"{', '.join(map(str, sorted(sizes)))}. Leave out batch_size."
        )
    places = [slice(start, min(start + batch_size, count)) for start in range(0, count, batch_size)]
    places = places or [slice(0, 0)]

    def part(place: slice) -> Any:
        def cut(value: Any) -> Any:
            return value[place] if isinstance(value, Tensor) and value.dim() else value

        return _mapped(cut, inputs)

    return [(part(place), place) for place in places]


def _values(inputs: Any) -> Iterable[Any]:
    if isinstance(inputs, Mapping):
        return list(inputs.values())
    if isinstance(inputs, tuple):
        return inputs
    if isinstance(inputs, Tensor):
        return [inputs]
    raise TypeError(
        f"inputs has to be a tensor, a tuple of positional arguments, or a dict of keyword arguments, got "
        f"{type(inputs).__name__}"
    )


def _mapped(function: Callable[[Any], Any], inputs: Any) -> Any:
    if isinstance(inputs, Mapping):
        return {name: function(value) for name, value in inputs.items()}
    if isinstance(inputs, tuple):
        return tuple(map(function, inputs))
    return function(inputs)


def _joined(pieces: list[Any]) -> Any:
    """The results of all batches in one: tensors are concatenated."""
    first = pieces[0]
    if isinstance(first, Mapping):
        return {name: _joined([piece[name] for piece in pieces]) for name in first}
    if isinstance(first, list | tuple):
        return type(first)(_joined(list(parts)) for parts in zip(*pieces, strict=True))
    return first if first is None or len(pieces) == 1 else torch.cat(pieces)


# --- one batch ---


def _of_batch(
    model: nn.Module,
    rules: RulesLike | None,
    inputs: Any,
    where: slice,
    target: Target,
    paths: tuple[str, ...],
    multiply: bool | None,
) -> Any:
    leaves = _mapped(_leaf, inputs)
    wanted = [v for v in _values(leaves) if _is_leaf(v)]
    if not paths and not wanted:
        raise ValueError(_no_gradient(model))
    block: AbstractContextManager[Any] = nullcontext() if rules is None else use(rules, model=model)
    found: dict[str, list[_Output]] = {path: [] for path in paths}
    with torch.enable_grad(), ExitStack() as stack:
        for path in paths:
            module = model.get_submodule(path)
            record = _recorder(path, found[path])
            stack.callback(module.register_forward_hook(record, with_kwargs=True).remove)
        stack.enter_context(block)
        # A copy, as the model can write into what it is given
        output = called(model, _mapped(lambda v: v.clone() if _is_leaf(v) else v, leaves))
        score = _score(output, target, where)
    _check_called(found)
    named = [(f"the output of {path!r}", out.value) for path in paths for out in found[path]]
    named = named or [("an input", value) for value in wanted]
    values = [value for _, value in named]
    if multiply is None and score.requires_grad:
        factors = _are_factors(named, score, lambda: _rules_of(model, rules))
    else:
        factors = [multiply is not False] * len(values)
    gradients = torch.autograd.grad(score, values, allow_unused=True)
    results = [
        torch.zeros_like(value)
        if gradient is None
        else (gradient * value if is_factor else gradient).detach()
        for value, gradient, is_factor in zip(values, gradients, factors, strict=True)
    ]
    remaining = iter(results)
    if not paths:
        return _mapped(lambda value: next(remaining) if _is_leaf(value) else None, leaves)
    joined = {path: [next(remaining) for _ in found[path]] for path in paths}
    return {path: many[0] if len(many) == 1 else many for path, many in joined.items()}


def _are_factors(
    named: Sequence[tuple[str, Tensor]], score: Tensor, rules: Callable[[], list[Rule]]
) -> list[bool]:
    """Whether the attribution of each value is its product with its gradient; else it is the gradient.

    Args:
        named: The values, with what they are.
        score: What is explained.
        rules: Returns the rules of the model.
    """
    paths = paths_to([value for _, value in named], score, _returns_relevance)
    declared = [rule.name for rule in rules() if _returns_relevance(rule)] if paths.hidden else []
    if declared:
        raise ValueError(
            f"rule {declared[0]!r} returns relevance, and {paths.hidden} hides whether it gives an attributed value "
            f"its gradient. Give multiply=False if it does, multiply=True if not."
        )
    for (name, _), kinds in zip(named, paths.found, strict=True):
        relevant = [applied for applied in kinds if applied is not None]
        for (rule, site), (other, after) in paths.passed if relevant else ():
            raise ValueError(
                f"rule {rule.name!r} at site {site!r} returns relevance, but the gradient that it returns goes "
                f"through rule {other.name!r} at site {after!r}. Give it to the first layer alone, as by "
                f"on(..., first=True); or give multiply=False for the gradient as it is."
            )
        if relevant and None in kinds:
            rule, site = relevant[0]
            raise ValueError(
                f"the gradient of {name} is a sum of relevance, which rule {rule.name!r} returns at site {site!r}, "
                f"and of a gradient that is to be multiplied by the value. Give a rule that returns relevance to all "
                f"that reads the value, or to none of it; or give multiply=False for the gradient as it is."
            )
    return [kinds <= {None} for kinds in paths.found]


def _returns_relevance(rule: Rule) -> bool:
    return rule.declaration.relevance


def _rules_of(model: nn.Module, rules: RulesLike | None) -> list[Rule]:
    if rules is not None:
        return [rule for entry in RuleTable.of(rules).entries for rule in entry.rules or ()]
    captured = [module for module in model.modules() if isinstance(module, CapturedModule)]
    return [rule for module in captured for d in report(module).decisions for rule in d.rules]


def _no_gradient(model: nn.Module) -> str:
    embeddings = [n for n, m in model.named_modules() if n and isinstance(m, nn.Embedding)]
    path = embeddings[0] if embeddings else "path.of.a.module"
    return (
        f"no input is a tensor of floating-point numbers, so that there is no gradient for it. Attribute the output of "
        f"a module{', such as the embedding' * bool(embeddings)}: at={path!r}"
    )


def _leaf(value: Any) -> Any:
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.detach().requires_grad_()
    return value


def _is_leaf(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad and value.is_leaf


def _score(output: Any, target: Target, where: slice) -> Tensor:
    """The sum of what is explained in each sample."""
    if callable(target) and not isinstance(target, Tensor):
        score = target(output)
        if not isinstance(score, Tensor):
            raise TypeError(
                f"target returned {type(score).__name__}; it has to return a tensor of scores"
            )
        return score.sum()
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor) or logits.dim() not in (2, 3):
        got = f"a tensor of shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else None
        raise ValueError(
            f"the output is {got or type(output).__name__}, of which no class can be taken. Give a function as the "
            f"target that takes it and returns the scores: target=lambda output: ..."
        )
    logits = logits[:, -1] if logits.dim() == 3 else logits
    count, classes = logits.shape
    if target is None:
        index = logits.argmax(-1)
    elif isinstance(target, Tensor):
        if target.dim() != 1 or target.is_floating_point() or len(target) < where.stop:
            raise ValueError(
                f"target has to be a tensor of whole numbers, one for each of the samples; got one of {target.dtype} "
                f"and shape {tuple(target.shape)}"
            )
        index = target[where].to(logits.device)
    elif isinstance(target, int) and not isinstance(target, bool):
        index = torch.full((count,), target, device=logits.device)
    else:
        raise TypeError(
            f"target has to be the index of a class, a tensor of indices, a function of the output, or None, got "
            f"{target!r}"
        )
    if count and not bool(((index >= -classes) & (index < classes)).all()):
        raise ValueError(f"target is {target!r}, but the output has only {classes} classes")
    return logits.gather(-1, (index % classes)[:, None].long()).sum()


# --- activations ---


def _paths(model: nn.Module, at: str | Sequence[str] | None) -> tuple[str, ...]:
    if at is None:
        return ()
    paths = (at,) if isinstance(at, str) else tuple(at)
    known = [name for name, _ in model.named_modules(remove_duplicate=False)]
    if not paths or not all(isinstance(path, str) for path in paths):
        raise TypeError(f"at has to be the path of a module, or several, got {at!r}")
    for path in paths:
        if path not in known:
            raise ValueError(
                unknown(
                    "module", path, filter(None, known), everything="dict(model.named_modules())"
                )
            )
    return paths


class _Output(NamedTuple):
    """An output of a module.

    Attributes:
        value: The output, which gets the gradient.
        copy: What the model goes on with, so that it does not write into `value`.
        given: What the module returned, and the number of writes into it before.
        shared: Whether the output has memory in common with what the module was given, or holds.
    """

    value: Tensor
    copy: Tensor
    given: tuple[Tensor, int]
    shared: bool


def _recorder(path: str, found: list[_Output]) -> Callable[..., Any]:
    def record(module: nn.Module, arguments: Any, named: Any, output: Any) -> Any:
        if not isinstance(output, Tensor) or not output.is_floating_point():
            raise ValueError(
                f"the output of {path!r} is {_described(output)}, not one tensor of floating-point numbers. Name a "
                f"module inside of it, or one that uses it."
            )
        others = tensors_in([arguments, named, *module.parameters(), *module.buffers()])
        shared = any(_memory(other) == _memory(output) for other in others.values())
        # The gradient is that of what reads the output, not of what else reads the input
        value = output.clone() if shared else output
        value = value if value.requires_grad else value.detach().requires_grad_()
        copy = value.clone()
        found.append(_Output(value, copy, (output, version(output)), shared))
        return copy

    return record


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr() if tensor.layout is torch.strided else id(tensor)


def _described(output: Any) -> str:
    return f"a tensor of {output.dtype}" if isinstance(output, Tensor) else type(output).__name__


def _check_called(found: Mapping[str, list[_Output]]) -> None:
    for path, outputs in found.items():
        if not outputs:
            raise ValueError(
                f"the module {path!r} was not called, so that it has no output. Name a module that the forward calls."
            )
        for output in outputs:
            given, before = output.given
            # In the model these writes change both
            if version(given) != before or (output.shared and version(output.copy)):
                raise ValueError(
                    f"the output of {path!r} is a tensor that the module was given or holds, and the model writes into "
                    f"it afterwards, so that it has no gradient of its own. Name the module that computes the tensor, "
                    f"or one that uses it."
                )

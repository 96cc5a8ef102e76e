"""Rules that act on several parameters together: the joint norm of a module, or of all that an entry selects."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import freegrad_fx as fg

X = torch.linspace(-1, 1, 12).reshape(3, 4)
MODULES = [["0.weight", "0.bias"], ["2.weight", "2.bias"], ["4.weight"]]
ALL = [[name for names in MODULES for name in names]]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2, bias=False)
    )


def gradients(
    run: Callable[[Tensor], Tensor], model: nn.Module, x: Tensor = X
) -> dict[str, Tensor | None]:
    model.zero_grad()
    (run(x).square().sum() * 9).backward()
    return {name: p.grad for name, p in model.named_parameters()}


def clipped(model: nn.Module, groups: Sequence[Sequence[str]], norm: float) -> dict[str, Tensor]:
    """The native gradients, clipped by the utility of PyTorch."""
    gradients(model, model)
    for names in groups:
        nn.utils.clip_grad_norm_([model.get_parameter(name) for name in names], norm)
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def assert_same(found: dict[str, Tensor | None], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        # PyTorch adds 10⁻⁶ to the norm
        torch.testing.assert_close(found[name], grad, rtol=1e-5, atol=1e-6, msg=name)


def ways(net: nn.Module, rules: fg.RuleTable) -> Iterator[Callable[[Tensor], Tensor]]:
    gm = fg.transform(net, rules)
    yield gm
    yield fg.transform(net, rules, example_inputs=(X,))
    yield torch.compile(gm, backend="aot_eager", fullgraph=True)
    yield lambda x: checkpoint(gm, x, use_reentrant=False)
    yield lambda x: checkpoint(gm, x.clone().requires_grad_(), use_reentrant=True)

    def in_block(x: Tensor) -> Tensor:
        with fg.use(rules, model=net):
            return net(x)

    yield in_block
    yield lambda x: checkpoint(in_block, x.clone().requires_grad_(), use_reentrant=True)


@pytest.mark.parametrize(("over", "groups"), [("module", MODULES), ("all", ALL)])
def test_the_gradients_are_those_of_clip_grad_norm(over: str, groups: list[list[str]]) -> None:
    net = network()
    rules = fg.RuleTable([fg.on("params").backward("clip_norm", max_norm=0.5, over=over)])
    expected = clipped(net, groups, 0.5)
    for run in ways(net, rules):
        assert_same(gradients(run, net), expected)
    gm = fg.transform(net, rules)
    values = {name: p.detach() for name, p in gm.named_parameters()}

    def loss(values: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(gm, values, (X,)).square().sum() * 9

    assert_same(torch.func.grad(loss)(values), expected)
    with fg.native():
        native = gradients(gm, net)
    assert all(torch.equal(native[name], g) for name, g in gradients(net, net).items())
    with torch.no_grad():
        assert torch.equal(gm(X), net(X))
    for other in (copy.deepcopy(gm), pickle.loads(pickle.dumps(gm))):
        assert_same(gradients(other, other), expected)


def test_each_entry_has_a_group_of_its_own() -> None:
    net = network()
    clip = fg.rules.clip_norm(over="all")
    table = fg.RuleTable(
        [
            fg.on(parameter="2.*").backward(clip(max_norm=0.25)),
            fg.on(parameter="*.bias").backward(None),
            fg.on("params").backward(fg.compose(clip(max_norm=0.5), fg.rules.scale(s=2.0))),
        ]
    )
    expected = clipped(net, [MODULES[1]], 0.25)
    native = gradients(net, net)
    others = ["0.weight", "4.weight"]
    norm = torch.cat([native[name].flatten() for name in others]).norm()
    expected |= {name: native[name] * 2 * 0.5 / norm for name in others}
    assert_same(gradients(fg.transform(net, table), net), expected)
    assert_same(gradients(net, net), {**native})
    with fg.use(table, model=net):
        assert_same(gradients(net, net), expected)
    assert fg.RuleTable.from_toml(table.to_toml()) == table


def test_rules_of_a_composition_join_different_parameters() -> None:
    net = network()
    one, two = fg.rules.clip_norm(max_norm=0.5), fg.rules.normalize(eps=1.0)
    table = {"params": fg.compose(one(over="module"), "reverse", two(over="all"), two)}
    expected = clipped(net, MODULES, 0.5)
    norm = 1 + torch.cat([g.flatten() for g in expected.values()]).norm()
    joint = {name: -g / norm for name, g in expected.items()}
    expected = {name: g / (1 + g.norm()) for name, g in joint.items()}
    gm = fg.transform(net, table)
    assert_same(gradients(gm, net), expected)
    with fg.use(table, model=net):
        assert_same(gradients(net, net), expected)


class Tied(nn.Module):
    """A weight that two modules share, one that is used twice, one that is not always used, and one that is frozen."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)
        self.two.weight = self.one.weight
        self.side, self.late = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.tanh(self.two(torch.tanh(self.one(torch.tanh(self.one(x))))))
        return self.late(x), self.side(x)


@pytest.mark.parametrize("way", ["transform", "use"])
def test_a_tied_parameter_counts_once_and_one_without_gradient_not_at_all(way: str) -> None:
    model = Tied()
    rules = {"params": fg.rules.clip_norm(max_norm=0.5, over="all")}
    gm = fg.transform(model, rules) if way == "transform" else model
    model.late.weight.requires_grad_(False)

    def first(x: Tensor) -> Tensor:
        with fg.use(rules, model=model) if way == "use" else nullcontext():
            return gm(x)[0]

    found = gradients(first, model)
    native = gradients(lambda x: model(x)[0], model)
    given = {name: g for name, g in native.items() if g is not None}
    assert given.keys() == {"one.weight", "one.bias", "two.bias", "late.bias"}
    assert [name for name, g in found.items() if g is not None] == list(given)
    norm = torch.cat([g.flatten() for g in given.values()]).norm()
    assert norm > 1
    assert_same({n: found[n] for n in given}, {n: g * 0.5 / norm for n, g in given.items()})


def test_the_gradient_can_be_differentiated_and_asked_for_in_part() -> None:
    net = network().double()
    gm = fg.transform(net, {"params": fg.rules.normalize(eps=1.0, over="all")})
    x = X.double().requires_grad_()
    weights = [*net.parameters()]
    expected = gradients(gm, net, x)["0.weight"].clone()
    (part,) = torch.autograd.grad(gm(x).square().sum() * 9, weights[0])
    torch.testing.assert_close(part, expected)

    def by_hand(x: Tensor) -> Tensor:
        grads = torch.autograd.grad(net(x).square().sum() * 9, weights, create_graph=True)
        return (grads[0] / (torch.cat([g.flatten() for g in grads]).norm() + 1)).sum()

    # the second derivative in x passes the rule as the formula is written
    (ours,) = torch.autograd.grad(gm(x).square().sum() * 9, weights[0], create_graph=True)
    (found,) = torch.autograd.grad(ours.sum(), x)
    (second,) = torch.autograd.grad(by_hand(x), x)
    torch.testing.assert_close(found, second)


def test_parameters_of_several_dtypes_are_joined() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = network()[0], network()[2].bfloat16()

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x).bfloat16()).float()

    mixed = Mixed()
    gm = fg.transform(mixed, {"params": fg.rules.clip_norm(max_norm=0.5, over="all")})
    found = gradients(gm, mixed)
    assert [g.dtype for g in found.values()] == [torch.float32] * 2 + [torch.bfloat16] * 2
    norm = torch.cat([g.flatten().float() for g in found.values()]).norm()
    assert float(norm) == pytest.approx(0.5, rel=1e-2)


def test_a_parameter_of_the_rule_is_set_for_the_whole_group() -> None:
    net = network()
    gm = fg.transform(net, {"params": fg.rules.clip_norm(max_norm=0.5, over="module")})
    gm.set_rule_parameter("2.bias", max_norm=0.125)
    found = gradients(gm, net)
    norms = [torch.cat([found[n].flatten() for n in names]).norm() for names in MODULES]
    torch.testing.assert_close(torch.stack(norms), torch.tensor([0.5, 0.125, 0.5]))
    rules = {d.site.name: d.rules[0].bound["max_norm"] for d in fg.report(gm).decisions if d.rules}
    assert [rules["2.weight"], rules["2.bias"], rules["0.weight"]] == [0.125, 0.125, 0.5]
    with pytest.warns(fg.FreegradWarning, match="already decoupled, with the rule 'clip_norm'"):
        fg.transform(gm, {"params": "reverse"})


class Checkpointed(nn.Module):
    """A checkpoint in a part that is kept as one call."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = network(), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(checkpoint(self.first, x, use_reentrant=True))


def test_a_reentrant_checkpoint_of_a_part_is_refused() -> None:
    model = Checkpointed()
    rules = {"params": fg.rules.clip_norm(max_norm=0.5, over="all")}
    x = X.clone().requires_grad_()
    with fg.use(rules, model=model):
        y = model(x)
    with pytest.raises(RuntimeError, match=r"one recomputed part alone.*use_reentrant=False"):
        y.sum().backward()


def test_where_parameters_cannot_be_joined_an_error_says_what_to_do() -> None:
    net, clip = network(), fg.rules.clip_norm(over="all")
    with pytest.raises(fg.RuleError, match=r"'modle'.*Did you mean 'module'"):
        clip(over="modle")
    with pytest.raises(
        fg.RuleError, match=r"cannot act on several gradients.*clip_norm, block_rms"
    ):
        fg.rules.noise(over="all")
    with pytest.raises(fg.RuleError, match="its formula reads 'x'"):
        fg.register("joined", joint=True)(lambda grad, x: grad)
    with pytest.raises(fg.PlanError, match=r"to the operation 1:tanh\[0\].*select parameters"):
        fg.explain(net, {"tanh": clip})
    with pytest.raises(fg.PlanError, match=r"torch\.compile\(freegrad_fx\.transform"):
        fg.compile(net, {"params": clip})
    with pytest.raises(fg.RuleError, match=r"a block of a single rule has no entries.*model=model"):
        fg.use(clip, scope="params")
    with pytest.raises(fg.TableError, match=r"give the model: use\(rules, model=model\)"):
        fg.use({"params": clip})
    ambient = fg.transform(net)
    remedy = r"which is ambient\. Transform the original model"
    with pytest.raises(fg.RuleError, match=remedy), fg.use({"params": clip}, model=ambient):
        ambient(X)
    values = {name: p.detach().clone().requires_grad_() for name, p in net.named_parameters()}
    remedy = r"swapped in by torch\.func\.functional_call.*Transform the model"
    with pytest.raises(fg.RuleError, match=remedy), fg.use({"params": clip}, model=net):
        torch.func.functional_call(net, values, (X,))

"""Rules that draw random numbers: from the global generator or from one of their own, in every way to run a model."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import freegrad_fx as fg
from built_in import BUILT_IN

RANDOM = [name for name in BUILT_IN if fg.get(name).declaration.random]
X = torch.linspace(-1.5, 2, 40).reshape(5, 8)


def seeded(number: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(number)


def gradient(function: Callable[[Tensor], Tensor]) -> Tensor:
    x = X.clone().requires_grad_()
    y = function(x)
    (grad,) = torch.autograd.grad(y, x, torch.linspace(-1, 1, y.numel()).reshape(y.shape))
    return grad


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU())


@pytest.mark.parametrize("name", RANDOM)
def test_a_generator_of_its_own_gives_the_numbers_and_no_other_is_drawn_from(name: str) -> None:
    generator = seeded(4)
    gm = fg.transform(nn.Tanh(), {"tanh": fg.get(name)(generator=generator)})
    torch.manual_seed(4)
    expected = gradient(fg.transform(nn.Tanh(), {"tanh": fg.get(name)}))
    torch.manual_seed(99)
    before = torch.random.get_rng_state()
    assert torch.equal(gradient(gm), expected)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not torch.equal(gradient(gm), expected)
    generator.manual_seed(4)
    assert torch.equal(gradient(gm), expected)


def test_one_seed_reproduces_all_sites_and_each_draws_its_own() -> None:
    gm = fg.transform(nn.Sequential(nn.ReLU(), nn.ReLU()), {"relu": fg.rules.noise(sigma=1.0)})
    torch.manual_seed(5)
    first = gradient(gm)
    torch.manual_seed(5)
    assert torch.equal(gradient(gm), first)
    torch.manual_seed(5)
    one, other = torch.randn(5, 8), torch.randn(5, 8)  # in the order of the backward
    torch.testing.assert_close(first, torch.linspace(-1, 1, 40).reshape(5, 8) + one + other)
    assert not torch.equal(one, other)


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_draws_nothing_twice(reentrant: bool, own: bool) -> None:
    """Also beside a dropout, whose numbers the recomputation draws again."""
    generator = seeded() if own else None
    net = nn.Sequential(network(), nn.Dropout(0.5), network())
    gm = fg.transform(net, {"relu": fg.rules.noise(sigma=0.5, generator=generator)})
    found = []
    for function in (gm, lambda x: checkpoint(gm, x, use_reentrant=reentrant)):
        torch.manual_seed(3)
        seeded_again = None if generator is None else generator.manual_seed(1)
        x = X.clone().requires_grad_()
        function(x).square().sum().backward()
        found.append([x.grad, *(p.grad for p in net.parameters()), torch.random.get_rng_state()])
        if seeded_again is not None:
            found[-1].append(seeded_again.get_state())
        net.zero_grad()
    assert all(map(torch.equal, *found))


def test_compiled_rules_draw_from_the_same_generator_on_a_cpu() -> None:
    gm = fg.transform(network(), {"relu": fg.rules.noise(sigma=0.5)})
    compiled = torch.compile(gm, backend="aot_eager", fullgraph=True)
    found = []
    for function in (gm, compiled, compiled):
        torch.manual_seed(3)
        found.append(gradient(function))
    torch.testing.assert_close(found[1], found[0])
    assert torch.equal(found[1], found[2])
    assert not torch.equal(gradient(compiled), found[2])


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
# PyTorch 2.12 warns of each function that it leaves to Python
@pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace the builtin:UserWarning")
def test_compiled_code_has_no_generator_of_its_own() -> None:
    generator = seeded()
    rules = {"relu": fg.rules.noise(sigma=0.5, generator=generator)}
    gm = fg.transform(network(), rules)
    expected = gradient(gm)
    generator.manual_seed(1)
    # the part with the rule runs in eager mode
    assert torch.equal(gradient(torch.compile(gm, backend="aot_eager")), expected)
    torch.compiler.reset()
    with pytest.raises(Exception, match="draws from a generator of its own"):
        torch.compile(gm, backend="aot_eager", fullgraph=True)(X.clone().requires_grad_())
    with pytest.raises(fg.PlanError, match=r"'relu' gives the rule 'noise' a generator.*transform"):
        fg.compile(network(), rules)
    generator.manual_seed(1)
    in_one_kernel = fg.rules.noise(sigma=0.5, generator=generator, compile=True)
    assert torch.equal(gradient(fg.transform(network(), {"relu": in_one_kernel})), expected)


def test_a_generator_is_copied_and_saved_with_its_model_at_its_place() -> None:
    generator = seeded()
    gm = fg.transform(network(), {"relu": fg.rules.noise(generator=generator)})
    gradient(gm)
    copies = [copy.deepcopy(gm), pickle.loads(pickle.dumps(gm))]
    expected = gradient(gm)
    assert all(torch.equal(gradient(other), expected) for other in copies)
    # a transform shares it
    again = fg.transform(gm, {"linear": None})
    generator.manual_seed(1)
    first = gradient(gm)
    generator.manual_seed(1)
    assert torch.equal(gradient(again), first)
    assert list(again.state_dict()) == list(network().state_dict())


def test_a_generator_can_be_set_and_taken_away() -> None:
    gm = fg.transform(network(), {"relu": fg.rules.noise(sigma=0.5)})
    torch.manual_seed(1)
    expected = gradient(gm)
    gm.set_rule_parameter("relu", generator=seeded())
    assert torch.equal(gradient(gm), expected)
    gm.set_rule_parameter("relu", generator=seeded())
    assert torch.equal(gradient(gm), expected)
    gm.set_rule_parameter("relu", generator=None)
    torch.manual_seed(1)
    assert torch.equal(gradient(gm), expected)
    assert "rule_generator" not in gm.code


def test_a_generator_in_blocks_and_under_torch_func() -> None:
    net, generator = network(), seeded()
    rules = {"relu": fg.rules.noise(sigma=0.5, generator=generator)}
    expected = gradient(fg.transform(net, rules))
    with fg.use(rules, model=net):
        generator.manual_seed(1)
        assert torch.equal(gradient(net), expected)
    generator.manual_seed(1)
    gm = fg.transform(net, rules)
    torch.testing.assert_close(
        torch.func.vjp(gm, X)[1](torch.linspace(-1, 1, 40).reshape(5, 8))[0], expected
    )


def test_what_a_generator_cannot_do_is_said() -> None:
    rule = fg.rules.full_jam(generator=seeded())
    assert repr(rule) == "full_jam(generator=generator on cpu)"
    table = fg.RuleTable([fg.on("relu").backward(rule)])
    with pytest.raises(fg.TableError, match="'generator' of rule 'full_jam' is a Generator"):
        table.to_toml()
    with pytest.raises(fg.RuleError, match=r"for cpu, and the gradient is on meta.*device='meta'"):
        rule.backward(torch.empty(3, device="meta"))
    with pytest.raises(TypeError, match="'generator' of rule 'full_jam' must be Generator"):
        fg.rules.full_jam(generator=3)

"""A table as a value: how it is made, joined, compared and printed, and what it refuses before it sees a model."""

from __future__ import annotations

import copy
import functools
import operator
import pickle
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from torch import Tensor, nn

import freegrad_fx as fg
from built_in import BUILT_IN
from tables import tables


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.act = nn.Linear(3, 3), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.act(self.fc(x)))


class Net(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(Block(), Block(), nn.Softmax(-1))


RELU = fg.on("relu").backward("scale", s=2.0)
GELU = fg.on("gelu", module="1").backward("reverse")
ALL = fg.on("all").backward(None)


# --- a table is a value ---


def test_a_table_reads_like_a_sequence_of_its_entries() -> None:
    table = fg.RuleTable([RELU, GELU, ALL])
    assert len(table) == 3
    assert list(table) == [RELU, GELU, ALL]
    assert table[1] == GELU
    assert table[-1] == ALL
    assert table[1:] == fg.RuleTable([GELU, ALL])
    assert table.entries == (RELU, GELU, ALL)
    assert GELU in table
    assert fg.RuleTable() == fg.RuleTable([]) == fg.RuleTable.of(None) == fg.RuleTable.of({})


def test_tables_join_in_order_and_neither_changes() -> None:
    first, second = fg.RuleTable([RELU]), fg.RuleTable([GELU, ALL])
    assert first + second == fg.RuleTable([RELU, GELU, ALL])
    assert (len(first), len(second)) == (1, 2)
    assert first + second != second + first
    with pytest.raises(TypeError):
        operator.add(first, [GELU])


def test_equal_tables_are_equal_however_they_were_written() -> None:
    same = [
        fg.on("relu").backward("rectangular", a=-1, b=1),
        fg.on(["relu"]).backward(fg.rules.rectangular(a=-1.0, b=1.0)),
        fg.on(op=("relu",)).backward(fg.compose(fg.rules.rectangular(a=-1.0, b=1.0))),
        fg.RuleTable.of({"relu": fg.rules.rectangular(a=-1.0, b=1.0)})[0],
    ]
    assert len(set(same)) == 1
    assert all(fg.RuleTable([entry]) == fg.RuleTable([same[0]]) for entry in same)
    assert len({fg.RuleTable([entry]) for entry in same}) == 1


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (fg.on(module="a"), fg.on("activations", module="a")),
        (fg.on(parameter="a"), fg.on("params", parameter="a")),
        (fg.on(parameter="a"), fg.on("all", parameter="a")),
        (fg.on(type=nn.ReLU), fg.on(type="torch.nn.ReLU")),
        (fg.on(call=slice(2)), fg.on(call=slice(0, 2, 1))),
        (fg.on("relu", forward="tanh"), fg.on("relu", forward="tanh")),
    ],
    ids=repr,
)
def test_selections_that_mean_the_same_are_equal(one: Any, other: Any) -> None:
    assert one.backward("scale") == other.backward("scale")
    assert hash(one.backward("scale")) == hash(other.backward("scale"))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (fg.on("relu"), fg.on("gelu")),
        (fg.on("relu", call=1), fg.on("relu", call=slice(1, 2))),
        (fg.on("relu", call=slice(0, None, 2)), fg.on("relu", call=slice(0, None, 3))),
        (fg.on("relu", call=slice(0, 2)), fg.on("relu", call=slice(0, 3))),
        (fg.on("relu", module="a"), fg.on("relu", module="b")),
        (fg.on("params", parameter="a"), fg.on("params", parameter="b")),
        (fg.on(type=nn.ReLU), fg.on("activations", type=nn.ReLU)),
        (fg.on("relu"), fg.on("relu", forward="tanh")),
        (fg.on("relu", where=callable), fg.on("relu", where=bool)),
    ],
    ids=repr,
)
def test_selections_that_mean_something_else_are_not_equal(one: Any, other: Any) -> None:
    assert one.backward("scale") != other.backward("scale")


def test_the_last_call_that_can_be_named_is_the_one_before_a_billion() -> None:
    last = 10**9 - 1
    assert fg.on("relu", call=[last, slice(0, last)]).sites.call == (last, slice(0, last, 1))
    for call in (last + 1, slice(0, last + 1)):
        with pytest.raises(fg.TableError, match="the largest index is 999999999"):
            fg.on("relu", call=call)


def test_classes_of_one_name_that_no_name_leads_to_are_not_equal() -> None:
    def made() -> type[nn.Module]:
        class Local(nn.Module):
            pass

        return Local

    one, other = made(), made()
    assert fg.on(type=one).backward("scale") == fg.on(type=one).backward("scale")
    assert fg.on(type=one).backward("scale") != fg.on(type=other).backward("scale")


def test_a_forward_on_the_entry_is_the_rule_s() -> None:
    one = fg.on("relu", forward="heaviside").backward("arctan")
    other = fg.on("relu").backward(fg.rules.arctan(forward="heaviside"))
    third = fg.on("relu").backward("arctan", forward="heaviside")
    assert one == other == third
    assert one.forward == "heaviside"
    assert fg.on("relu", forward="heaviside").backward(other.rules[0]) == one


def test_a_table_survives_copies_and_pickling() -> None:
    table = fg.RuleTable([RELU, GELU, ALL, fg.on(type=nn.ReLU, call=slice(1, 2)).backward("noise")])
    assert copy.deepcopy(table) == pickle.loads(pickle.dumps(table)) == table


def is_first(site: fg.Site) -> bool:
    return site.call == 0


def test_a_model_can_be_saved_whatever_its_table_asks() -> None:
    class Local(nn.ReLU):
        pass

    deep = fg.on("relu", where=lambda site: "." in site.path).backward("scale")
    local, first = (
        fg.on(type=Local).backward("noise"),
        fg.on("gelu", where=is_first).backward("scale"),
    )
    with pytest.warns(fg.FreegradWarning, match="'Local' matches nothing"):
        gm = fg.transform(Net(), fg.RuleTable([deep, local, first]))
    assert fg.report(copy.deepcopy(gm)) == fg.report(gm)
    loaded = fg.report(pickle.loads(pickle.dumps(gm)))
    assert loaded.decisions == fg.report(gm).decisions
    assert str(loaded) == str(fg.report(gm))
    assert loaded.table[2] == first
    assert fg.explain(nn.Sequential(Block(), Local()), loaded.table[1:]).hits == (1, 1)
    with pytest.raises(fg.TableError, match="was not saved with its table"):
        fg.explain(Net(), loaded.table)


# --- the repr ---


def test_a_table_prints_as_the_code_that_makes_it() -> None:
    rules = fg.RuleTable(
        [
            fg.on("relu", module=["layer3.*", "layer4.*"]).backward("rectangular", a=-1.0, b=1.0),
            fg.on(["gelu", "softmax"], call=[0, slice(2, None)]).backward(None),
            fg.on(parameter="re:.*weight").backward(fg.compose("d(ReLU)", fg.rules.scale(s=0.5))),
            fg.on(type=nn.ReLU, forward="heaviside").backward("clip_norm", max_norm=float("inf")),
        ]
    )
    assert repr(rules).splitlines() == [
        "RuleTable([",
        "    on('relu', module=['layer3.*', 'layer4.*']).backward('rectangular', a=-1.0, b=1.0),",
        "    on(['gelu', 'softmax'], call=[0, slice(2, None)]).backward(None),",
        "    on(parameter='re:.*weight').backward(compose('d(ReLU)', get('scale')(s=0.5))),",
        "    on(type='torch.nn.ReLU', forward='heaviside')"
        ".backward('clip_norm', max_norm=float('inf'), eps=1e-12),",
        "])",
    ]
    assert repr(fg.RuleTable()) == "RuleTable()"


@given(tables)
def test_the_repr_evaluates_to_the_table(table: fg.RuleTable) -> None:
    assert eval(repr(table), {name: getattr(fg, name) for name in fg.__all__}) == table


def test_functions_and_tensors_are_printed_on_one_line() -> None:
    def is_deep(site: fg.Site) -> bool:
        return site.path.count(".") > 2

    forward = functools.partial(torch.mul, 2.0)
    entry = fg.on("relu", where=is_deep, forward=forward).backward("scale", s=torch.ones(3, 3))
    text = repr(entry)
    assert "is_deep" in text
    assert "forward=partial(torch.mul, 2.0)" in text
    assert "s=tensor[3, 3]" in text
    assert "s=tensor(2.0)" in repr(fg.on("relu").backward("scale", s=torch.tensor(2.0)))
    assert "where=" in entry.selector
    assert "\n" not in text


@pytest.mark.parametrize(
    ("selection", "text"),
    [
        (fg.on("relu"), "relu"),
        (fg.on(), "activations"),
        (fg.on(["relu", "gelu"], module="a.*"), "relu|gelu, module=a.*"),
        (fg.on(type=nn.ReLU), "ReLU"),
        (fg.on("relu", type=nn.ReLU), "relu, type=ReLU"),
        (fg.on(parameter=["*.weight", "*.bias"]), "parameter=*.weight|*.bias"),
        (fg.on("relu", call=[0, slice(2, None, 3)]), "relu, call=0|2::3"),
        (fg.on("relu", module=""), "relu, module="),
    ],
    ids=repr,
)
def test_an_entry_says_in_words_what_it_selects(selection: Any, text: str) -> None:
    assert selection.backward(None).selector == text


# --- what is refused ---


def refusals() -> Iterator[Any]:
    def case(id: str, make: Any, error: type[Exception], *words: str) -> Any:
        return pytest.param(make, error, words, id=id)

    table = fg.TableError
    yield case(
        "unknown op",
        lambda: fg.on("rellu"),
        table,
        "unknown op or group 'rellu'. Did you mean 'relu'?",
    )
    yield case(
        "a class for an op",
        lambda: fg.on(nn.ReLU),
        table,
        "Use `type` for a class: on(type=ReLU)",
    )
    yield case(
        "a path for an op", lambda: fg.on("layer4.*"), table, "Use `module` for patterns of paths"
    )
    yield case("a function for an op", lambda: fg.on(F.relu), table, "relu() of type function")
    yield case("no values", lambda: fg.on("relu", module=[]), table, "module is an empty list")
    yield case(
        "a value twice", lambda: fg.on(["relu", "gelu", "relu"]), table, "op contains 'relu' twice"
    )
    yield case(
        "a pattern twice", lambda: fg.on(module=["a", "a"]), table, "module contains 'a' twice"
    )
    yield case(
        "a pattern that is no text",
        lambda: fg.on(module=3),
        table,
        "module has to be a glob",
        "got 3 of type int",
    )
    yield case(
        "an open set",
        lambda: fg.on(module="layer[4"),
        table,
        "'layer[4' is not a valid glob",
        "for a literal '[' write [[]",
    )
    yield case("an open set, negated", lambda: fg.on(module="[!]a"), table, "is not a valid glob")
    yield case(
        "no expression",
        lambda: fg.on(module="re:layer(4"),
        table,
        "'re:layer(4' is not a valid regular expression",
    )
    yield case(
        "too many",
        lambda: fg.on(module="re:a{99999999999999999999}"),
        table,
        "is not a valid regular expression",
    )
    yield case(
        "parameter and op",
        lambda: fg.on("relu", parameter="*"),
        table,
        "op='relu' selects operations",
    )
    yield case(
        "a bare class name", lambda: fg.on(type="ReLU"), table, "Did you mean 'torch.nn.ReLU'?"
    )
    yield case(
        "a misspelt class",
        lambda: fg.on(type="torch.nn.RelU"),
        table,
        "unknown type",
        "'torch.nn.ReLU'?",
    )
    yield case(
        "no class", lambda: fg.on(type=nn.ReLU()), table, "type has to be a class of modules"
    )
    yield case("another class", lambda: fg.on(type=int), table, "type has to be a class of modules")
    yield case(
        "a negative call",
        lambda: fg.on(call=-1),
        table,
        "negative indices are not supported",
        "is not known",
    )
    yield case(
        "a negative slice",
        lambda: fg.on(call=slice(-2, None)),
        table,
        "negative indices are not supported",
    )
    yield case(
        "no step",
        lambda: fg.on(call=slice(0, 4, 0)),
        table,
        "step of a slice of calls has to be at least 1",
    )
    yield case(
        "no index", lambda: fg.on(call=1.5), table, "index of a call", "got 1.5 of type float"
    )
    yield case("a truth value", lambda: fg.on(call=True), table, "index of a call")
    yield case("no bound", lambda: fg.on(call=slice("a", None)), table, "index of a call")
    yield case(
        "unknown forward", lambda: fg.on(forward="heavyside"), table, "Did you mean 'heaviside'?"
    )
    yield case("no forward", lambda: fg.on(forward=3), table, "name of an op or a function")
    yield case(
        "no forward of a rule",
        lambda: fg.on("relu").backward("arctan", forward=3),
        table,
        "name of an op or a function",
    )
    yield case(
        "index beyond any model", lambda: fg.on(call=10**5000), table, "the largest index is"
    )
    yield case(
        "where is no question",
        lambda: fg.on(where="site"),
        table,
        "where has to be a function of a Site",
    )
    yield case(
        "unknown rule",
        lambda: fg.on("relu").backward("scael"),
        fg.RuleError,
        "Did you mean 'scale'?",
    )
    yield case(
        "no rule",
        lambda: fg.on("relu").backward(3),
        fg.RuleError,
        "a rule has to be a name, a Rule or a composition",
    )
    yield case(
        "a ready table that is not called",
        lambda: fg.RuleTable.of(fg.tables.epsilon_plus),  # type: ignore[arg-type]
        fg.RuleError,
        "Call it: freegrad_fx.tables.epsilon_plus()",
    )
    yield case(
        "the name of a ready table",
        lambda: fg.RuleTable.of("save_memory"),
        fg.RuleError,
        "A ready table is called: freegrad_fx.tables.save_memory()",
    )
    yield case(
        "unknown parameter",
        lambda: fg.on("relu").backward("scale", t=1.0),
        fg.RuleError,
        "unknown parameter",
    )
    yield case(
        "type of a parameter",
        lambda: fg.on("relu").backward("scale", s="1"),
        TypeError,
        "must be float",
    )
    yield case(
        "value of a parameter",
        lambda: fg.on("relu").backward("noise", sigma=-1.0),
        fg.RuleError,
        "sigma >= 0",
    )
    yield case(
        "parameters of none",
        lambda: fg.on("relu").backward(None, s=1.0),
        table,
        "does not take parameters; got s",
    )
    yield case(
        "parameters of a chain",
        lambda: fg.on("relu").backward(fg.compose("scale", "noise"), s=1.0),
        TypeError,
        "a composition has no parameters of its own",
    )
    yield case(
        "a forward and no rule",
        lambda: fg.on("relu", forward="tanh").backward(None),
        table,
        "has no rule",
    )
    yield case(
        "two forwards",
        lambda: fg.on("relu", forward="tanh").backward("arctan", forward="heaviside"),
        table,
        "different forwards: 'heaviside' and 'tanh'",
    )
    yield case(
        "no backward",
        lambda: fg.RuleTable([RELU, fg.on("gelu")]),
        table,
        "entry 2 (gelu) has no backward",
    )
    yield case(
        "no entry",
        lambda: fg.RuleTable(["relu"]),
        table,
        "entry 1 has to be made with on(...).backward(...)",
    )
    yield case(
        "a lone selection",
        lambda: fg.RuleTable(fg.on("gelu")),
        table,
        "entry 1 (gelu) has no backward",
    )


@pytest.mark.parametrize(("make", "error", "words"), list(refusals()))
def test_a_mistake_is_an_error_when_the_table_is_made(
    make: Any, error: type[Exception], words: tuple[str, ...]
) -> None:
    with pytest.raises(error) as caught:
        make()
    for word in words:
        assert word in str(caught.value)


def test_an_error_in_a_table_is_a_plan_error_and_a_value_error() -> None:
    assert issubclass(fg.TableError, fg.PlanError)
    assert issubclass(fg.TableError, ValueError)


@pytest.mark.parametrize("rules", [RELU, [RELU, GELU], fg.on("relu"), (RELU,)], ids=repr)
def test_entries_without_a_table_are_refused_with_the_remedy(rules: Any) -> None:
    with pytest.raises(fg.TableError, match=r"entries have to be in a table: RuleTable\(\["):
        fg.transform(Net(), rules)


@pytest.mark.parametrize(
    "pattern", ["[abc]x", "[]]", "[!]]", "a]", "[[]", "re:[[]", "re:", "", "*"]
)
def test_sets_of_characters_are_closed_as_in_a_shell(pattern: str) -> None:
    fg.on(module=pattern)


def test_an_exception_in_where_names_the_entry_and_the_site() -> None:
    def where(site: fg.Site) -> bool:
        return site.depth > 2  # type: ignore[attr-defined,no-any-return]

    rules = fg.RuleTable([fg.on("gelu", where=where).backward("scale")])
    with pytest.raises(fg.TableError) as error:
        fg.explain(Net(), rules)
    message = str(error.value)
    assert re.search(
        r"the `where` of the entry 'gelu, where=.*where' raised AttributeError", message
    )
    assert "the site 0:gelu[0]" in message
    assert isinstance(error.value.__cause__, AttributeError)


def test_where_is_asked_last() -> None:
    asked = []

    def where(site: fg.Site) -> bool:
        asked.append(site.name)
        return True

    fg.explain(Net(), fg.RuleTable([fg.on("relu", module="1.*", where=where).backward("scale")]))
    assert set(asked) == {"1.act:relu[0]"}


# --- what a capture and a rewriting ask of a table ---


def test_a_table_says_whether_it_is_about_parameters() -> None:
    for entry in (fg.on("params"), fg.on("all"), fg.on(parameter="*"), fg.on(["relu", "params"])):
        assert fg.RuleTable([RELU, entry.backward("scale")]).wants_parameters
    for entry in (fg.on("relu"), fg.on(type=nn.ReLU), fg.on("activations", module="*")):
        assert not fg.RuleTable([entry.backward("scale")]).wants_parameters


class Signed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.sign()


def test_a_table_says_the_classes_whose_calls_are_sites() -> None:
    model = Net()
    qualified = f"{Block.__module__}.{Block.__qualname__}"

    def types(**fields: Any) -> tuple[type, ...]:
        return fg.RuleTable([fg.on(**fields).backward("scale")]).types_in(model)

    assert types(type=Block) == (Block,)
    assert types(type=qualified) == (Block,)
    assert types(type=["torch.nn.ReLU", "torch.nn.modules.activation.Softmax"]) == (
        nn.ReLU,
        nn.Softmax,
    )
    assert types(type=Signed) == types(type=f"{Signed.__module__}.Signed") == (Signed,)
    assert types(type="package.of.nobody.Thing") == ()
    assert (
        types(op="relu", type=Block) == types(parameter="*", type=Block) == types(op="relu") == ()
    )


def test_a_class_made_in_a_function_is_found_by_the_name_it_bears() -> None:
    class Local(Block):
        pass

    rules = fg.RuleTable(
        [
            fg.on("relu", module="0.act").backward("scale"),
            fg.on("gelu", type=Local).backward("noise"),
        ]
    )
    by_name = fg.RuleTable(
        [fg.on("gelu", type=f"{Local.__module__}.{Local.__qualname__}").backward("noise")]
    )
    model = nn.Sequential(Block(), Local())
    for table in (rules, by_name):
        decisions = fg.explain(model, table).with_action("rewrite")
        assert [d.site.path for d in decisions if d.rules[0].name == "noise"] == ["1"]


def test_the_model_trains_as_the_table_says() -> None:
    rules = fg.RuleTable(
        [
            fg.on("relu", module="0.*").backward("scale", s=2.0),
            fg.on("gelu", module="1").backward(fg.compose(fg.rules.scale(s=3.0), "reverse")),
            fg.on("activations").backward("straight_through"),
        ]
    )
    model = nn.Sequential(Block(), Block())
    x = torch.randn(4, 3, requires_grad=True)
    gm = fg.transform(model, rules)
    assert torch.equal(gm(x), model(x))
    (actual,) = torch.autograd.grad(gm(x).sum(), x)
    # backwards: gelu of 1 (times −3), relu of 1 (straight through), its linear, gelu of 0 (straight through), relu of 0
    weights = [model[i].fc.weight for i in (0, 1)]
    expected = 2 * ((-3 * torch.ones(4, 3)) @ weights[1]) @ weights[0]
    torch.testing.assert_close(actual, expected)


# --- constraints of rules ---


def test_a_rule_says_what_it_requires_and_holds_its_values_to_it() -> None:
    @fg.register("window", requires="0 <= low <= high < 10, gain != 0")
    def window(grad: Tensor, *, low: float = 0.0, high: float = 1.0, gain: float = 1.0) -> Tensor:
        return grad

    assert [str(c.text) for c in window.declaration.requires] == [
        "0 <= low <= high < 10",
        "gain != 0",
    ]
    window(low=1.0)
    window(low=2.0, high=3.0)
    for values in ({"low": 2.0}, {"low": -1.0}, {"high": 10.0}, {"low": 5.0, "high": 4.0}):
        with pytest.raises(
            fg.RuleError, match=r"rule 'window' requires 0 <= low <= high < 10, got low="
        ):
            window(**values)
    with pytest.raises(fg.RuleError, match=r"requires gain != 0, got gain=0\.0"):
        fg.on("relu").backward("window", gain=0)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("rectangular", {"a": 1.0, "b": -1.0}),
        ("rectangular", {"a": 1.0}),
        ("rectangular_jam", {"b": -6.0}),
        ("clip_norm", {"max_norm": -1.0}),
        ("clip_value", {"max_value": -1.0}),
        ("noise", {"sigma": -0.1}),
        ("clipped_straight_through", {"bound": -1.0}),
        ("fast_sigmoid", {"slope": -25.0}),
        ("arctan", {"alpha": 0.0}),
        ("scale", {"s": float("nan")}),
        ("scale", {"s": 10**400}),
    ],
)
def test_a_built_in_rule_refuses_what_makes_no_sense(name: str, values: dict[str, Any]) -> None:
    with pytest.raises(fg.RuleError, match=re.escape(repr(name))):
        fg.get(name)(**values)


def test_a_tensor_stands_for_any_number_and_is_compared_by_identity() -> None:
    low, slope = torch.tensor(3.0), torch.tensor(25.0)
    rule = fg.rules.rectangular(a=low, b=0.0)
    assert rule.bound["a"] is low
    assert rule == fg.rules.rectangular(a=low, b=0.0)
    assert rule != fg.rules.rectangular(a=low.clone(), b=0.0)
    assert hash(rule) == hash(fg.rules.rectangular(a=low, b=0.0))
    entry = fg.on("relu").backward("fast_sigmoid", slope=slope)
    assert fg.RuleTable([entry]) == fg.RuleTable(
        [fg.on("relu").backward("fast_sigmoid", slope=slope)]
    )
    for name, value in (("scale", torch.ones(3)), ("centralize", torch.tensor(1))):
        fg.get(name)(**{next(iter(fg.get(name).parameters)): value})


def test_every_built_in_rule_of_one_number_takes_a_tensor_for_it() -> None:
    grad, x = torch.randn(2, 50)
    for name in BUILT_IN:
        rule = fg.get(name)
        numbers = {k: v for k, v in rule.bound.items() if isinstance(v, float)}
        tensors = {k: torch.tensor(v) for k, v in numbers.items()}
        results = []
        for values in (numbers, tensors):
            torch.manual_seed(0)
            results.append(rule(**values).backward(grad, x=x, y=x))
        torch.testing.assert_close(*results, msg=name)


@pytest.mark.parametrize(
    ("requires", "words"),
    [
        ("low <", "A constraint compares parameters and numbers"),
        ("low", "A constraint compares"),
        ("low is high", "A constraint compares"),
        ("low <= 'a'", "A constraint compares"),
        ("low <= True", "A constraint compares"),
        ("low * 2 <= high", "A constraint compares"),
        (
            "low <= hihg",
            "unknown parameter in requires= of rule 'odd': 'hihg'. Did you mean 'high'?",
        ),
        ("high < low", "requires high < low, got high=1.0, low=0.0"),
        (3, "A constraint compares"),
    ],
)
def test_a_constraint_that_cannot_be_meant_is_refused_when_the_rule_is_declared(
    requires: Any, words: str
) -> None:
    with pytest.raises(fg.RuleError) as error:

        @fg.register("odd", requires=requires)
        def odd(grad: Tensor, *, low: float = 0.0, high: float = 1.0) -> Tensor:
            return grad

    assert words in str(error.value)
    assert "odd" not in fg.rules.available()


def test_a_rule_says_which_sites_it_is_for() -> None:
    fg.register("for_weights", kinds="parameter")(lambda grad, x: grad)
    fg.register("for_calls", kinds=("operation",))(lambda grad, x: grad)
    assert fg.get("for_weights").kinds == ("parameter",)
    assert fg.rules.scale.kinds == ("operation", "parameter")
    with pytest.raises(
        fg.PlanError, match=r"'for_weights' is for parameter sites only.*0\.act:relu\[0\]"
    ):
        fg.explain(Net(), "for_weights")
    with pytest.raises(
        fg.PlanError, match=r"'for_calls' is for operation sites only.*0\.fc\.weight"
    ):
        fg.explain(Net(), {"params": "for_calls"})
    fg.explain(Net(), {"params": "for_weights", "activations": "for_calls"})
    with pytest.raises(
        fg.RuleError, match=r"kind of site for rule .odd.: .parameters.\. Did you mean .parameter"
    ):
        fg.register("odd", kinds="parameters")


def test_no_rule_can_be_called_what_a_file_writes_for_none() -> None:
    with pytest.raises(fg.RuleError, match="cannot be named 'native'"):
        fg.register("native")


def test_the_rules_that_take_a_sparse_gradient_keep_it_sparse() -> None:
    grad = torch.sparse_coo_tensor([[0, 2]], torch.randn(2, 3), (4, 3), check_invariants=True)
    sparse = [name for name in fg.rules.available() if fg.get(name).sparse]
    assert sparse
    for name in sparse:
        result = fg.get(name).backward(grad)
        assert result.is_sparse
        torch.testing.assert_close(result.to_dense(), fg.get(name).backward(grad.to_dense()))


def test_a_table_in_a_notebook_has_a_row_for_each_entry() -> None:
    entries = [
        fg.on("relu", module="<root>", forward="heaviside").backward("arctan", alpha=3.0),
        fg.on("gelu").backward(None),
        fg.on().backward(fg.compose("full_jam", "reverse")),
    ]
    shown = fg.RuleTable(entries)._repr_html_()
    assert shown.count("<tr>") == 1 + 3
    for cell in ("relu, module=&lt;root&gt;", "arctan(alpha=3.0)", "heaviside", "native"):
        assert f">{cell}</td>" in shown
    assert ">full_jam → reverse(alpha=1.0)</td>" in shown
    assert "may match nothing" not in shown
    assert (
        "may match nothing" in fg.RuleTable([fg.on(optional=True).backward("guided")])._repr_html_()
    )
    assert (
        fg.RuleTable(reaches=["norm"])._repr_html_()
        == "<p>RuleTable: 0 entries; has to reach: norm</p>"
    )

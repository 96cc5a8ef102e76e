"""Layers with the batch norm behind them, against the same models with `torch.nn.utils.fusion`, in every way in."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

import freegrad_fx as fg
from doors import DOORS

RULES = ("lrp_epsilon", "lrp_zplus", "lrp_gamma")


def alone(rule: str) -> fg.RuleTable:
    return fg.RuleTable([fg.on(["conv", "linear"]).backward(rule)])


def both(rule: str) -> fg.RuleTable:
    """A rule for layers, also with a batch norm."""
    return fg.RuleTable([fg.on(["conv_bn", "linear_bn", "conv", "linear"]).backward(rule)])


class Net(nn.Module):
    """A layer with a batch norm, twice, around an activation that works in place."""

    def __init__(self, layer: nn.Module, norm: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.layer, self.norm, self.second = layer, norm, second
        self.other = type(norm)(second.weight.shape[0])

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.layer(x)), inplace=True)
        return self.other(self.second(x)).flatten(1)


LAYERS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "linear": (lambda: Net(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3, bias=False)), (4,)),
    "conv1d": (
        lambda: Net(nn.Conv1d(4, 6, 3, bias=False), nn.BatchNorm1d(6), nn.Conv1d(6, 4, 2)),
        (4, 7),
    ),
    "conv2d, groups": (
        lambda: Net(
            nn.Conv2d(4, 6, 3, groups=2, padding="same"),
            nn.BatchNorm2d(6, affine=False),
            nn.Conv2d(6, 4, 2, stride=2),
        ),
        (4, 5, 6),
    ),
    "conv3d": (
        lambda: Net(nn.Conv3d(2, 4, 2), nn.BatchNorm3d(4), nn.Conv3d(4, 3, 1)),
        (2, 3, 3, 4),
    ),
    "transposed": (
        lambda: Net(nn.ConvTranspose2d(4, 6, 3, groups=2), nn.BatchNorm2d(6), nn.Conv2d(6, 4, 1)),
        (4, 3, 3),
    ),
}


def made(name: str) -> tuple[Any, Tensor]:
    torch.manual_seed(0)
    make, shape = LAYERS[name]
    model = make().double().eval()
    for norm in (model.norm, model.other):
        norm.running_mean.normal_(0, 0.3)
        norm.running_var.uniform_(0.5, 2)
        if norm.affine:
            nn.init.uniform_(norm.weight, -1, 1)
            nn.init.normal_(norm.bias, 0, 0.3)
    return model, torch.randn(2, *shape, dtype=torch.float64)


def fused(model: Any) -> Any:
    """The model with the batch norms merged by PyTorch."""

    def one(layer: nn.Module, norm: nn.Module) -> nn.Module:
        if isinstance(layer, nn.Linear):
            return fuse_linear_bn_eval(layer, norm)
        if isinstance(layer, nn.ConvTranspose2d):
            return in_groups(layer, norm)
        return fuse_conv_bn_eval(layer, norm)

    first, second = one(model.layer, model.norm), one(model.second, model.other)
    return nn.Sequential(first, nn.ReLU(), second, nn.Flatten())


def in_groups(layer: nn.ConvTranspose2d, norm: Any) -> nn.Module:
    """PyTorch's function does not know transposed convolutions with groups: merge the groups one by one."""
    merged = nn.ConvTranspose2d(4, 6, 3, groups=2).double()
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    halves = layer.weight.chunk(2), scale.chunk(2)
    weight = [w * s[None, :, None, None] for w, s in zip(*halves, strict=True)]
    assert layer.bias is not None
    assert merged.bias is not None
    merged.weight.data = torch.cat(weight)
    merged.bias.data = (layer.bias - norm.running_mean) * scale + norm.bias
    return merged


def relevance(called: Any, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    return torch.autograd.grad(called(x)[:, 1].sum(), x)[0]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("door", [DOORS["symbolic"], DOORS["in a block"]], ids=["graph", "block"])
@pytest.mark.parametrize("layer", LAYERS)
def test_a_pair_is_one_layer(layer: str, door: Any, rule: str) -> None:
    model, x = made(layer)
    expected = relevance(fg.transform(fused(model), alone(rule)), x)
    called = door(model, both(rule), (x,))
    assert torch.equal(called(x), model(x))
    torch.testing.assert_close(relevance(called, x), expected, rtol=1e-9, atol=1e-12)


# Dynamo reads `.grad` of whatever goes from one graph into the next
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.slow
@pytest.mark.parametrize("door", [DOORS["exported"], DOORS["compiled"]], ids=["export", "compile"])
@pytest.mark.parametrize("layer", ["linear", "conv2d, groups"])
def test_a_pair_is_one_layer_in_other_graphs(layer: str, door: Any) -> None:
    model, x = made(layer)
    expected = relevance(fg.transform(fused(model), alone("lrp_gamma")), x)
    found = relevance(door(model, both("lrp_gamma"), (x,)), x)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


BOTH = pytest.mark.parametrize(
    "door", [DOORS["symbolic"], DOORS["in a block"]], ids=["graph", "block"]
)
ZPLUS = both("lrp_zplus")


@BOTH
def test_parameters_keep_their_gradients(door: Any) -> None:
    model, x = made("conv1d")
    y = door(model, ZPLUS, (x,))(x)
    # In the last pair, nothing behind it has a rule
    own = [*model.second.parameters(), *model.other.parameters()]
    grad = torch.randn_like(y)
    expected = torch.autograd.grad(model(x), own, grad)
    assert all(map(torch.equal, torch.autograd.grad(y, own, grad), expected))


@BOTH
def test_the_statistics_of_a_batch_are_refused(door: Any) -> None:
    model, x = made("conv1d")
    with pytest.raises(fg.RuleError, match=r"statistics of the batch.* Call model\.eval\(\)"):
        door(model.train(), ZPLUS, (x,))(x)


@BOTH
def test_the_first_layer_can_be_a_pair(door: Any) -> None:
    model, x = made("conv2d, groups")
    box = {"low": -3.0, "high": 3.0}
    pairs = ["conv_bn", "conv"]
    first = fg.on(pairs, first=True).backward("lrp_zbox", **box)
    table = fg.RuleTable([first, fg.on(pairs).backward("lrp_gamma")])
    plain = fg.RuleTable(
        [fg.on("conv", first=True).backward("lrp_zbox", **box), fg.on("conv").backward("lrp_gamma")]
    )
    expected = relevance(fg.transform(fused(model), plain), x)
    torch.testing.assert_close(relevance(door(model, table, (x,)), x), expected)


def test_the_report_names_the_pair_and_its_parts() -> None:
    model, x = made("conv1d")
    with fg.use(ZPLUS, model=model) as block:
        model(x)
    for plan in (fg.report(block), fg.explain(model, ZPLUS)):
        found = {d.site.name: d for d in plan.decisions}
        assert [n for n, d in found.items() if d.acts] == ["norm:conv_bn[0]", "other:conv_bn[0]"]
        part = found["layer:conv[0]"]
        assert "a part of norm:conv_bn[0]" in part.reason


class Shared(nn.Module):
    """The result of a convolution goes into a batch norm, and elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv1d(2, 3, 2), nn.BatchNorm1d(3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return self.norm(x) + x


def test_a_result_that_is_used_elsewhere_too_is_no_pair() -> None:
    model, x = Shared().eval(), torch.randn(2, 2, 4, requires_grad=True)
    with pytest.warns(fg.FreegradWarning, match="does not go into the batch norm alone"):
        gm = fg.transform(model, ZPLUS)
    plain = fg.transform(model, {"conv": "lrp_zplus"})
    found, expected = (torch.autograd.grad(m(x).sum(), x)[0] for m in (gm, plain))
    assert torch.equal(found, expected)
    with fg.use(ZPLUS, model=model):
        y = model(x)
    with pytest.raises(fg.RuleError, match="and also elsewhere"):
        y.sum().backward()


def test_the_result_of_a_layer_in_a_block_goes_into_one_batch_norm_and_nowhere_else() -> None:
    conv, norm = nn.Conv1d(2, 2, 1).eval(), nn.BatchNorm1d(2).eval()

    def read_twice(result: Tensor) -> None:
        norm(result)

    def hooked(result: Tensor) -> None:
        result.register_hook(lambda gradient: gradient * 2)

    def kept(result: Tensor) -> None:
        result.retain_grad()

    problems = [
        (read_twice, "and also elsewhere"),
        (hooked, "by a hook or retain_grad"),
        (kept, "by a hook or retain_grad"),
    ]
    for use, problem in problems:
        with fg.use({"conv_bn": "lrp_zplus"}):
            result = conv(torch.randn(2, 2, 4, requires_grad=True))
            use(result)
            with pytest.raises(fg.RuleError, match=problem):
                norm(result)


@BOTH
def test_a_batch_norm_before_the_layer_is_not_merged(door: Any) -> None:
    class Before(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.conv = nn.BatchNorm1d(2), nn.Conv1d(2, 3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(self.norm(x))

    model, x = Before().double().eval(), torch.randn(2, 2, 4, dtype=torch.float64)
    expected = relevance(lambda v: fg.transform(model, {"conv": "lrp_zplus"})(v).flatten(1), x)
    found = relevance(lambda v: door(model, ZPLUS, (x,))(v).flatten(1), x)
    assert torch.equal(found, expected)


def test_a_rule_for_the_parameters_of_a_pair_is_refused() -> None:
    model, _ = made("linear")
    with pytest.raises(fg.PlanError, match=r"computes from the parameters .* to 'linear'"):
        fg.transform(model, {"linear_bn": "int8_backward"})


def test_a_quantized_weight_is_merged_as_the_model_reads_it() -> None:
    model, x = made("conv1d")
    weights = fg.on(parameter="*weight", type=[nn.Conv1d]).backward(
        "straight_through", forward="sign"
    )
    found = relevance(fg.transform(model, fg.RuleTable([weights, *ZPLUS])), x)
    for conv in (model.layer, model.second):
        conv.weight.data.sign_()
    torch.testing.assert_close(found, relevance(fg.transform(model, ZPLUS), x))


def test_attribute_knows_the_relevance_of_a_pair() -> None:
    model, x = made("conv1d")
    table = fg.RuleTable([fg.on("conv_bn", first=True).backward("lrp_zbox", low=-3.0, high=3.0)])
    found = fg.attribute(model, table, x, 1)
    assert torch.equal(found, fg.attribute(model, table, x, 1, multiply=False))
    assert torch.equal(found, fg.attribute(fg.transform(model, table), None, x, 1))


# --- what happens to the model later ---


@fg.register("native_layer", kinds="operation")
def native_layer(grad: Tensor, x: Tensor, weight: Tensor, *, f: Any) -> Tensor:
    """With the merged weight, this is the native gradient."""
    return f.gradient("x", grad)  # type: ignore[no-any-return]


NATIVE = fg.RuleTable([fg.on(["conv_bn", "linear_bn"]).backward("native_layer")])


class Wrapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = nn.Sequential(nn.Conv1d(2, 3, 2)), nn.Sequential(nn.BatchNorm1d(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.layer(x)).square()


def hook(module: nn.Module, path: str, after: bool) -> None:
    part = module.get_submodule(path)
    if after:
        part.register_forward_hook(lambda _m, _x, result: result * 2)
    else:
        part.register_forward_pre_hook(lambda _, given: (given[0] * 2,))


@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize("path", ["layer.0", "layer", "norm.0", "norm"])
def test_hooks_run_around_a_pair_and_never_inside(path: str, later: bool) -> None:
    outside, x = path.startswith("norm"), torch.randn(2, 2, 4)
    model = Wrapped().eval()
    gm = fg.transform(model, NATIVE) if later else None
    hook(model, path, after=outside)
    if gm is None:
        gm = fg.transform(
            model, fg.RuleTable([fg.on("conv_bn", optional=True).backward("native_layer")])
        )
    else:
        hook(gm, path, after=outside)
    assert torch.equal(gm(x), model(x))
    torch.testing.assert_close(relevance(gm, x), relevance(model, x))
    if later:
        hook(gm, path, after=not outside)
        with pytest.raises(fg.RuleError, match="a hook that runs between the layer and the batch"):
            gm(x)


def test_the_epsilon_of_now_counts() -> None:
    model, x = made("conv1d")
    gm = fg.transform(model, NATIVE)
    model.norm.eps = gm.norm.eps = 0.5
    torch.testing.assert_close(relevance(gm, x), relevance(model, x))


@BOTH
def test_a_batch_norm_can_have_a_higher_precision(door: Any) -> None:
    model, x = made("conv1d")
    expected = relevance(door(model, ZPLUS, (x,)), x)
    for layer in (model.layer, model.second):
        layer.to(torch.bfloat16)
    model.norm.float(), model.other.float()
    x = x.to(torch.bfloat16)
    found = relevance(door(model, ZPLUS, (x,)), x)
    torch.testing.assert_close(found.double(), expected, rtol=0.1, atol=0.02)


def test_second_derivatives_reach_the_merged_parameters() -> None:
    model, x = made("conv2d, groups")
    nn.init.ones_(model.other.weight)
    found = []
    for called in (model, fg.transform(model, NATIVE)):
        x = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(called(x).square().sum(), x, create_graph=True)
        wanted = [model.layer.weight, model.second.weight, model.other.weight]
        if called is not model:
            wanted = [called.layer.weight, called.second.weight, called.other.weight]
        found.append(torch.autograd.grad(grad.square().sum(), wanted))
    torch.testing.assert_close(found[1], found[0])


@BOTH
def test_a_convolution_without_a_batch_is_refused(door: Any) -> None:
    # The batch norm takes the channels for the batch, and normalises the positions
    model = nn.Sequential(nn.Conv1d(2, 3, 3), nn.BatchNorm1d(4)).eval()
    x = torch.randn(2, 6)
    with pytest.raises(fg.RuleError, match=r"normalises another dimension .* Give conv_bn None"):
        door(model, ZPLUS, (x,))(x)

"""The rules exact_*: the gradients of the original model, from fewer bytes."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import freegrad_fx as fg
from freegrad_fx.errors import RuleError
from kept import Between, Run, check, distance, gradients, images


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize(
    "pool",
    [
        nn.MaxPool2d(3, 2, 1),
        nn.MaxPool2d((3, 2), stride=1, padding=1, dilation=2, ceil_mode=True),
    ],
)
def test_a_max_pool_keeps_a_byte_for_each_output(pool: nn.MaxPool2d, last: bool) -> None:
    x = images(2, 3, 9, 11, last=last)
    x[0, 0, 3] = x[0, 0, 4]  # ties
    outputs = pool(x).numel()
    before, after = check(pool, {"max_pool": "exact_max_pool"}, x)
    assert before == x.numel() * 4 + outputs * 8
    assert after == outputs


def test_max_pools_of_other_sizes() -> None:
    table = {"max_pool": "exact_max_pool"}
    assert check(nn.MaxPool1d(3, 2, 1), table, images(2, 3, 9))[1] == 2 * 3 * 5
    assert check(nn.MaxPool3d(2), table, images(2, 3, 4, 4, 6))[1] == 2 * 3 * 2 * 2 * 3
    assert check(nn.MaxPool2d(17, 1), table, images(1, 1, 17, 18))[1] == 2 * 4  # 289 entries
    assert check(nn.MaxPool2d(2), table, images(3, 6, 6))[1] == 3 * 9
    with_nan = images(1, 1, 4, 4).index_fill(-1, torch.tensor([2]), torch.nan)
    check(nn.MaxPool2d(2), table, torch.where(with_nan.isnan(), -torch.inf, with_nan))


def test_average_pools_keep_nothing() -> None:
    for pool in (nn.AvgPool2d(3, 2, 1), nn.AdaptiveAvgPool2d((4, 5)), nn.AvgPool1d(2)):
        x = images(2, 3, 9) if isinstance(pool, nn.AvgPool1d) else images(2, 3, 9, 11, last=True)
        before, after = check(pool, {"avg_pool": "exact_avg_pool"}, x)
        assert (before, after) == (x.numel() * 4, 0)


@pytest.mark.parametrize("trained", ["", "bias", "weight", "weight bias"])
def test_a_convolution_keeps_its_input_for_its_weight_alone(trained: str) -> None:
    conv = nn.Conv2d(3, 4, 3, padding=1, stride=2)
    for name, parameter in conv.named_parameters():
        parameter.requires_grad_(name in trained.split())
    x = images(2, 3, 9, 11)
    before, after = check(conv, {"conv": "exact_conv"}, x, 1e-6)
    assert (before, after) == (x.numel() * 4, x.numel() * 4 if "weight" in trained else 0)


def test_convolutions_with_other_arguments() -> None:
    table = {"conv": "exact_conv"}
    for conv in (
        nn.Conv1d(3, 4, 3, padding="same", padding_mode="circular"),
        nn.ConvTranspose1d(3, 3, 3, stride=2, groups=3),
        nn.Conv1d(3, 4, 3, padding="same", bias=False),
    ):
        assert check(conv.requires_grad_(False), table, images(2, 3, 9), 1e-6)[1] == 0


def batch_norm(*, trained: str = "", training: bool = False, affine: bool = True) -> nn.Module:
    norm = nn.BatchNorm2d(3, affine=affine)
    for name, parameter in norm.named_parameters():
        nn.init.normal_(parameter, generator=torch.Generator().manual_seed(1))
        parameter.requires_grad_(name in trained.split())
    norm(images(4, 3, 5, 5))
    return norm.train(training)


BATCH_NORM = {"batch_norm": "exact_batch_norm"}


@pytest.mark.parametrize("trained", ["", "bias", "weight", "weight bias"])
def test_a_batch_norm_in_eval_mode_keeps_its_input_for_its_weight_alone(trained: str) -> None:
    x = images(2, 3, 9, 11, last=trained == "bias")
    before, after = check(batch_norm(trained=trained), BATCH_NORM, x)
    assert (before, after) == (x.numel() * 4, x.numel() * 4 if "weight" in trained else 0)
    half = x.to(torch.bfloat16)
    assert check(batch_norm(trained=trained), BATCH_NORM, half)[0] == x.numel() * 2
    assert check(batch_norm(affine=False), BATCH_NORM, x)[1] == 0


def test_a_batch_norm_in_training_mode_is_native() -> None:
    x, model = images(2, 3, 9, 11), Between(batch_norm(trained="weight bias"))
    gm = fg.transform(model, BATCH_NORM)
    for training in (True, False, True):
        statistics = copy.deepcopy(model.state_dict())
        model.train(training)
        y, expected, before = gradients(model, model, x)
        model.load_state_dict(statistics)
        found, grads, after = gradients(gm.train(training), model, x)
        assert torch.equal(found, y)
        assert all(map(torch.equal, grads, expected))
        assert after == before
    before, after = check(nn.BatchNorm2d(3, track_running_stats=False).eval(), BATCH_NORM, x)
    assert after == before


def test_a_rule_at_calls_that_are_always_native_is_reported_as_native() -> None:
    @fg.register("of_frozen", kinds="operation", native_if="training", overwrite=True)
    def of_frozen(grad: Tensor, x: Tensor, *, f: Any) -> Tensor:
        """2·native"""
        return 2 * f.gradient("x", grad)

    untracked = nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False)).eval()
    (decision,) = fg.explain(untracked, {"batch_norm": "of_frozen"}).decisions
    reason = "rule 'of_frozen' leaves calls with training=True native"
    assert (decision.action, decision.reason) == ("native", reason)


def test_running_statistics_that_change_before_the_backward_are_an_error() -> None:
    model = Between(batch_norm())
    x = images(2, 3, 4, 4).requires_grad_()
    for run in (model, fg.transform(model, BATCH_NORM)):
        loss = run(x).sum()
        model.inner.running_var.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def affine(norm: Any, kind: str) -> Any:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        if kind == "zeros":
            norm.weight.zero_()
        elif kind == "random":
            norm.weight.copy_(torch.randn(norm.weight.shape, generator=generator))
            norm.weight.flatten()[3] = 0.0
            if getattr(norm, "bias", None) is not None:
                norm.bias.copy_(torch.randn(norm.weight.shape, generator=generator))
    return norm


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("kind", ["default", "random", "zeros"])
def test_a_norm_before_a_linear_layer_keeps_little_more_than_its_output(
    kind: str, trained: bool
) -> None:
    x = images(5, 7, 64)
    for norm, op, rows in (
        (nn.LayerNorm(64), "layer_norm", 1),
        (nn.RMSNorm(64), "rms_norm", 1),
        (nn.LayerNorm((7, 64)), "layer_norm", 7),
        (nn.RMSNorm(64, elementwise_affine=False), "rms_norm", 1),
        (nn.LayerNorm(64, bias=False), "layer_norm", 1),
    ):
        if kind != "default" and norm.elementwise_affine:
            affine(norm, kind)
        net = nn.Sequential(norm.requires_grad_(trained), nn.Linear(64, 4))
        before, after = check(net, {op: f"exact_{op}"}, x, 1e-6)
        whole = x.numel() * 4
        assert before >= 2 * whole
        if kind != "zeros" or not norm.elementwise_affine:
            # 1/σ, and the channels whose bias is large
            assert whole <= after <= 1.45 * whole + 35 // rows * 4
        else:
            assert after <= before


class InParts(nn.RMSNorm):
    """As models of Hugging Face write it."""

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


def test_a_norm_in_separate_operations_keeps_its_output() -> None:
    x = images(5, 64)
    net = nn.Sequential(InParts(64), nn.Linear(64, 4))
    before, after = check(net, {"rms_norm": "exact_rms_norm"}, x, 1e-6)
    assert before > 3 * x.numel() * 4
    assert after < 1.1 * x.numel() * 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_norms_in_half_precision_err_no_more_than_native_ones(dtype: torch.dtype) -> None:
    x = images(32, 64).to(dtype)
    for norm, op in ((nn.LayerNorm(64), "layer_norm"), (nn.RMSNorm(64), "rms_norm")):
        model = Between(affine(norm, "random").to(dtype))
        precise = copy.deepcopy(model).double()
        truth = gradients(precise, precise, x.double())[1]
        native = gradients(model, model, x)[1]
        found = gradients(fg.transform(model, {op: f"exact_{op}"}), model, x)[1]
        assert distance(found, truth) <= 2 * distance(native, truth)


def test_bits_of_activations() -> None:
    x = images(4, 8)
    x[0, :3] = torch.tensor([0.0, -0.0, torch.nan])
    for kind, op in ((nn.LeakyReLU(0.3), "leaky_relu"), (nn.ReLU(), "relu")):
        model, bits = Between(kind), {op: f"exact_{op}"}
        expected, found = (gradients(run, model, x) for run in (model, fg.transform(model, bits)))
        assert torch.equal(found[1][0], expected[1][0])
        assert (expected[2], found[2]) == (128, 4)


class Gate(nn.Module):
    def __init__(self, change: str = "") -> None:
        super().__init__()
        self.gate, self.up, self.act = nn.Linear(6, 8), nn.Linear(6, 8), nn.SiLU()
        self.change = change

    def forward(self, x: Tensor) -> Tensor:
        gate = self.act(self.gate(x))
        gate = gate.mul_(2.0) if self.change else gate
        return gate * self.up(x) if self.change != "swapped" else self.up(x) * gate


GATE = {"silu": "exact_silu", "mul": "exact_mul"}


def test_the_silu_of_a_gate_is_computed_again() -> None:
    one = 4 * 8 * 4
    before, after = check(Gate(), GATE, images(4, 6))
    assert before - after == one
    assert check(Gate("in place"), GATE, images(4, 6))  # what was written into is kept
    alone = fg.RuleTable([fg.on("mul").backward("exact_mul")])
    assert len(set(check(Gate(), alone, images(4, 6)))) == 1


def test_factors_that_are_numbers_are_broadcast_or_need_no_gradient() -> None:
    class Products(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.randn(6))
            self.register_buffer("fixed", torch.randn(4, 1))

        def forward(self, x: Tensor) -> Tensor:
            return 3 * (x * self.scale) * self.fixed * (x * 2.0)

    check(Products(), {"mul": "exact_mul"}, images(4, 6))


def test_products_in_place_and_of_complex_numbers() -> None:
    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.randn(6))

        def forward(self, x: Tensor) -> Tensor:
            y = x + 1
            y *= self.scale
            return (torch.complex(y, x).mul(self.scale) * y * (1 + 2j)).abs() + (x * (3 - 1j)).imag

    check(Product(), {"mul": "exact_mul"}, images(4, 6))


# --- all together, in every way in ---


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.frozen = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.batch_norm = nn.BatchNorm2d(6).eval()
        self.frozen.requires_grad_(False)
        self.batch_norm.requires_grad_(False)
        self.norm, self.rms = affine(nn.LayerNorm(6), "random"), affine(nn.RMSNorm(6), "random")
        self.mlp, self.drop, self.out = Gate(), nn.Dropout(0.0), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv(x), inplace=True), 3, 2, 1)
        x = F.avg_pool2d(F.leaky_relu(self.batch_norm(self.frozen(x)), 0.2), 2)
        x = x.flatten(2).transpose(1, 2)
        return self.out(self.drop(self.mlp(x + self.rms(self.norm(1.0 * x)))))


TABLE = fg.tables.save_memory(relu=True, frozen=True)
X = images(2, 3, 8, 8)


@pytest.fixture(scope="module")
def net() -> Net:
    torch.manual_seed(0)
    return Net()


def ways(model: nn.Module) -> Iterator[Run]:
    yield fg.transform(model, TABLE)
    yield fg.transform(model, TABLE, example_inputs=(X,))

    def in_block(x: Tensor) -> Tensor:
        with fg.use(TABLE, model=model):
            return model(x)

    yield in_block
    yield fg.compile(model, TABLE, backend="aot_eager")
    yield torch.compile(fg.transform(model, TABLE), backend="aot_eager")


def test_every_way_in_gives_the_native_gradients(net: Net) -> None:
    decisions = fg.explain(net, TABLE).decisions
    assert {r.name for d in decisions for r in d.rules} == {e.rules[0].name for e in TABLE.entries}
    y, expected, before = gradients(net, net, X)
    kept = []
    for run in ways(net):
        run(X.clone().requires_grad_())  # to compile it without hooks
        found, grads, after = gradients(run, net, X)
        assert torch.equal(found, y)
        assert distance(grads, expected) < 1e-6
        kept.append(after)
    assert max(kept[:3]) < 0.6 * before


@contextlib.contextmanager
def mixed() -> Iterator[None]:
    with torch.autocast("cpu", torch.bfloat16):
        yield


def test_autocast_and_channels_last_and_no_grad(net: Net) -> None:
    model = copy.deepcopy(net).to(memory_format=torch.channels_last)
    gm, x = fg.transform(model, TABLE), X.to(memory_format=torch.channels_last)
    assert distance(gradients(gm, model, x)[1], gradients(model, model, x)[1]) < 1e-6
    precise = copy.deepcopy(net).double()
    truth = gradients(precise, precise, X.double())[1]
    with mixed(), warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # of rms_norm: its input and its weight have different dtypes
        native, found = (gradients(run, net, X)[1] for run in (net, fg.transform(net, TABLE)))
        assert distance(found, truth) < 2 * distance(native, truth)
    with torch.no_grad():
        assert torch.equal(gm(x), model(x))


def test_transforms_of_torch_func(net: Net) -> None:
    parameters = {name: p.detach() for name, p in net.named_parameters()}

    def per_sample(model: nn.Module) -> dict[str, Tensor]:
        def loss(values: dict[str, Tensor], x: Tensor) -> Tensor:
            return torch.func.functional_call(model, values, (x[None],)).square().sum()

        return torch.vmap(torch.func.grad(loss), (None, 0))(parameters, X)

    expected, found = per_sample(net), per_sample(fg.transform(net, TABLE))
    assert distance(tuple(found.values()), tuple(expected.values())) < 1e-5


def second(run: Run) -> Tensor:
    x = X.double().requires_grad_()
    (grad,) = torch.autograd.grad(run(x).square().sum(), x, create_graph=True)
    return torch.autograd.grad(grad.square().sum(), x)[0]


def test_second_derivatives_are_native_or_refused(net: Net) -> None:
    model = copy.deepcopy(net).double()
    with pytest.raises(RuleError, match=r"'exact_(layer|rms)_norm' .* second derivative"):
        second(fg.transform(model, TABLE))
    norms = fg.RuleTable([fg.on(["layer_norm", "rms_norm"]).backward(None)])
    found, expected = second(fg.transform(model, norms + TABLE)), second(model)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-14)


def test_an_output_that_is_written_into_later_is_copied() -> None:
    class Written(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(8)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x).mul_(2.0)

    check(Written(), {"layer_norm": "exact_layer_norm"}, images(4, 8), 1e-6)


# --- lean forms of one's own ---


def keep(x: Tensor) -> tuple[Any, ...]:
    return x.sign(), x.dim()


def from_sign(grad: Tensor, kept: tuple[Any, ...]) -> Tensor:
    sign, dims = kept
    return grad * sign * dims


def test_a_rule_of_ones_own_keeps_what_it_says() -> None:
    @fg.register("sign_times_dims", lean=(keep, from_sign), overwrite=True)
    def sign_times_dims(grad: Tensor, x: Tensor) -> Tensor:
        """grad·sign(x)·dims"""
        return grad * x.sign() * x.dim()

    x = images(3, 4).requires_grad_()
    (grad,) = torch.autograd.grad(
        fg.transform(nn.Sequential(nn.Tanh()), {"tanh": sign_times_dims})(x).sum(), x
    )
    assert torch.equal(grad, 2 * x.sign())
    assert sign_times_dims.info.saves == ("kept",)


@pytest.mark.parametrize(
    ("lean", "message"),
    [
        (keep, "two functions"),
        ((keep, lambda grad, x: grad), "must begin with the arguments"),
        ((lambda x, weight: (x,), from_sign), "reads 'weight'"),
        ((lambda x, *, f: (x,), from_sign), "by keyword"),
    ],
)
def test_a_lean_form_has_to_fit_the_formula(lean: Any, message: str) -> None:
    with pytest.raises(RuleError, match=message):

        @fg.register("wrongly_lean", lean=lean, overwrite=True)
        def wrongly_lean(grad: Tensor, x: Tensor) -> Tensor:
            """grad·x"""
            return grad * x


def test_native_if_needs_the_operation() -> None:
    with pytest.raises(RuleError, match=r"native_if='training'.*Add `\*, f`"):
        fg.register("wrongly_native", native_if="training", overwrite=True)(lambda grad: grad)

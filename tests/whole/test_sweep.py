"""Every model that torchvision registers, with random weights and small inputs.

Classifiers, segmentation and video models keep every invariant, in train and in eval mode; a model that cannot be
captured says where, why, and what to do.
"""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torchvision import models as vision
from torchvision.models.video import mvit

import freegrad_fx as fg
from runs import Inputs
from sweep import check_invariants, fingerprint, verified, wake

CLASSIFICATION = vision.list_models(module=vision)
SEGMENTATION = vision.list_models(module=vision.segmentation)
VIDEO = vision.list_models(module=vision.video)
DETECTION = vision.list_models(module=vision.detection)
FLOW = vision.list_models(module=vision.optical_flow)
# Integer arithmetic, made for inference: there is no backward that a rule could replace.
QUANTIZED = vision.list_models(module=vision.quantization)


def test_no_registered_model_is_left_out() -> None:
    kinds = [*CLASSIFICATION, *SEGMENTATION, *VIDEO, *DETECTION, *FLOW, *QUANTIZED]
    assert sorted(kinds) == sorted(vision.list_models())


# --- what each of them needs ---

# The smallest images that they take, where 32 × 32 pixels will not do.
SHAPES: dict[str, tuple[int, ...]] = {
    "alexnet": (2, 3, 63, 63),
    "inception_v3": (2, 3, 75, 75),
    "maxvit_t": (2, 3, 224, 224),  # its windows are 7 wide on every scale
    "s3d": (1, 3, 16, 209, 209),
    "vit_h_14": (2, 3, 28, 28),
    **dict.fromkeys(SEGMENTATION, (2, 3, 64, 64)),
    **dict.fromkeys([name for name in VIDEO if name != "s3d"], (2, 3, 4, 32, 32)),
}
TRAINING_SHAPES = {"inception_v3": (2, 3, 299, 299)}  # for its auxiliary classifier

OPTIONS: dict[str, dict[str, Any]] = {
    # the initialisation of these two takes a minute
    "googlenet": {"init_weights": False},
    "inception_v3": {"init_weights": False},
    **{name: {"image_size": 32} for name in CLASSIFICATION if name.startswith("vit")},
    "vit_h_14": {"image_size": 28},
    **{name: {"weights_backbone": None, "aux_loss": True} for name in SEGMENTATION},
    "lraspp_mobilenet_v3_large": {"weights_backbone": None},
    **{name: {"weights_backbone": None} for name in DETECTION},
}

# More than about two and a half seconds on one core.
# One of each kind, the smallest; the others are like it, and take minutes together
QUICK = {
    "lraspp_mobilenet_v3_large",
    "mnasnet0_5",
    "mobilenet_v3_small",
    "r3d_18",
    "resnet18",
    "squeezenet1_1",
    "swin_t",
}
# Gradients of 640 million parameters are several GB each: native ones alone.
HUGE = {"regnet_y_128gf", "vit_h_14"}


def smaller_mvit(**arguments: Any) -> nn.Module:
    """torchvision's builders fix the sizes at 16 images of 224 × 224 pixels."""
    return vision.video.MViT(**{**arguments, "spatial_size": (32, 32), "temporal_size": 4})


def make(name: str) -> nn.Module:
    with mock.patch.object(mvit, "MViT", smaller_mvit):
        return wake(vision.get_model(name, weights=None, **OPTIONS.get(name, {})))


def sample(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(2))


# --- the checker ---


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.act, self.head = nn.ReLU(inplace=True), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm(self.conv(x))).mean((2, 3))
        return F.silu(self.head(F.dropout(x, 0.2, self.training)))


def traced(model: nn.Module, rules: Any) -> nn.Module:
    return fx.symbolic_trace(model)


def copied(model: nn.Module, rules: Any) -> nn.Module:
    return transform(copy.deepcopy(model), rules)


def with_another_rule(model: nn.Module, rules: Any) -> nn.Module:
    return transform(model, rules if isinstance(rules, dict) else "d(Linear)")


def with_a_site_left_out(model: nn.Module, rules: Any) -> nn.Module:
    return transform(model, rules if isinstance(rules, dict) else {"relu": rules})


def with_a_native_rule_changed(model: nn.Module, rules: Any) -> nn.Module:
    return transform(model, fg.rules.scale(s=1 + 1e-6) if isinstance(rules, dict) else rules)


def with_a_mode_changed(model: nn.Module, rules: Any) -> nn.Module:
    model.norm.eval()
    return transform(model, rules)


def with_a_random_number_drawn(model: nn.Module, rules: Any) -> nn.Module:
    torch.rand(())
    return transform(model, rules)


def with_a_buffer_more(model: nn.Module, rules: Any) -> nn.Module:
    gm = transform(model, rules)
    gm.register_buffer("more", torch.zeros(()))
    return gm


def with_a_module_shared(model: nn.Module, rules: Any) -> nn.Module:
    gm = transform(model, rules)
    gm.norm = model.norm
    return gm


transform = fg.transform
BROKEN = [
    traced,
    copied,
    with_another_rule,
    with_a_site_left_out,
    with_a_native_rule_changed,
    with_a_mode_changed,
    with_a_random_number_drawn,
    with_a_buffer_more,
    with_a_module_shared,
]


@pytest.mark.sampled(4)
@pytest.mark.parametrize("broken", BROKEN, ids=lambda function: function.__name__)
def test_the_checker_notices(broken: Any) -> None:
    check_invariants(Small(), sample((2, 3, 8, 8)))
    with mock.patch.object(fg, "transform", broken), pytest.raises(AssertionError):
        check_invariants(Small(), sample((2, 3, 8, 8)))


# --- what can be captured ---


@pytest.mark.thinned(3)
@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)
        for name in (*CLASSIFICATION, *SEGMENTATION, *VIDEO)
    ],
)
def test_a_model_keeps_every_invariant(name: str) -> None:
    shape = SHAPES.get(name, (2, 3, 32, 32))
    check_invariants(
        make(name),
        sample(shape),
        training_inputs=sample(TRAINING_SHAPES.get(name, shape)),
        rule=None if name in HUGE else "rectangular",
    )


# --- what cannot, and says so ---


def capture_error(model: nn.Module, **options: Any) -> str:
    before, random_state = fingerprint(model), torch.get_rng_state()
    with pytest.raises(fg.CaptureError) as raised:
        fg.transform(model, "d(Linear)", **options)
    assert fingerprint(model) == before
    assert torch.equal(torch.get_rng_state(), random_state)
    assert "training" not in vars(nn.Module), "the capture left a patch behind"
    return str(raised.value)


# The results of all runs of these would take ten gigabytes
TOO_LARGE_TO_COMPARE = HUGE | {"vit_l_16", "vit_l_32", "convnext_large"}


@pytest.mark.thinned(4)
@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in CLASSIFICATION if n not in TOO_LARGE_TO_COMPARE])
def test_a_classifier_is_verified(name: str) -> None:
    shape = TRAINING_SHAPES.get(name, SHAPES.get(name, (2, 3, 32, 32)))
    found = verified(make(name), sample(shape))
    assert found.ok, str(found)
    assert found.checks == 8


@contextlib.contextmanager
def without_initialisation() -> Iterator[None]:
    """An error about a forward does not depend on the weights."""
    names = ["kaiming_uniform_", "kaiming_normal_", "normal_", "uniform_", "xavier_uniform_"]
    unchanged = {name: lambda tensor, *_, **__: tensor for name in names}
    with mock.patch.multiple(nn.init, **unchanged):
        yield


@pytest.mark.sampled(4)
@pytest.mark.parametrize("name", [*DETECTION, *FLOW])
def test_an_error_names_the_line_the_reason_and_the_remedy(name: str) -> None:
    with without_initialisation():
        model = make(name)
    message = capture_error(model)
    place = re.search(r"at (.+):(\d+): (.+)", message)
    assert place is not None
    file, line, code = place.groups()
    assert f"torchvision/models/{'detection' if name in DETECTION else 'optical_flow'}/" in file
    with open(file) as text:
        assert text.readlines()[int(line) - 1].strip() == code
    assert message.startswith(f"{type(model).__name__} cannot be captured: ")
    assert ("targets should not be none" if name in DETECTION else "control flow") in message
    assert "Give example_inputs=(...) to capture it by torch.export" in message


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.exhaustive if "large" in n else ()) for n in FLOW]
)
def test_optical_flow_is_captured_from_example_inputs(name: str) -> None:
    images: Inputs = (sample((2, 3, 128, 128)), sample((2, 3, 128, 128)).flip(0))
    check_invariants(make(name), images, {"example_inputs": images})


@pytest.mark.slow
def test_a_detection_model_is_refused_with_example_inputs_too() -> None:
    """It needs targets in training alone, and export captures both modes."""
    model = make("ssdlite320_mobilenet_v3_large")
    message = capture_error(model, example_inputs=([torch.rand(3, 320, 320)] * 2,))
    assert "SSD does not take the example inputs" in message
    assert "targets should not be none when in training mode" in message

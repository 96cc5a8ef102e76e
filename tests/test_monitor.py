"""`GradientMonitor`: what it records beside gradients computed by hand, and that it changes nothing."""

from __future__ import annotations

import contextlib
import importlib
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint

import freegrad_fx as fg

X = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))
RULES = {"relu": fg.compose("straight_through", fg.rules.clip_value(max_value=0.2))}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 3)
        self.drop = nn.Dropout(0.5)
        self.checkpointed = False

    def head(self, x: Tensor) -> Tensor:
        return torch.relu(self.second(x))

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(torch.relu(self.first(x)))
        return checkpoint(self.head, x, use_reentrant=False) if self.checkpointed else self.head(x)


def loss_of(model: Any, seed: int = 3) -> Tensor:
    torch.manual_seed(seed)
    return model(X).square().sum()


def by_hand() -> dict[str, Tensor]:
    """The gradients at both sites, as the rules give them to the inputs of the ReLUs."""
    net = Net()
    torch.manual_seed(3)
    a = net.first(X)
    kept = (net.drop(torch.ones(6, 8)) != 0) * 2.0
    b = net.second(a.relu() * kept)
    last = (2 * b.relu()).clamp(-0.2, 0.2)
    first = (last @ net.second.weight * kept).clamp(-0.2, 0.2)
    return {"<root>:relu[0]": first.detach(), "<root>:relu[1]": last.detach()}


def setup(way: str) -> tuple[Any, Any]:
    """A model with rules, and the call of it."""
    model = Net()
    if way == "use":
        return model, fg.use(RULES, model=model)(lambda x: model(x))
    if way == "transform":
        model = fg.transform(model, RULES)
    return model, model


@pytest.mark.parametrize("way", ["transform", "use"])
def test_sites_and_parameters_are_measured(way: str) -> None:
    model, call = setup(way)
    with fg.GradientMonitor(model) as monitor:
        for _ in range(2):  # accumulated
            loss_of(call).backward()
        monitor.step()
    found = {(r["kind"], r["name"]): r for r in monitor.records}
    for name, gradient in by_hand().items():
        record = found.pop(("site", name))
        both = torch.cat([gradient, gradient])
        assert record["norm"] == pytest.approx(both.norm().item())
        assert record["zeroed"] == pytest.approx((both == 0).double().mean().item())
        assert (record["nonfinite"], record["cosine"], record["step"]) == (0, None, 0)
    assert [*found] == [("parameter", name) for name, _ in model.named_parameters()]
    for name, parameter in model.named_parameters():
        assert found["parameter", name]["norm"] == pytest.approx(parameter.grad.norm().item())


@pytest.mark.parametrize("way", ["transform", "use", "compile", "transform, compiled", "plain"])
def test_no_gradient_changes_and_nothing_stays(way: str) -> None:
    gradients = []
    for watched in (False, True):
        counter = CompileCounter()
        model, call = setup(way)
        if way == "compile":
            model = call = fg.compile(Net(), RULES, backend=counter)
        elif way == "transform, compiled":
            model = fg.transform(Net(), RULES)
            call = torch.compile(model, backend=counter)
            model = call
        monitor = fg.GradientMonitor(model)
        loss_of(call).backward()
        if watched:
            with contextlib.suppress(KeyError), monitor:
                for _ in range(2):
                    loss_of(call).backward()
                    monitor.step(lambda call=call: loss_of(call))
                raise KeyError
        else:
            for _ in range(2):
                loss_of(call).backward()
        gradients.append([p.grad for p in model.parameters()])
        assert not model._forward_hooks
        assert not model._forward_pre_hooks
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b)
    kinds = {record["kind"] for record in monitor.records}
    assert kinds == ({"parameter", "site"} if way in ("transform", "use") else {"parameter"})
    assert ("only parameters" in str(monitor)) == ("compile" in way)


def test_the_cosine_is_that_with_the_native_gradient_of_the_same_random_numbers() -> None:
    gm = fg.transform(Net(), RULES)
    native = Net()
    loss_of(native).backward()
    torch.manual_seed(3)
    with fg.GradientMonitor(gm, cosine_every=2) as monitor:
        for _ in range(3):
            gm.zero_grad()
            torch.manual_seed(3)
            gm(X).square().sum().backward()
            before = torch.get_rng_state()
            monitor.step(lambda: gm(X).square().sum())
            assert torch.equal(torch.get_rng_state(), before)
    for record in monitor.records:
        if record["kind"] == "site" or record["step"] == 1:
            assert record["cosine"] is None
            continue
        name = record["name"]
        g, r = (m.get_parameter(name).grad.flatten() for m in (native, gm))  # type: ignore[union-attr]
        assert record["cosine"] == pytest.approx(
            torch.cosine_similarity(g, r, dim=0).item(), abs=1e-5
        )
    assert len({record["cosine"] for record in monitor.records}) > 3


def test_a_native_model_has_a_cosine_of_one() -> None:
    gm = fg.transform(Net(), {"relu": None})
    with fg.GradientMonitor(gm) as monitor:
        gm(X).sum().backward()
        monitor.step(lambda: gm(X).sum())
    assert [r["cosine"] for r in monitor.records] == pytest.approx([1.0] * 4)


def test_the_steps_of_an_optimizer_are_recorded_every_so_often() -> None:
    gm = fg.transform(Net(), RULES)
    optimizer = torch.optim.SGD(gm.parameters(), lr=0.01)
    with fg.GradientMonitor(gm, optimizer, every=3) as monitor:
        for _ in range(5):
            optimizer.zero_grad()
            loss_of(gm).backward()
            optimizer.step()
    optimizer.step()
    assert [*dict.fromkeys(r["step"] for r in monitor.records)] == [0, 3]
    columns = monitor.columns()
    assert columns["norm"] == [r["norm"] for r in monitor.records]
    assert len(monitor.records) == 2 * (4 + 2)
    lines = str(monitor).splitlines()
    assert lines[0] == "Net: gradients of 2 steps"
    assert lines[2].split() == ["kind", "name", "norm", "zeroed", "nonfinite", "cosine"]
    assert len(lines) == 4 + 6
    assert monitor._repr_html_().count("<tr>") == 7


def test_a_step_that_is_left_out_has_no_part_in_the_record_of_the_next() -> None:
    model = fg.transform(Net().eval(), RULES)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    zero_grad = optimizer.zero_grad
    with fg.GradientMonitor(model, optimizer) as monitor:
        for scale in (math.inf, 1.0, 1.0):
            optimizer.zero_grad()
            (scale * loss_of(model)).backward()
            if scale == 1.0:  # as a GradScaler does
                optimizer.step()
    assert optimizer.zero_grad == zero_grad
    first, second = ([{**r, "step": 0} for r in monitor.records if r["step"] == n] for n in (0, 1))
    assert first == second
    assert not any(record["nonfinite"] for record in first)


def test_a_monitor_without_steps_says_what_it_waits_for() -> None:
    with fg.GradientMonitor(Net()) as monitor:
        pass
    assert str(monitor).endswith(
        "of 0 steps. Give the monitor the optimizer, or call step() in each step"
    )


def test_a_checkpoint_that_runs_again_is_observed_and_another_model_is_not() -> None:
    gm = fg.transform(Net(), RULES)
    model = Net()
    model.checkpointed = True
    with fg.use(RULES, model=model), fg.GradientMonitor(model) as monitor:
        (loss_of(model) + loss_of(gm)).backward()
        monitor.step()
    sites = {r["name"]: r["norm"] for r in monitor.records if r["kind"] == "site"}
    assert sites == {n: pytest.approx(g.norm().item()) for n, g in by_hand().items()}


def test_transformed_parts_are_named_by_their_paths() -> None:
    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part = fg.transform(Net(), RULES)

        def training_step(self) -> Tensor:
            return loss_of(self.part)

    whole = Whole()
    with fg.GradientMonitor(whole) as monitor:
        whole.training_step().backward()
        monitor.step()
    sites = [r["name"] for r in monitor.records if r["kind"] == "site"]
    assert sorted(sites) == ["part.<root>:relu[0]", "part.<root>:relu[1]"]


def test_what_is_not_finite_is_counted() -> None:
    gm = fg.transform(Net(), {"relu": "straight_through"})
    with fg.GradientMonitor(gm) as monitor:
        (gm(X) * torch.tensor([math.inf, 1.0, 1.0])).sum().backward()
        monitor.step()
    last = next(r for r in monitor.records if r["name"] == "<root>:relu[1]")
    assert (last["nonfinite"], last["norm"]) == (6, math.inf)


def test_a_rule_of_operands_is_observed() -> None:
    gm = fg.transform(Net(), {"linear": "feedback_alignment"})
    x = X.clone().requires_grad_()
    with fg.GradientMonitor(gm) as monitor:
        gm(x).sum().backward()
        monitor.step()
    found = {r["name"]: r["norm"] for r in monitor.records if r["kind"] == "site"}
    assert x.grad is not None
    assert found["first:linear[0]"] == pytest.approx(x.grad.norm().item())


class Writer:
    def __init__(self, folder: str = "") -> None:
        self.folder, self.scalars, self.closed = folder, [], False  # type: ignore[var-annotated]

    def add_scalar(self, *given: Any) -> None:
        self.scalars.append(given)

    def close(self) -> None:
        self.closed = True


def test_records_are_written_as_lines_and_for_tensorboard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rules = {"relu": "straight_through"}
    gm, writer, file = fg.transform(Net(), rules), Writer(), tmp_path / "gradients.jsonl"
    for _ in range(2):
        with fg.GradientMonitor(gm, file=file, tensorboard=writer) as monitor:
            (gm(X) * math.inf).sum().backward()
            monitor.step()
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(lines) == 2 * len(monitor.records)
    assert lines[0]["norm"] is None
    assert [line["nonfinite"] for line in lines[-4:]] == monitor.columns()["nonfinite"][-4:]
    assert len(writer.scalars) == 3 * len(lines)
    assert writer.scalars[0][0] == "parameter/first.weight/norm"
    assert not writer.closed

    found: list[Writer] = []

    class Module:
        @staticmethod
        def SummaryWriter(folder: str) -> Writer:
            found.append(Writer(folder))
            return found[-1]

    monkeypatch.setattr(importlib, "import_module", lambda name: Module)
    with fg.GradientMonitor(gm, tensorboard=tmp_path):
        pass
    assert [(w.folder, w.closed) for w in found] == [(str(tmp_path), True)]


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: fg.GradientMonitor(3), TypeError, "an nn.Module"),  # type: ignore[arg-type]
        (lambda: fg.GradientMonitor(Net(), Net()), TypeError, "Optimizer"),  # type: ignore[arg-type]
        (lambda: fg.GradientMonitor(Net(), every=0), ValueError, "every has to be"),
        (lambda: fg.GradientMonitor(Net(), cosine_every=True), ValueError, "cosine_every has"),
        (lambda: fg.GradientMonitor(Net()).step(), RuntimeError, "only in its block"),
    ],
)
def test_what_makes_no_sense_is_refused(make: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        make()
    monitor = fg.GradientMonitor(Net())
    with monitor, pytest.raises(RuntimeError, match="entered already"), monitor:
        pass

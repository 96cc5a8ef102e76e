"""Tests of the parts of the examples: data sets, running of an experiment, results, and the page that shows them.

``nox -s examples`` runs the scripts themselves, with ``--quick``.
"""

import gzip
import importlib
import importlib.util
import json
from collections import Counter
from pathlib import Path
from typing import Any

import matplotlib
import pytest
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import nn

import attribution_llm
import attribution_vit
import feedback_alignment
import freegrad_fx as fg
from _data import IMAGES, Data, Source, load, load_digits, load_ones, read_idx, read_images
from _experiments import Experiment, Variant, main
from _pictures import draw_variants, relevance_colours
from _results import Results, Run, spread
from _training import Epoch, accuracy
from places import DOCS

# ---- Data ----------------------------------------------------------------------------------------


def idx(shape: tuple[int, ...], values: bytes) -> bytes:
    return bytes([0, 0, 8, len(shape)]) + b"".join(n.to_bytes(4, "big") for n in shape) + values


def test_an_idx_file_is_read_with_its_shape(tmp_path: Path) -> None:
    path = tmp_path / "images"
    path.write_bytes(idx((2, 1, 3), bytes([0, 1, 2, 253, 254, 255])))
    expected = torch.tensor([[[0, 1, 2]], [[253, 254, 255]]], dtype=torch.uint8)
    assert torch.equal(read_idx(path), expected)


def test_a_compressed_idx_file_is_read_too(tmp_path: Path) -> None:
    path = tmp_path / "labels.gz"
    path.write_bytes(gzip.compress(idx((3,), bytes([7, 0, 9]))))
    assert read_idx(path).tolist() == [7, 0, 9]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not an idx file"),
        (b"\x89PNG and more", "not an idx file"),
        (bytes([0, 0, 13, 1, 0, 0, 0, 1]), "not an idx file of unsigned bytes"),
        (idx((2, 2), bytes(3)), "holds 3 values"),
        (idx((2, 2), bytes(5)), "holds 5 values"),
    ],
    ids=["empty", "a picture", "floats", "too short", "too long"],
)
def test_another_file_is_refused_by_its_name(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "damaged"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"damaged.*{message}"):
        read_idx(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A data set in MNIST's format, with three training and two test images; one file is compressed."""
    pixels = bytes(range(3 * 28)) * 28
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx((3, 28, 28), pixels)))
    (folder / "train-labels-idx1-ubyte").write_bytes(idx((3,), bytes([4, 9, 1])))
    (folder / "t10k-images-idx3-ubyte").write_bytes(idx((2, 28, 28), bytes(2 * 28 * 28)))
    (folder / "t10k-labels-idx1-ubyte").write_bytes(idx((2,), bytes([0, 3])))
    return folder


def test_a_folder_of_idx_files_is_a_data_set(folder: Path) -> None:
    data = load(IMAGES, str(folder))
    assert data.name == str(folder)
    assert data.train_inputs.shape == (3, 1, 28, 28)
    assert data.held_out_inputs.shape == (2, 1, 28, 28)
    assert data.train_inputs[0, 0, 0].tolist() == pytest.approx([n / 255 for n in range(28)])
    assert data.train_labels.tolist() == [4, 9, 1]
    assert data.held_out_labels.tolist() == [0, 3]


def test_a_data_set_is_read_from_one_folder(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert len(read_images((tmp_path / "empty", folder), "any").train_labels) == 3
    (folder / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(FileNotFoundError, match=f"not in .*empty or {folder}"):
        read_images((tmp_path / "empty", folder), "any")


def data_of(name: str) -> Data:
    return Data(name, torch.zeros(1), torch.zeros(1), torch.zeros(1), torch.zeros(1))


def absent() -> Data:
    raise FileNotFoundError("it is not here")


def test_the_first_available_data_set_is_used_and_the_others_are_named() -> None:
    said: list[str] = []
    sources = {"far": Source(absent), "near": Source(lambda: data_of("near"))}
    assert load(sources, say=said.append).name == "near"
    assert said == ["Not far: it is not here"]


def test_a_data_set_that_was_asked_for_has_no_substitute() -> None:
    sources = {"far": Source(absent), "near": Source(lambda: data_of("near"))}
    with pytest.raises(FileNotFoundError, match="it is not here"):
        load(sources, "far")


def test_only_what_is_missing_is_downloaded_and_only_if_that_is_allowed() -> None:
    shelf: list[Data] = []

    def read() -> Data:
        return shelf[0] if shelf else absent()

    sources = {"far": Source(read, lambda: shelf.append(data_of("far")))}
    with pytest.raises(FileNotFoundError, match="none of the data sets"):
        load(sources, download=False, say=lambda text: None)
    assert load(sources).name == "far"
    assert load(sources).name == "far"
    assert len(shelf) == 1


def test_an_unknown_data_set_is_refused_with_the_valid_ones() -> None:
    with pytest.raises(
        FileNotFoundError, match=r"'minst'.*mnist, fashion-mnist, digits or a folder"
    ):
        load(IMAGES, "minst")
    with pytest.raises(FileNotFoundError, match=r"'/'; this experiment takes ones$"):
        load({"ones": Source(lambda: load_ones(4, 10))}, "/")


def test_the_digits_have_the_size_of_mnist_if_they_replace_it() -> None:
    small, large = load_digits(), load(IMAGES, "digits")
    assert large.train_inputs.shape == (len(small.train_labels), 1, 28, 28)
    assert torch.equal(large.train_labels, small.train_labels)
    assert large.train_inputs.min() >= 0
    assert large.train_inputs.max() <= 1


def test_ones_are_uniform_in_their_number_and_labelled_by_the_majority() -> None:
    data = load_ones(10, 11_000)
    assert (len(data.train_labels), len(data.held_out_labels)) == (8800, 2200)
    vectors = [*data.train_inputs.tolist(), *data.held_out_inputs.tolist()]
    labels = [*data.train_labels.tolist(), *data.held_out_labels.tolist()]
    assert labels == [float(v.count(1.0) > v.count(0.0)) for v in vectors]
    weights = Counter(v.count(1.0) for v in vectors)
    # a count is binomial, its standard deviation 30
    assert set(weights) == set(range(11))
    assert all(850 < n < 1150 for n in weights.values())
    assert all(torch.equal(a, b) for a, b in zip(data[1:], load_ones(10, 11_000)[1:], strict=True))


# ---- Running an experiment -----------------------------------------------------------------------


class TwoLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(6, 8)
        self.activation = nn.ReLU()
        self.fc2 = nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.activation(self.fc1(x)))


def bits() -> Data:
    data = load_ones(6, 100)
    return data._replace(
        train_labels=data.train_labels.long(), held_out_labels=data.held_out_labels.long()
    )


TINY = Experiment(
    name="tiny",
    title="Tiny",
    model=TwoLayers,
    variants=(Variant("own"), Variant("jammed", {"relu": fg.rules.full_jam})),
    data={"bits": Source(bits)},
    epochs=3,
    batch_size=16,
    learning_rate=0.2,
    momentum=0.5,
)


def learnt(variant: str, library: str = "freegrad_fx", seed: int = 0) -> list[tuple[float, float]]:
    """The loss and the accuracy of every epoch."""
    (chosen,) = (v for v in TINY.variants if v.name == variant)
    epochs = TINY.train(chosen, library, bits(), epochs=3, seed=seed)
    return [(epoch.loss, epoch.accuracy) for epoch in epochs]


@pytest.mark.parametrize("variant", ["own", "jammed"])
def test_a_seed_decides_a_run(variant: str) -> None:
    assert learnt(variant) == learnt(variant)
    assert learnt(variant) != learnt(variant, seed=1)


def test_variants_of_a_seed_differ_only_in_their_backward() -> None:
    one_batch = Experiment(**{**vars(TINY), "batch_size": 100})
    losses = {
        next(one_batch.train(v, "freegrad_fx", bits(), epochs=1, seed=0)).loss
        for v in one_batch.variants
    }
    assert len(losses) == 1  # the loss of the only batch, before the first step
    assert learnt("own") != learnt("jammed")


def test_training_equals_a_loop_written_by_hand() -> None:
    data = bits()
    torch.manual_seed(0)
    model = TwoLayers()
    velocity = [torch.zeros_like(p) for p in model.parameters()]
    order = torch.Generator().manual_seed(0)
    curve = []
    for _ in range(3):
        losses = []
        for batch in torch.randperm(80, generator=order).split(16):
            loss = F.cross_entropy(model(data.train_inputs[batch]), data.train_labels[batch])
            grads = torch.autograd.grad(loss, list(model.parameters()))
            with torch.no_grad():
                for p, v, grad in zip(model.parameters(), velocity, grads, strict=True):
                    v.mul_(0.5).add_(grad)
                    p.sub_(0.2 * v)
            losses.append(loss.item())
        right = (model(data.held_out_inputs).argmax(dim=1) == data.held_out_labels).sum().item()
        curve.append((sum(losses) / len(losses), right / 20))
    torch.testing.assert_close(torch.tensor(learnt("own")), torch.tensor(curve))


def test_a_probability_of_one_half_is_a_yes() -> None:
    half = nn.Linear(1, 1, bias=False)
    nn.init.ones_(half.weight)
    unit = nn.Sequential(half, nn.Flatten(start_dim=0))
    inputs = torch.tensor([[0.4], [0.5], [0.6]])
    assert accuracy(unit, inputs, torch.tensor([0.0, 1.0, 1.0])) == 1


@pytest.mark.parametrize("variant", ["own", "jammed"])
def test_the_other_package_learns_the_same(variant: str) -> None:
    assert learnt(variant, "freegrad") == learnt(variant)


def command(tmp_path: Path, *options: str) -> Results:
    return main(TINY, ["--epochs", "2", "--out", str(tmp_path), *options])


def test_an_option_trains_in_blocks(tmp_path: Path) -> None:
    options = ["--seeds", "1"]
    transformed, in_blocks = command(tmp_path, *options), command(tmp_path, *options, "--block")
    assert (transformed.about["block"], in_blocks.about["block"]) == (False, True)
    assert [row[:-1] for row in in_blocks.rows()] == [row[:-1] for row in transformed.rows()]


def not_a_number(word: str) -> float:
    raise ValueError(f"JSON has no {word}")


def test_results_are_json_and_are_read_as_they_were(tmp_path: Path) -> None:
    results = command(tmp_path, "--seeds", "2", "--compare", "freegrad")
    path = tmp_path / "tiny-ones-d-6.json"
    content = json.loads(path.read_text("utf-8"), parse_constant=not_a_number)
    assert content["about"]["batch_size"] == 16
    assert [(run["variant"], run["library"], run["seed"]) for run in content["runs"]] == [
        (variant, library, seed)
        for seed in (0, 1)
        for variant in ("own", "jammed")
        for library in ("freegrad_fx", "freegrad")
    ]
    assert all(len(run["loss"]) == 2 for run in content["runs"])
    assert Results.read(path).rows() == results.rows()
    assert results.difference() == 0
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_a_loss_that_is_no_number_is_null(tmp_path: Path) -> None:
    run = Run(
        "any", "freegrad_fx", 0, [Epoch(float("nan"), 0.5, 1.0), Epoch(float("inf"), 0.5, 1.0)]
    )
    Results({}, [run]).write(tmp_path / "r.json")
    content = json.loads((tmp_path / "r.json").read_text("utf-8"), parse_constant=not_a_number)
    assert content["runs"][0]["loss"] == [None, None]
    assert Results.read(tmp_path / "r.json").runs[0].epochs[0].accuracy == 0.5


def test_resuming_keeps_the_runs_that_are_done(tmp_path: Path) -> None:
    before = command(tmp_path, "--seeds", "1")
    after = command(tmp_path, "--seeds", "2", "--resume")
    assert [run.seed for run in after.runs] == [0, 0, 1, 1]
    # includes the time, which differs between runs
    assert [run.to_dict() for run in after.runs[:2]] == [run.to_dict() for run in before.runs]
    fresh = command(tmp_path, "--seeds", "2")
    assert [r[:4] for r in fresh.rows()] == [r[:4] for r in after.rows()]


def test_resuming_another_experiment_is_refused(tmp_path: Path) -> None:
    command(tmp_path, "--seeds", "1")
    with pytest.raises(SystemExit, match="another epochs: leave out --resume"):
        main(TINY, ["--epochs", "3", "--out", str(tmp_path), "--resume"])


def test_a_missing_peer_is_reported_with_the_remedy(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        main(TINY, ["--compare", "freegrad"])
    assert "not installed; python -m pip install freegrad==1.0.1" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--seeds", "--epochs"])
def test_zero_epochs_or_seeds_are_refused(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(TINY, [option, "0"])
    assert "at least 1, not 0" in capsys.readouterr().err


# ---- Tables --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "shown"),
    [([2.0], "2.00"), ([1.0, 2.0, 3.0, 4.0], "2.50 ± 1.29"), ([5.0, 5.0], "5.00 ± 0.00")],
)
def test_a_spread_is_the_mean_and_the_deviation_of_a_sample(
    values: list[float], shown: str
) -> None:
    assert spread(values, ".2f") == shown


def test_the_table_shows_the_last_epoch_and_the_median_time() -> None:
    def run(seed: int, accuracies: tuple[float, float], seconds: tuple[float, float]) -> Run:
        losses = (1.0, 0.5 + seed)
        epochs = [Epoch(*e) for e in zip(losses, accuracies, seconds, strict=True)]
        return Run("step / 1", "freegrad_fx", seed, epochs)

    results = Results({}, [run(1, (0.1, 0.8), (3.0, 5.0)), run(0, (0.2, 0.6), (4.0, 90.0))])
    assert results.rows() == [
        ("step / 1", "freegrad_fx", "2", "70.00 ± 14.14", "1.0000 ± 0.7071", "4.5")
    ]


# ---- The five experiments ------------------------------------------------------------------------

# Batch size, learning rate, momentum, epochs, inputs, number of sites that get a rule.
EXPERIMENTS: dict[str, tuple[Any, ...]] = {
    "suc_logistic_vs_constant": (32, 0.1, 0, 30, (10,), 1),
    "mlp_digits_constant_vs_tied": (64, 0.05, 0, 100, (1, 8, 8), 1),
    "lenet_mnist_rectangular": (256, 0.01, 0.9, 30, (1, 28, 28), 4),
    "cnn_gradient_jamming": (64, 0.01, 0, 20, (1, 28, 28), 4),
    "bnn_step_activation": (64, 0.1, 0, 20, (64,), 1),
}


@pytest.fixture(params=EXPERIMENTS)
def experiment(request: pytest.FixtureRequest) -> Experiment:
    return importlib.import_module(request.param).EXPERIMENT


def test_the_settings_are_those_of_the_paper(experiment: Experiment) -> None:
    batch_size, learning_rate, momentum, epochs, *_ = EXPERIMENTS[experiment.name]
    assert experiment.batch_size == batch_size
    assert experiment.learning_rate == learning_rate
    assert experiment.momentum == momentum
    assert experiment.epochs == epochs


def test_a_table_of_rules_reaches_every_activation_and_leaves_the_forward(
    experiment: Experiment,
) -> None:
    *_, shape, sites = EXPERIMENTS[experiment.name]
    x = torch.rand(5, *shape)
    for variant in experiment.variants:
        original = experiment.model()
        assert not any("freegrad" in type(module).__module__ for module in original.modules())
        model = variant.model(original, "freegrad_fx")
        if not variant.rules:
            assert model is original
            continue
        decisions = fg.report(model).decisions
        assert [d.action for d in decisions] == ["rewrite"] * sites
        fires = any(rule.forward for rule in variant.rules.values())
        assert torch.equal(model(x), original(x) > 0.5 if fires else original(x))


def test_an_epoch_of_every_experiment_is_the_same_with_either_package(
    experiment: Experiment,
) -> None:
    source = list(experiment.data.values())[-1]  # the one that every machine has
    data = source.read().shortened(2 * experiment.batch_size, 50)
    for variant in experiment.variants:
        ours, theirs = (
            next(experiment.train(variant, library, data, epochs=1, seed=3))
            for library in ("freegrad_fx", "freegrad")
        )
        assert (ours.loss, ours.accuracy) == (theirs.loss, theirs.accuracy)


def test_a_block_around_the_plain_model_gives_the_gradients_of_the_transform(
    experiment: Experiment,
) -> None:
    data = next(reversed(experiment.data.values())).read().shortened(experiment.batch_size, 50)
    for variant in experiment.variants:
        found: list[list[torch.Tensor]] = []
        for block in (False, True):
            torch.manual_seed(3)
            model = variant.model(experiment.model(), "freegrad_fx", block=block)
            torch.manual_seed(3)  # some rules draw random numbers
            loss = experiment.loss(model(data.train_inputs), data.train_labels)
            grads = torch.autograd.grad(loss, list(model.parameters()))
            found.append([loss.detach(), *grads])
        assert all(map(torch.equal, *found))
        if variant.rules:
            report = fg.report(model.block)
            *_, sites = EXPERIMENTS[experiment.name]
            assert len(report.with_action("rewrite")) == sites


def test_an_epoch_of_every_experiment_is_the_same_in_blocks(experiment: Experiment) -> None:
    source = list(experiment.data.values())[-1]
    data = source.read().shortened(2 * experiment.batch_size, 50)
    for variant in experiment.variants:
        transformed, in_blocks = (
            next(experiment.train(variant, "freegrad_fx", data, epochs=1, seed=3, block=block))
            for block in (False, True)
        )
        assert transformed[:2] == in_blocks[:2]


# ---- Attribution and feedback alignment ----------------------------------------------------------


def test_a_square_is_labelled_by_how_much_of_it_the_object_covers() -> None:
    photos = attribution_vit.photographs()
    images, classes = attribution_vit.draw_squares(photos, 8, seed=0)
    assert images.shape == (8, 3, attribution_vit.SIZE, attribution_vit.SIZE)
    assert set(classes[::2].tolist()) <= {attribution_vit.PAGODA, attribution_vit.NEITHER}
    assert set(classes[1::2].tolist()) <= {attribution_vit.FLOWER, attribution_vit.NEITHER}
    flower = photos[attribution_vit.FLOWER]
    (top, bottom), (left, right) = flower.rows, flower.columns
    assert flower.share(top, left, 10) == 1
    assert flower.share(top, left - 5, 10) == 0.5
    assert flower.share(bottom, right, 10) == 0


@pytest.mark.slow
def test_the_tokens_of_a_llama_share_its_score() -> None:
    sequences = attribution_llm.draw_sequences(3, torch.Generator().manual_seed(0))
    each = torch.arange(3)
    assert (sequences.tokens[each, sequences.places - 1] == attribution_llm.MARK).all()
    assert torch.equal(sequences.tokens[each, sequences.places], sequences.answers)
    llama, gpt2 = attribution_llm.subjects()
    for subject in (llama, gpt2):
        scores = attribution_llm.answers_of(subject.model.eval(), sequences)
        scores = scores.gather(1, sequences.answers[:, None])[:, 0]
        found = attribution_llm.relevances(subject, sequences)
        assert torch.allclose(found["cp_lrp"].sum(1), scores, atol=1e-5) == (subject is llama)


def test_feedback_aligns() -> None:
    everyone = feedback_alignment.contestants()
    feedback_alignment.train_all(everyone, epochs=3, seeds=1)
    backprop, fixed, signs, learnt = (one.angle[0] for one in everyone)
    assert backprop == [0, 0, 0]
    assert signs[-1] < fixed[-1] < 80
    assert learnt[-1] < learnt[0] < 90
    assert all(one.accuracy[0][-1] > 60 for one in everyone)


def test_a_picture_has_two_variants(tmp_path: Path) -> None:
    colours = []

    def draw(variant: str) -> Figure:
        colours.append((matplotlib.rcParams["text.color"], relevance_colours(variant)(0.5)[:3]))
        return Figure()

    paths = draw_variants(draw, tmp_path / "any")
    assert [path.name for path in paths] == ["any-light.png", "any-dark.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)
    assert [text for text, _ in colours] == ["black", "white"]
    assert sum(colours[0][1]) > 2.9 > 0.4 > sum(colours[1][1])


# ---- The page that shows the full runs -----------------------------------------------------------

FULL_RUNS = sorted((DOCS / "_static" / "experiments").glob("*.json"))
COMPARED = sorted((DOCS / "_static" / "experiments").rglob("*.json"))


@pytest.mark.parametrize("path", FULL_RUNS, ids=lambda path: path.stem)
def test_the_page_shows_the_results_of_the_full_runs(path: Path) -> None:
    page = (DOCS / "experiments.md").read_text("utf-8")
    results = Results.read(path)
    for variant, library, seeds, reached, loss, _ in results.rows():
        if library == "freegrad_fx":
            assert int(seeds) >= 5
            assert f"| {variant} | {seeds} | {reached} | {loss} |" in page
    assert f"_static/experiments/{path.stem}.png" in page


@pytest.mark.parametrize("path", COMPARED, ids=lambda path: path.stem)
def test_the_page_shows_the_times_of_both_packages(path: Path) -> None:
    page = (DOCS / "experiments.md").read_text("utf-8")
    results = Results.read(path)
    seconds = {row[:2]: row[-1] for row in results.rows()}
    for variant, library in seconds:
        if library == "freegrad":
            both = f"{seconds[variant, 'freegrad_fx']} | {seconds[variant, 'freegrad']}"
            assert f"| {variant} | {both} |" in page
            assert results.difference() == 0


def test_there_is_a_full_run_of_every_experiment() -> None:
    assert {Results.read(path).about["experiment"] for path in FULL_RUNS} == set(EXPERIMENTS)

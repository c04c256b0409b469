"""The doctor: each rule on symptoms with a known answer, and whole runs from the command line.

What provoked illnesses of real runs look like is measured by benchmarks/doctor.py; its confusion matrix is in the docs.
"""

import copy
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from vaelab import diagnose as doctor
from vaelab import objectives, specs
from vaelab.cli import main
from vaelab.config import override
from vaelab.diagnose import Symptoms, diagnose
from vaelab.recipes import recipe
from vaelab.training.trainer import build_model


def epochs(losses, beta=1.0):
    """A history with these losses, in training as in validation."""
    return [{"epoch": i, "loss": loss, "validation_loss": loss, "beta": beta} for i, loss in enumerate(losses, 1)]


def of_rates(rate):
    return {"rate": rate, "total_rate": float(rate.sum())}


RNG = np.random.default_rng(0)
HEALTHY = Symptoms(
    beta=1.0,
    history=epochs([150, 120, 110, 106, 104, 103, 102.5, 102.2, 102.0, 101.9]),
    pixels=(0.13, 0.31, 0.0, 1.0),
    middle=0.12,
    binary=False,
    support="binary",
    train_size=55_000,
    train=RNG.normal(100, 20, 2000),
    validation=RNG.normal(102, 20, 2000),
    **of_rates(np.linspace(0.3, 2.5, 20)),
    two_sample=0.56,
)


def names(symptoms, kind="illness"):
    return [finding.name for finding in diagnose(symptoms) if finding.kind == kind]


def test_the_healthy_are_told_nothing():
    assert diagnose(HEALTHY) == []


ILL = {
    "posterior collapse": of_rates(np.full(20, 1e-3)),
    "collapsed dimensions": {**of_rates(np.where(np.arange(20) < 6, 1.0, 0.0)), "beta": 4.0, "history": epochs([100.0] * 10, 4.0)},
    "hole between codes and prior": {"two_sample": 0.93, "beta": 0.05},
    "over-fitting": {"train": RNG.normal(80, 5, 2000), "annealed_train": RNG.normal(75, 5, 100),
                     "annealed_validation": RNG.normal(95, 5, 100)},
    "over-fitting of the encoder": {"train": RNG.normal(80, 5, 2000), "annealed_train": RNG.normal(95, 5, 100),
                                    "annealed_validation": RNG.normal(97, 5, 100)},
    "under-training": {"history": epochs([200, 170, 150])},
    "wrong data range": {"pixels": (0.0005, 0.001, 0.0, 0.0039)},
    "likelihood does not fit": {"middle": 0.8},
    "latent too small": of_rates(np.array([3.2, 3.4])),
    "exploding gradient": {"history": epochs([150, 120, 110, 4000, 130, 112, 105, 104, 103.5, 103.4])},
    "ended in NaN": {"failure": {"step": 612, "term": "rate", "checkpoint_step": 400, "message": ""}},
}  # fmt: skip


@pytest.mark.parametrize("illness", ILL)
def test_each_illness_is_named_and_no_other(illness):
    found = diagnose(replace(HEALTHY, **ILL[illness]))
    assert [finding.name for finding in found] == [illness]
    assert found[0].remedy
    assert any(character.isdigit() for character in found[0].evidence) or illness == "likelihood does not fit"


def test_over_fitting_hides_no_latent_that_is_too_small():
    both = ILL["over-fitting"] | ILL["latent too small"]
    assert names(replace(HEALTHY, **both)) == ["over-fitting", "latent too small"]


def test_a_model_whose_dimensions_have_no_rates_can_be_ill_too():
    """Under a VampPrior, of a flow: what needs the rate of all dimensions alone is looked at, and nothing else."""
    lone = replace(HEALTHY, rate=None)
    assert names(lone) == []
    assert names(replace(lone, total_rate=0.02)) == ["posterior collapse"]
    for illness in ("over-fitting", "over-fitting of the encoder"):
        assert names(replace(lone, **ILL[illness])) == [illness]


def test_a_density_on_binary_pixels_does_not_fit():
    assert names(replace(HEALTHY, support="real", binary=True)) == ["likelihood does not fit"]
    assert names(replace(HEALTHY, support="real", binary=False, middle=0.9)) == []


def test_surplus_dimensions_are_a_note_and_say_what_is_enough():
    found = diagnose(replace(HEALTHY, **of_rates(np.where(np.arange(20) < 8, 2.0, 0.01))))
    assert [(finding.name, finding.kind) for finding in found] == [("latent too large", "note")]
    assert "8 of 20" in found[0].evidence
    assert "--latent-dim 10" in found[0].remedy


def test_an_autoencoder_is_told_to_fit_a_prior_and_of_no_hole():
    lost = replace(HEALTHY, rate=None, total_rate=None, two_sample=0.97, beta=0.0, can_weigh=False)
    (found,) = diagnose(replace(lost, prior_held=False))
    assert (found.name, found.kind) == ("no prior yet", "note")
    assert "refit" in found.remedy
    (found,) = diagnose(lost)
    assert found.name == "hole between codes and prior"
    assert "--beta" not in found.remedy, "the objective has no such setting"


def test_annealing_is_advised_where_the_objective_has_it(digits):
    collapsed = replace(HEALTHY, **ILL["posterior collapse"])
    assert "--kl-warmup-epochs" in diagnose(collapsed)[0].remedy
    assert diagnose(replace(collapsed, can_anneal=False))[0].remedy.endswith("--objective elbo can anneal it")
    for rule, can in ((objectives.ELBO(), True), (objectives.IWAE(), False), (objectives.BetaTC(), False)):
        assert doctor.examine(replace(recipe("mlp"), objective=rule), None, digits, []).can_anneal is can


@pytest.mark.parametrize(
    ("changes", "held"), [({}, False), ({"prior": specs.Mixture(3)}, True), ({"objective": objectives.AAE()}, True)]
)
def test_what_holds_a_prior_is_read_from_the_run(changes, held, digits):
    assert doctor.examine(replace(recipe("ae-2d"), **changes), None, digits, []).prior_held is held


def test_a_loss_that_need_not_fall_from_the_first_epoch_is_no_explosion(digits):
    rising = replace(HEALTHY, **ILL["exploding gradient"])
    assert "exploding gradient" in names(rising)
    assert "exploding gradient" not in names(replace(rising, descends=False))
    for rule, falls in ((objectives.MCEM(), False), (objectives.WakeSleep(), True)):
        assert doctor.examine(replace(recipe("mlp"), objective=rule), None, digits, []).descends is falls


def test_pixels_are_summed_up_piece_by_piece(digits):
    found = doctor.examine(recipe("mlp"), None, digits, [], images=1200)
    x = digits.train.rows(slice(1200)).x.double()
    assert found.pixels == pytest.approx([float(of_all) for of_all in (x.mean(), x.std(), x.min(), x.max())])
    assert found.middle == pytest.approx(float(((x > 0.1) & (x < 0.9)).double().mean()))


def test_nan_says_step_term_and_last_good_checkpoint():
    evidence = diagnose(replace(HEALTHY, **ILL["ended in NaN"]))[0].evidence
    for word in ("rate", "step 612", "step 400"):
        assert word in evidence
    never = {"step": 3, "term": "loss", "checkpoint_step": None, "message": ""}
    assert "no checkpoint" in diagnose(replace(HEALTHY, failure=never))[0].evidence


def test_a_rising_kl_weight_is_no_explosion():
    rising = [{**record, "beta": min(1.0, i / 5)} for i, record in enumerate(epochs([60, 80, 95, 110, 118, 120]), 1)]
    steady = epochs([119.0, 118.5, 118.2, 118.1, 118.0, 118.0, 118.0, 118.0])
    assert names(replace(HEALTHY, history=[*rising, *steady])) == []


def test_noise_is_no_over_fitting():
    gap = 30.0  # above half the rate of 28 nats
    few, many = ({"train": np.tile([30.0, 150.0], n), "validation": np.tile([30.0, 150.0], n) + gap} for n in (6, 600))
    assert names(replace(HEALTHY, **few)) == []
    assert names(replace(HEALTHY, **many)) == ["over-fitting"]


def test_losses_that_pass_through_zero_raise_no_alarm():
    density = epochs([100, 20, 3, 0.5, -0.4, -1.0, -1.2, -1.3, -1.35, -1.36])
    assert names(replace(HEALTHY, history=density, support="real")) == []


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("doctor") / "run"
    assert main(["train", "mlp", "--data", "digits", "--epochs", "2", "--threads", "1", "--out", str(out)]) == 0
    return out


def test_the_command_names_what_is_wrong_with_a_run(run, capsys):
    before = {path.name: path.read_bytes() for path in run.rglob("*.*") if path.is_file()}
    assert main(["doctor", str(run)]) == 0
    out = capsys.readouterr().out
    assert "under-training (illness)" in out
    assert "next:" in out
    assert main(["doctor", str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["name"] == "under-training"
    assert {path.name: path.read_bytes() for path in run.rglob("*.*") if path.is_file()} == before, (
        "looking changes nothing"
    )


def test_missing_weights_are_no_sign_of_health(run, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "best_model.pth").unlink()
    assert main(["doctor", str(tmp_path / "run")]) == 1
    shown = capsys.readouterr()
    assert "best_model.pth" in shown.err
    assert "healthy" not in shown.out


def test_a_run_that_died_before_it_saved_anything(tmp_path, capsys):
    out = str(tmp_path / "run")
    flags = ["--data", "digits", "--epochs", "2", "--lr", "1e6", "--threads", "1"]
    assert main(["train", "mlp", *flags, "--out", out]) == 1
    capsys.readouterr()
    assert main(["doctor", out]) == 0
    found = capsys.readouterr().out
    assert "ended in NaN (illness)" in found
    assert "no checkpoint was saved" in found


def test_only_training_and_validation_images_are_looked_at(run, monkeypatch):
    from vaelab.data.datasets import Dataset

    seen = set()
    original = Dataset.scored
    monkeypatch.setattr(Dataset, "scored", lambda self, name, rows: (seen.add(name), original(self, name, rows))[1])
    assert main(["doctor", str(run)]) == 0
    assert seen == {"train", "validation"}


def test_where_the_bounds_differ_both_sides_are_annealed(digits, monkeypatch):
    """On the first images of those whose -ELBOs were compared, as many of each side."""
    from vaelab.config import override
    from vaelab.recipes import recipe
    from vaelab.train import fit

    run = override(recipe("mlp"), epochs=2)
    model = fit(run, digits)
    monkeypatch.setattr(doctor, "GAP", -1.0)
    monkeypatch.setattr(doctor, "ANNEALED_IMAGES", 3)
    symptoms = doctor.examine(run, model, digits, [], images=60)
    assert len(symptoms.annealed_train) == len(symptoms.annealed_validation) == 3
    assert (symptoms.annealed_validation < symptoms.validation[:3]).all(), "annealing is the tighter bound"
    assert torch.is_grad_enabled()


@pytest.mark.parametrize(
    ("parts", "annealed"),
    [({"prior": "vamp", "num_components": 5}, True), ({"posterior": "full-normal"}, True),
     ({"posterior": "planar"}, False), ({"posterior": "vmf", "prior": "uniform-sphere"}, False),
     ({"posterior": "gumbel-softmax", "prior": "uniform-categories"}, False)],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else "",
)  # fmt: skip
def test_every_rate_is_examined_and_what_can_be_annealed_is(parts, annealed, digits, monkeypatch):
    from vaelab.config import override
    from vaelab.recipes import recipe

    monkeypatch.setattr(doctor, "GAP", -10.0)
    monkeypatch.setattr(doctor, "ANNEALED_IMAGES", 2)
    run = override(recipe("mlp"), **parts)
    symptoms = doctor.examine(run, build_model(run, digits.shape), digits, [], images=20)
    assert symptoms.rate is None
    assert symptoms.total_rate > 0
    assert doctor._gap(symptoms) is not None
    assert (symptoms.annealed_train is not None) == annealed


def test_a_model_in_training_is_examined_as_in_evaluation(digits):
    run = override(recipe("conv-beta"), data="digits", compile="off")
    model = build_model(run, digits.shape)
    buffers = copy.deepcopy(dict(model.named_buffers()))
    found = [doctor.examine(run, model.train(mode), digits, [], images=40) for mode in (False, True)]
    np.testing.assert_array_equal(found[0].validation, found[1].validation)
    np.testing.assert_array_equal(found[0].train, found[1].train)
    assert model.training
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers())


def test_a_run_that_ended_before_its_annealing_is_not_called_healthy():
    history = [{"epoch": i, "beta": 0.1 * i, "validation_loss": 500.0 - i} for i in (1, 2)]
    found = doctor._undertrained(replace(HEALTHY, beta=1.0, history=history))
    assert found.name == "under-training"
    assert found.evidence == "beta had reached 0.2 of 1 when the training ended"
    assert doctor._undertrained(replace(HEALTHY, history=[])) is None

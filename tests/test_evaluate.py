"""An estimate is a mean with its standard error and protocol; the terms add up."""

import numpy as np
import pytest
import torch

from oracle import SHAPE, linear_vae, sample_images
from vaelab import evaluate as measure
from vaelab.config import override
from vaelab.data.datasets import Dataset, Split
from vaelab.objectives import elbo_terms
from vaelab.recipes import recipe
from vaelab.train import fit


def test_the_standard_error_covers_the_mean_as_often_as_it_should():
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(1000):
        estimate = measure.Estimate.of(rng.gamma(2.0, 3.0, 200), "nats", "")
        inside += abs(estimate.value - 6.0) < 1.96 * estimate.stderr
    assert 0.92 < inside / 1000 < 0.97


def test_the_elbo_of_an_exact_posterior_is_the_exact_likelihood():
    from oracle import exact_log_px

    model = linear_vae(3)
    x = sample_images(model, 400)
    part = Split(x, None, torch.arange(400))
    data = Dataset("pPCA", "grey", part, part, part, binary=False, classes=None)
    assert data.shape == SHAPE
    result = measure.evaluate(model, recipe("mlp"), data, num_samples=8)
    exact = -exact_log_px(model, x)
    assert result["negative_elbo"].value == pytest.approx(float(exact.mean()), abs=0.02)
    assert result["negative_elbo"].stderr == pytest.approx(float(exact.std() / 20), rel=0.05)
    assert "objective" not in result
    assert "not a likelihood" not in result["distortion"].protocol


def test_terms_add_up_and_the_weighted_objective_is_shown_where_beta_is_not_one(digits):
    run = override(recipe("mlp"), beta=0.5, epochs=2)
    model = fit(run, digits)
    result = measure.evaluate(model, run, digits)
    d, r = result["distortion"].value, result["rate"].value
    assert result["negative_elbo"].value == pytest.approx(d + r)
    assert result["objective"].value == pytest.approx(d + 0.5 * r)
    assert all(e.n == 180 and e.unit == "nats" and e.stderr > 0 for e in result.values())
    assert "digits test, grey pixels, 1 posterior sample, cross-entropy: not a likelihood" in str(result["rate"])
    again = measure.evaluate(model, run, digits)
    assert again == result, "evaluation noise is fixed"
    train = measure.evaluate(model, run, digits, "train")
    assert train["rate"].n == 1437


def test_dropout_is_off_and_the_mode_is_restored(digits):
    run = override(recipe("conv-beta"), epochs=1, dropout=0.5)
    model = fit(run, digits).train()
    first = measure.evaluate(model, run, digits)
    assert model.training
    assert first == measure.evaluate(model, run, digits)


def test_under_dynamic_binarization_every_split_is_scored_binary(monkeypatch):
    from vaelab.data import load
    from vaelab.models import VAE

    data = load("digits", protocol="dynamic")
    run = override(recipe("mlp"), protocol="dynamic", epochs=1)
    model = fit(run, data)
    seen = []
    original = VAE.draw
    monkeypatch.setattr(VAE, "draw", lambda self, x, *a, **k: (seen.append(x), original(self, x, *a, **k))[1])
    for split in ("train", "validation", "test"):
        result = measure.evaluate(model, run, data, split)
        assert "not a likelihood" not in result["distortion"].protocol
    assert all(set(x.unique().tolist()) <= {0.0, 1.0} for x in seen)


def test_many_samples_are_cut_into_batches_that_change_nothing(digits):
    run = override(recipe("mlp"), epochs=1)
    model = fit(run, digits)
    many = measure.evaluate(model, run, digits, num_samples=400)
    assert many["distortion"].value == pytest.approx(
        float(np.mean(elbo_terms(model, digits.batches("test", 90), 400)[0])), abs=1e-3
    )


def test_the_floor_of_grey_cross_entropy():
    x = torch.tensor([0.0, 1.0, 0.5, 0.25]).reshape(1, 1, 2, 2)
    split = Split(x, None, torch.arange(1))
    expected = np.log(2) - 0.25 * np.log(0.25) - 0.75 * np.log(0.75)
    assert measure.grey_floor(split) == pytest.approx(expected)

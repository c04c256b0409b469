"""The likelihood from posterior samples: against exact ones, and where the posterior is no normal against others."""

import dataclasses

import pytest
import torch

from oracle import bend, dataset, exact_log_px, linear_vae, sample_images
from vaelab import evaluate, specs
from vaelab.errors import FailureError, UsageError
from vaelab.evaluate import reciprocal
from vaelab.models import VAE

COUNT = 150


def values(model, x):
    """log p(x) of each image, as estimated."""
    return reciprocal._log_px(model, x, 50, 4, reciprocal.RowNoise(0, 0))[0].double()


@pytest.mark.parametrize("latent_dim", [1, 2, 4])
def test_the_estimate_is_right_per_example_wherever_the_chains_begin(latent_dim):
    exact = linear_vae(latent_dim)
    x = sample_images(exact, COUNT)
    for model in (exact, bend(linear_vae(latent_dim), 0.5, 0.5)):
        error = values(model, x) - exact_log_px(exact, x)
        assert error.abs().median() < 0.2
        assert -0.03 < error.mean() < 0.1, "of 1/p(x) the mean is right: of log p(x) it errs upwards"


def test_the_mean_of_the_ratio_is_one_over_the_likelihood():
    exact = linear_vae(2)
    x = sample_images(exact, 1000)
    ratio = (exact_log_px(exact, x) - values(exact, x)).exp()
    assert abs(ratio.mean() - 1) < 4 * ratio.std() / len(x) ** 0.5 + 0.01


@pytest.mark.parametrize("mistake", ["wide density", "chains that stand still"])
def test_that_comparison_notices(mistake, monkeypatch):
    exact = linear_vae(2)
    x = sample_images(exact, COUNT)
    if mistake == "wide density":
        normal = reciprocal.MultivariateNormal
        monkeypatch.setattr(reciprocal, "MultivariateNormal",
                            lambda loc, covariance, **options: normal(loc, 4 * covariance, **options))  # fmt: skip
    else:
        monkeypatch.setattr(reciprocal, "hamiltonian", lambda joint, z, *_: (z, torch.ones(len(z))))
    error = values(exact, x) - exact_log_px(linear_vae(2), x)
    assert not error.abs().median() < 0.15


def test_of_a_bent_posterior_it_agrees_with_importance_sampling():
    torch.manual_seed(3)
    model = VAE(specs.MLPEncoder((16,)), specs.DiagonalNormal(2), specs.StandardNormal(), specs.MLPDecoder((16,), "tanh"),
                specs.Bernoulli(), (1, 8, 8)).eval()  # fmt: skip
    with torch.no_grad():
        model.decoder.layers[0].weight.mul_(2)
        model.decoder.layers[2].weight.mul_(4)
        x = model.likelihood(model.prior().sample((200,))).sample()
    data = dataclasses.replace(dataset(x), binary=True)
    found = evaluate.reciprocal_nll(model, data, num_samples=100)["nll_reciprocal"]
    other = evaluate.nll(model, data, num_samples=10_000)["nll_10000"]
    assert found.value == pytest.approx(other.value, abs=0.1)
    assert "reciprocal of 100 posterior samples by HMC" in found.protocol


def test_noise_belongs_to_the_rows_and_a_part_is_a_part(monkeypatch):
    model = linear_vae(2)
    data = dataset(sample_images(model, 600))
    whole, part = (evaluate.reciprocal_nll(model, data, rows=rows) for rows in (None, 500))
    assert part["nll_reciprocal"].n == 500
    assert whole["nll_reciprocal"].n == 600
    assert 0.5 < whole["acceptance"].value < 0.8
    monkeypatch.setattr(reciprocal, "_IMAGES", 256)  # noise is drawn for blocks of so many rows
    again = evaluate.reciprocal_nll(model, data, rows=500)
    assert again["nll_reciprocal"].value == pytest.approx(part["nll_reciprocal"].value, abs=1e-4)
    assert again["acceptance"].value == pytest.approx(part["acceptance"].value, abs=1e-4)


def test_too_few_samples_for_a_density_and_other_spaces_are_refused():
    model = linear_vae(6)
    data = dataset(sample_images(model, 20))
    with pytest.raises(UsageError, match=r"50 samples of 6 dimensions: .* evaluate.nll needs none"):
        evaluate.reciprocal_nll(model, data)
    with pytest.raises(UsageError, match="num_leapfrog 0: must be at least 1"):
        evaluate.reciprocal_nll(model, data, num_samples=60, num_leapfrog=0)
    parts = specs.MLPEncoder((16,)), specs.VonMisesFisher(3), specs.UniformSphere(), specs.MLPDecoder((16,))
    with pytest.raises(UsageError, match="these latents lie in the unit sphere"):
        evaluate.reciprocal_nll(VAE(*parts, specs.Gaussian(), (1, 8, 8)), data)


def test_an_estimate_that_is_not_finite_names_its_image(monkeypatch):
    model = linear_vae(2)
    data = dataset(sample_images(model, 20))
    plain = VAE.log_px

    def log_px(self, x, z, y=None):
        scores = plain(self, x, z, y)
        return torch.where(torch.arange(20) == 7, torch.nan, scores)

    monkeypatch.setattr(VAE, "log_px", log_px)
    with pytest.raises(FailureError, match=r"the estimate of log p\(x\) of image 7 of the test split is not finite"):
        evaluate.reciprocal_nll(model, data)

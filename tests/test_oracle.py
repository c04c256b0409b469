"""Bounds against a model whose log-likelihood is known exactly, and proof that these tests would notice an error."""

import pytest
import torch
from torch.distributions import Independent, Normal, kl_divergence

from oracle import bend, exact_log_px, linear_vae, sample_images
from vaelab.divergences import analytic_kl, log_mean_exp
from vaelab.models import Batch
from vaelab.objectives import ELBO, elbo_terms
from vaelab.runtime import RowNoise, StepNoise

N = 2000


def elbo_per_example(model, x):
    distortion, rate = elbo_terms(model, [(Batch(x), RowNoise(7))])
    return torch.from_numpy(-(distortion + rate))


@pytest.mark.parametrize("latent_dim", [1, 3, 8])
def test_with_the_exact_posterior_every_importance_weight_is_the_likelihood(latent_dim):
    model = linear_vae(latent_dim)
    x = sample_images(model, 50)
    draw = model.draw(x, num_samples=6, noise=StepNoise(0, 0))
    torch.testing.assert_close(draw.log_w.double(), exact_log_px(model, x).expand(6, -1), atol=2e-3, rtol=0)


@pytest.mark.parametrize(("widen", "shift"), [(0.7, 0.0), (-0.7, 0.0), (0.0, 0.3), (0.4, -0.2)])
def test_the_gap_between_likelihood_and_elbo_is_the_posteriors_divergence(widen, shift):
    exact = linear_vae(4)
    x = sample_images(exact, N)
    true_posterior = exact.posterior(x)
    model = bend(linear_vae(4), widen, shift)
    gap = exact_log_px(model, x) - elbo_per_example(model, x)
    expected = kl_divergence(model.posterior(x), true_posterior).double().detach()
    error = (gap - expected).mean().abs()
    assert error <= 3 * (gap - expected).std() / N**0.5
    assert gap.mean() > 3 * gap.std() / N**0.5, "a spoilt encoder must cost something"


@pytest.mark.parametrize("mistake", ["kl dropped", "kl twice", "mean in place of a sample"])
def test_that_gap_notices_common_mistakes(mistake):
    model = bend(linear_vae(4), widen=0.4, shift=0.2)
    x = sample_images(model, N)
    distortion, rate = (torch.from_numpy(t) for t in elbo_terms(model, [(Batch(x), RowNoise(7))]))
    if mistake == "kl dropped":
        wrong = -distortion
    elif mistake == "kl twice":
        wrong = -(distortion + 2 * rate)
    else:
        with torch.no_grad():
            wrong = model.likelihood(model.posterior(x).mean).log_prob(x).double() - rate
    gap = exact_log_px(model, x) - wrong
    expected = kl_divergence(model.posterior(x), linear_vae(4).posterior(x)).double().detach()
    assert (gap - expected).mean().abs() > 3 * (gap - expected).std() / N**0.5


def test_bounds_are_ordered_and_the_iwae_bound_at_one_sample_is_the_sampled_elbo():
    model = bend(linear_vae(4), widen=0.5)
    x = sample_images(model, 500)
    log_w = model.draw(x, num_samples=64, noise=StepNoise(0, 0)).log_w.detach()
    one, many = log_mean_exp(log_w[:1]).mean(), log_mean_exp(log_w).mean()
    torch.testing.assert_close(one, log_w[0].mean(), atol=1e-4, rtol=0)
    assert one < many <= exact_log_px(model, x).mean() + 0.05


@pytest.mark.parametrize("seed", range(3))
def test_analytic_kl_equals_monte_carlo(seed):
    torch.manual_seed(seed)
    q = Independent(Normal(torch.randn(5, 7), torch.rand(5, 7) + 0.2), 1)
    p = Independent(Normal(torch.zeros(7), torch.ones(7)), 1)
    z = q.sample((20_000,))
    sampled = q.log_prob(z) - p.log_prob(z)
    error = (sampled.mean(0) - analytic_kl(q, p)).abs()
    assert (error <= 3 * sampled.std(0) / 20_000**0.5 + 1e-6).float().mean() >= 0.8
    by_hand = 0.5 * (q.mean**2 + q.variance - 1 - q.variance.log()).sum(1)
    torch.testing.assert_close(analytic_kl(q, p), by_hand)


def test_log_mean_exp_is_stable_and_reads_k_from_its_input():
    log_w = torch.tensor([[-1e4, 5.0], [-1e4, 5.0 + torch.tensor(3.0).log()]])
    torch.testing.assert_close(log_mean_exp(log_w), torch.tensor([-1e4, 5.0 + torch.tensor(2.0).log()]))
    with pytest.raises(ValueError, match="K = 0"):
        log_mean_exp(torch.zeros(0, 3))


def test_training_closes_the_gap_to_the_exact_likelihood():
    """The objective's gradient leads a spoilt encoder back to the exact posterior."""
    model = bend(linear_vae(3), widen=0.8, shift=0.5)
    model.decoder.requires_grad_(False)
    x = sample_images(model, 512)
    before = (exact_log_px(model, x) - elbo_per_example(model, x)).mean()
    objective, optimizer = ELBO(), torch.optim.Adam(model.posterior_head.parameters(), 0.02)
    for step in range(200):
        for _, loss in objective.losses(model, objective.networks(model), Batch(x), StepNoise(0, step)):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    after = (exact_log_px(model, x) - elbo_per_example(model, x)).mean()
    assert before > 0.5
    assert -0.05 < after < 0.1 * before

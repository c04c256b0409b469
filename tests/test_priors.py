"""Priors score what they sample, a mixture is torch's mixture, and a VampPrior is made of the model's own posteriors."""

import math

import pytest
import torch
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal
from torch.nn import ModuleDict

from vaelab import specs
from vaelab.divergences import log_mean_exp
from vaelab.errors import UsageError
from vaelab.models import VAE, Batch
from vaelab.objectives import ELBO, elbo_terms, sum_parts
from vaelab.priors import NormalMixture, StandardNormal
from vaelab.runtime import RowNoise, StepNoise

SHAPE = (1, 8, 8)


def mixture(m=7, d=5, dtype=torch.float64, narrow=0.0):
    torch.manual_seed(0)
    logits, loc = torch.randn(m, dtype=dtype), 2 * torch.randn(m, d, dtype=dtype)
    return NormalMixture(logits, loc, 0.3 * torch.randn(m, d, dtype=dtype) - narrow)


def torchs(p: NormalMixture) -> MixtureSameFamily:
    components = Independent(Normal(p.loc, p.log_scale.exp()), 1)
    return MixtureSameFamily(Categorical(logits=p.log_weights), components)


def vae(prior, latent_dim=3) -> VAE:
    torch.manual_seed(1)
    posterior, networks = specs.DiagonalNormal(latent_dim), (specs.MLPEncoder((16,)), specs.MLPDecoder((16,)))
    return VAE(networks[0], posterior, prior, networks[1], specs.Bernoulli(), SHAPE)


def test_the_mixture_is_torchs():
    p = mixture()
    q, z = torchs(p), 3 * torch.randn(4, 6, 5, dtype=torch.float64)
    torch.testing.assert_close(p.log_prob(z), q.log_prob(z), rtol=1e-9, atol=1e-9)


def test_gradients_of_the_mixture_are_torchs():
    p = mixture()
    leaves = [t.requires_grad_() for t in (p.loc, p.log_scale)]
    p = NormalMixture(p.log_weights, *leaves)
    z = torch.randn(9, 5, dtype=torch.float64, requires_grad=True)
    ours = torch.autograd.grad(p.log_prob(z).sum(), [z, *leaves])
    theirs = torch.autograd.grad(torchs(p).log_prob(z).sum(), [z, *leaves])
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("narrow", [0.0, 2.0, 4.0])
def test_single_precision_loses_what_the_docstring_says(narrow):
    """Where components are a hundred times narrower than their means are apart, at most some 1e-3 nats in the mean."""
    exact = mixture(narrow=narrow)
    z = exact.sample((2000,))
    rough = NormalMixture(*(t.float() for t in (exact.log_weights, exact.loc, exact.log_scale)))
    error = (rough.log_prob(z.float()).double() - exact.log_prob(z.float().double())).abs()
    assert error.mean() < 2e-3


def test_autocast_leaves_the_density_alone():
    p = mixture(dtype=torch.float32)
    z = torch.randn(20, 5)
    with torch.autocast("cpu", torch.bfloat16):
        inside = p.log_prob(z)
    assert inside.dtype == torch.float32
    torch.testing.assert_close(inside, p.log_prob(z), rtol=0, atol=0)


@pytest.mark.parametrize("draw", ["global generator", "noise"])
def test_a_mixture_samples_what_it_scores(draw):
    """The mean of log p over draws is minus the entropy, in one dimension by numerical integration; moments fit too."""
    p = mixture(d=1)
    torch.manual_seed(3)
    z = p.sample((40_000,)) if draw == "global generator" else p.rsample_from(StepNoise(0, 0), 40_000)
    grid = torch.linspace(-20, 20, 80_001, dtype=torch.float64)[:, None]
    log_p, width = p.log_prob(grid), 40 / 80_000
    assert float(log_p.exp().sum()) * width == pytest.approx(1, abs=1e-6)
    expected, scored = float((log_p.exp() * log_p).sum()) * width, p.log_prob(z)
    assert abs(float(scored.mean()) - expected) < 4 * float(scored.std()) / 200
    q = torchs(p)
    assert abs(float(z.mean() - q.mean)) < 4 * float(q.stddev) / 200
    assert float(z.var()) == pytest.approx(float(q.variance), rel=0.05)


def test_a_vamp_prior_is_the_mean_of_the_posteriors_of_its_pseudo_inputs():
    model = vae(specs.VampPrior(6))
    z = torch.randn(11, 3)
    by_hand = torch.stack([model.posterior(u[None]).log_prob(z) for u in model.prior_part.pseudo_inputs])
    torch.testing.assert_close(model.prior().log_prob(z), log_mean_exp(by_hand))


def test_a_vamp_prior_samples_from_what_it_scores():
    """The mean log-density of draws is that of a fresh large draw, which it is not for those of N(0, I)."""
    model = vae(specs.VampPrior(6))
    with torch.no_grad():
        model.posterior_head.loc_and_log_scale.weight.mul_(8)
        pz = model.prior()
        torch.manual_seed(0)
        drawn = pz.sample((20_000,))
        other = torch.randn(20_000, 3)
        fresh = model.posterior(model.prior_part.pseudo_inputs).sample((20_000,)).flatten(0, 1)  # as many of each

        def distance(z):  # of mean log-density from minus the entropy, that a fresh large draw gives
            return float(pz.log_prob(z).mean() - pz.log_prob(fresh).mean())

    assert abs(distance(drawn)) < 0.05
    assert abs(distance(other)) > 0.3, "a standard normal is told apart"


def test_pseudo_inputs_learn_and_stay_images():
    model = vae(specs.VampPrior(6))
    with torch.no_grad():
        model.prior_part.pseudo_inputs[0] = 7.0
    model.prior().log_prob(torch.randn(5, 3)).sum().backward()
    gradient = model.prior_part.pseudo_inputs.grad
    assert gradient[1:].abs().sum() > 0
    assert gradient[0].abs().sum() == 0, "beyond [0, 1] an image is clamped"
    with torch.no_grad():
        clamped = model.posterior(torch.ones(1, *SHAPE)).loc
        torch.testing.assert_close(model.prior().loc[:1], clamped)


def test_pseudo_inputs_start_at_training_images():
    model = vae(specs.VampPrior(5))
    images = torch.rand(3, *SHAPE)
    model.prior_part.start_at(images)
    assert torch.equal(model.prior_part.pseudo_inputs, images[[0, 1, 2, 0, 1]])


def test_an_evaluation_makes_the_prior_once_and_forgets_it():
    model = vae(specs.VampPrior(5)).eval()
    calls = []
    hook = model.encoder.register_forward_hook(lambda *_: calls.append(1))
    with model.fixed_prior():
        assert model.prior() is model.prior()
        assert len(calls) == 1
    assert model.prior() is not model.prior()
    hook.remove()


@pytest.mark.parametrize("score", ["sum_parts", "elbo_terms"])
def test_the_terms_of_a_data_set_are_of_one_prior(score):
    """Pseudo-inputs are encoded once, not again for every batch."""
    model, x = vae(specs.VampPrior(5)).eval(), torch.rand(6, *SHAPE)
    batches = [(Batch(x[i : i + 2]), RowNoise(0, i)) for i in (0, 2, 4)]
    calls = []
    hook = model.encoder.register_forward_hook(lambda *_: calls.append(1))
    if score == "elbo_terms":
        elbo_terms(model, batches)
    else:
        zeros = dict.fromkeys(("distortion", "rate", "penalty"), torch.zeros(()))
        sum_parts(ELBO(), model, ModuleDict(), batches, zeros)
    hook.remove()
    assert len(calls) == 3 + 1


def test_latents_of_another_space_are_refused_with_the_remedy(monkeypatch):
    monkeypatch.setattr(StandardNormal, "space", "sphere")
    with pytest.raises(
        UsageError, match=r"latents in R\^D, and --prior standard-normal is over the unit sphere: choose"
    ):
        vae(specs.StandardNormal())


def test_a_mixtures_weights_are_normalised_whatever_the_logits():
    p = NormalMixture(torch.tensor([100.0, 100.0 + math.log(3)]), torch.tensor([[0.0], [1.0]]), torch.zeros(2, 1))
    torch.testing.assert_close(p.log_weights.exp(), torch.tensor([0.25, 0.75]))

"""Likelihoods are normalised, exact in fp32, sampled as they are scored, and can be trained.

Shapes: C H W image, P parameters per channel; S samples, V = 256 levels.
"""

import dataclasses
import math

import mpmath
import numpy as np
import pytest
import torch
from torch.distributions import Normal

from vaelab import specs
from vaelab.config import override
from vaelab.errors import UsageError
from vaelab.likelihoods import CategoricalImage, ContinuousBernoulliImage, LogisticMixtureImage
from vaelab.likelihoods.levels import MIN_LOG_SCALE
from vaelab.recipes import recipe
from vaelab.runtime import StepNoise
from vaelab.training.stepping import CompiledStep
from vaelab.training.trainer import Trainer, build_model

CPU = torch.device("cpu")

DENSITIES = [
    specs.Gaussian(), specs.OptimalGaussian(), specs.PixelGaussian(), specs.Laplace(), specs.ContinuousBernoulli(),
]  # fmt: skip
MASSES = [specs.DiscretizedLogistic(), specs.LogisticMixture(3), specs.Categorical256()]
ALL = [specs.Bernoulli(), *DENSITIES, *MASSES]
COLOUR = (3, 2, 1)
EPS = torch.finfo(torch.float32).eps
LEVELS = torch.arange(256) / 255


def built(spec, channels=1):
    return spec.build(channels).eval()


def parameters(part, shape, *leading, seed=0, spread=1.0):
    """Random parameters (*leading, P*C, H, W)."""
    size = (*leading, part.params_per_channel * shape[0], *shape[1:])
    return spread * torch.randn(size, generator=torch.Generator().manual_seed(seed))


def pixels(spec, shape, *leading, seed=1):
    """Random images that a likelihood is of."""
    x = torch.rand((*leading, *shape), generator=torch.Generator().manual_seed(seed))
    support = built(spec).support
    return (x * 255).round() / 255 if support == "bytes" else x.round() if support == "binary" else x


def one_pixel(*values):
    return torch.tensor(values, dtype=torch.float32)[:, None, None, None]


# --- what all share -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", ALL, ids=str)
def test_channels_and_leading_dimensions_are_independent(spec):
    """An image's log-probability is the sum of its channels', parameter p of channel c being row p*C + c."""
    part, alone = built(spec, 3), built(spec, 1)
    params, x = parameters(part, COLOUR, 4, 2), pixels(spec, COLOUR, 2)
    px = part(params)
    assert px.batch_shape == (4, 2)
    assert px.event_shape == px.mean.shape[2:] == COLOUR
    log_px = px.log_prob(x)
    of_channels = [alone(params[:, :, c::3]).log_prob(x[:, c : c + 1]) for c in range(3)]
    torch.testing.assert_close(log_px, sum(of_channels))
    one_by_one = [[part(params[k, b]).log_prob(x[b]) for b in range(2)] for k in range(4)]
    torch.testing.assert_close(log_px, torch.stack([torch.stack(row) for row in one_by_one]))
    torch.testing.assert_close(part(params[0]).expand((4, 2)).log_prob(x), log_px[:1].expand(4, 2))


@pytest.mark.parametrize("spec", ALL, ids=str)
@pytest.mark.parametrize("count", [1, 2])
def test_sums_over_pixels_are_never_in_bf16(spec, count):
    """Under many samples of one image, or of two: bf16 is 4 nats wide at the size of an image's log-probability."""
    part, shape = built(spec), (1, 28, 28)
    params, x = parameters(part, shape, 50, count, spread=6.0), pixels(spec, shape, count)
    exact = part(params).log_prob(x)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(part(params).log_prob(x), exact, rtol=1e-6, atol=1e-3)


def test_an_image_of_fewer_dimensions_or_pixels_broadcasts():
    px = built(specs.Bernoulli())(torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)))
    for value in (torch.ones(1, 1, 1), torch.ones(2, 1, 1, 1), torch.ones(1, 8, 8), torch.ones(8)):
        torch.testing.assert_close(px.log_prob(value), px.log_prob(torch.ones(2, 1, 8, 8)))
    one = built(specs.Bernoulli())(torch.randn(1, 8, 8))
    assert one.log_prob(torch.ones(1, 1, 8, 8)).shape == (1,)


@pytest.mark.parametrize("spec", ALL, ids=str)
def test_gradients_are_finite_at_extreme_parameters_and_pixels(spec):
    part = spec.build(1)
    for size in (0.0, 1e-7, 30.0, -30.0):
        for sign in (1.0, -1.0):
            params = torch.full((3, part.params_per_channel, 1, 1), size)
            params[:, ::2] *= sign
            params.requires_grad_()
            log_px = part(params).log_prob(one_pixel(0, 128 / 255, 1))
            log_px.sum().backward()
            assert torch.isfinite(log_px).all()
            assert torch.isfinite(params.grad).all()
            for parameter in part.parameters():
                assert torch.isfinite(parameter.grad).all()


@pytest.mark.parametrize("spec", ALL, ids=str)
def test_samples_have_the_mean_and_the_variance(spec):
    """Within 5 standard errors; the mean of clipped logistics is of unrounded pixels, and may differ by half a level."""
    torch.manual_seed(0)
    part = built(spec, 3)
    px = part(parameters(part, COLOUR))
    x = px.sample((20_000,)).double()
    assert x.shape == (20_000, *COLOUR)
    slack = 0.5 / 255 if isinstance(px, LogisticMixtureImage) else 0.0
    assert ((x.mean(0) - px.mean).abs() <= 5 * x.std(0) / math.sqrt(len(x)) + slack).all()
    if not isinstance(px, LogisticMixtureImage):
        squares = (x - x.mean(0)).square()
        assert ((squares.mean(0) - px.variance).abs() <= 5 * squares.std(0) / math.sqrt(len(x))).all()


@pytest.mark.parametrize("spec", MASSES, ids=str)
def test_masses_sample_what_they_score(spec):
    """Samples lie on the levels, and E[log p] of them is minus the entropy of the 256 masses."""
    torch.manual_seed(0)
    part = built(spec)
    px = part(parameters(part, (1, 1, 1)))
    x = px.sample((20_000,))
    torch.testing.assert_close((x * 255).round() / 255, x, rtol=0, atol=EPS)
    log_p = px.log_prob(LEVELS[:, None, None, None]).double()
    scored = px.log_prob(x).double()
    assert abs(scored.mean() - (log_p.exp() * log_p).sum()) < 5 * scored.std() / math.sqrt(len(x))


@pytest.mark.parametrize("spec", ALL, ids=str)
def test_scores_are_in_fp32_whatever_the_network_emits(spec):
    part = built(spec)
    params = parameters(part, (1, 4, 4), 2).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        log_px = part(params).log_prob(pixels(spec, (1, 4, 4), 2))
        mean = part(params).mean
    assert log_px.dtype == mean.dtype == torch.float32
    torch.testing.assert_close(log_px, part(params.float()).log_prob(pixels(spec, (1, 4, 4), 2)), rtol=0, atol=0)


@pytest.mark.parametrize("spec", ALL, ids=str)
def test_parameters_to_start_from_have_the_mean_asked_for(spec):
    """Of the clipped logistics nearly: what their tails lose at 0 pulls the mean inwards."""
    part = built(spec, 3)
    mean = torch.linspace(0.2, 0.8, 6).reshape(COLOUR)
    start = part.start(mean)
    assert start.shape == (3 * part.params_per_channel, 2, 1)
    atol = 0.05 if "logistic" in spec.word else 2e-3 if spec.word == "categorical" else 1e-5
    torch.testing.assert_close(part(start).mean, mean, atol=atol, rtol=0)


# --- continuous Bernoulli -------------------------------------------------------------------------------------------

LOGITS = [0.0, 1e-6, 1e-3, -0.01, 0.3, 0.999, 1.001, -3.0, 17.0, -80.0, 1000.0]


def integrals(logit: float) -> tuple[float, float, float]:
    """Log of the integral of exp(logit * (x - edge)) over [0, 1], mean and variance, by 200-point quadrature in float64.

    Edge is where the density is greatest, and the integral is cut where it has fallen by 50 nats.
    """
    nodes, weights = np.polynomial.legendre.leggauss(200)
    length = min(1.0, 50 / abs(logit)) if logit else 1.0
    depth, weights = length * (nodes + 1) / 2, weights * length / 2
    p = weights * np.exp(-abs(logit) * depth)
    x = 1 - depth if logit > 0 else depth
    mean = (p * x).sum() / p.sum()
    return math.log(p.sum()), mean, (p * (x - mean) ** 2).sum() / p.sum()


@pytest.mark.parametrize("logit", LOGITS)
def test_the_continuous_bernoulli_is_what_quadrature_gives(logit):
    """Density, mean and variance, in fp32, near a logit of 0 and where a probability would be rounded to 1."""
    log_z, mean, variance = integrals(float(torch.tensor(logit)))
    px = ContinuousBernoulliImage(torch.full((1, 1, 1), logit))
    x = one_pixel(0.0, 0.3, 1.0)
    expected = logit * (x.double().flatten() - float(logit > 0)) - log_z
    # A product with the logit is rounded at its own size.
    torch.testing.assert_close(px.log_prob(x).double(), expected, rtol=4 * EPS, atol=(abs(logit) + 4) * EPS)
    assert float(px.mean) == pytest.approx(mean, abs=2 * EPS)
    assert float(px.variance) == pytest.approx(variance, rel=1e-5, abs=4 * EPS)


def test_the_score_of_the_continuous_bernoulli_is_the_pixel_less_the_mean():
    """As of any exponential family, and so finite everywhere; checked on both sides of the series' end."""
    logits = torch.cat([torch.tensor([*LOGITS, 1e4, -1e4]), torch.linspace(0.9, 1.1, 50)]).reshape(-1, 1, 1, 1)
    logits.requires_grad_()
    px = ContinuousBernoulliImage(logits)
    (gradient,) = torch.autograd.grad(px.log_prob(torch.full((1, 1, 1), 0.3)).sum(), logits)
    torch.testing.assert_close(gradient, 0.3 - px.mean.detach(), rtol=0, atol=2e-6)
    flat = torch.linspace(-3, 3, 9, dtype=torch.float64).reshape(-1, 1, 1, 1).requires_grad_()
    assert torch.autograd.gradcheck(lambda a: ContinuousBernoulliImage(a).log_prob(torch.full((1, 1, 1), 0.3)), flat)
    assert torch.autograd.gradcheck(lambda a: ContinuousBernoulliImage(a).mean, flat)


# --- masses over levels ---------------------------------------------------------------------------------------------

NARROW = math.exp(MIN_LOG_SCALE)
LOGISTICS = [(0.5, 0.1), (0.0, 0.02), (1.0, NARROW), (0.4321, NARROW), (-3.0, 0.05), (2.0, 0.01), (0.7, 50.0)]


def logistic(loc: float, scale: float) -> LogisticMixtureImage:
    loc_, log_scale = (torch.tensor(value).reshape(1, 1, 1, 1) for value in (loc, math.log(scale)))
    return LogisticMixtureImage(torch.zeros(1, 1, 1, 1), loc_, log_scale)


def masses(px) -> torch.Tensor:
    """(V,), log-masses of the levels of the one pixel."""
    return px.log_prob(LEVELS[:, None, None, None])


@pytest.mark.parametrize(("loc", "scale"), LOGISTICS)
def test_masses_of_a_logistic_are_differences_of_its_cdf(loc, scale):
    """By 700-digit arithmetic: in the tails a bin holds e^-1240, and float64's own differences of sigmoids are 0."""
    px = logistic(loc, scale)
    mpmath.mp.dps = 700
    at, width = mpmath.mpf(float(px.loc)), mpmath.exp(mpmath.mpf(float(px.log_scale)))

    def cdf(level: int) -> mpmath.mpf:
        edge = (mpmath.mpf(2 * level + 1) / 510 - at) / width
        return mpmath.mpf(level >= 0) if level in (-1, 255) else 1 / (1 + mpmath.exp(-edge))

    exact = torch.tensor([float(mpmath.log(cdf(v) - cdf(v - 1))) for v in range(256)], dtype=torch.float64)
    found = masses(px).double()
    # Pixel less location is rounded before it is divided by the scale, which is rounded too.
    torch.testing.assert_close(found, exact, rtol=8 * EPS, atol=8 * EPS * max(1, abs(loc)) / scale + 8 * EPS)


@pytest.mark.parametrize(("loc", "scale"), LOGISTICS)
def test_masses_sum_to_one_and_the_mean_is_theirs_to_half_a_level(loc, scale):
    """What the midpoint rule of 255 steps leaves: half a level at most, far less where the logistic is wider than one."""
    px = logistic(loc, scale)
    p = masses(px).double().exp()
    assert float(p.sum()) == pytest.approx(1, abs=1e-4)
    of_levels = float((p * LEVELS).sum())
    assert abs(float(px.mean) - of_levels) <= (1 / 20_000 if scale >= 1 / 255 else 1 / 510)


def test_a_mixture_is_the_weighted_sum_of_its_logistics():
    weights, members = torch.tensor([0.2, 0.5, 0.3]), [(0.1, 0.02), (0.4, 0.1), (0.9, 0.01)]
    loc, scale = (torch.tensor(values).reshape(3, 1, 1, 1) for values in zip(*members, strict=True))
    px = LogisticMixtureImage(weights.log().reshape(3, 1, 1, 1) + 5, loc, scale.log())
    parts = [logistic(*member) for member in members]
    expected = sum(w * masses(part).exp() for w, part in zip(weights, parts, strict=True))
    torch.testing.assert_close(masses(px).exp(), expected)
    torch.testing.assert_close(px.mean, sum(w * part.mean for w, part in zip(weights, parts, strict=True)))


@pytest.mark.parametrize("raw", [-60.0, 0.0, 30.0])
def test_the_scale_of_a_component_has_a_soft_lower_bound(raw):
    """e^-7 of pixels in [-1, 1], half of it in [0, 1]."""
    part = built(specs.LogisticMixture(1))
    log_scale = part(torch.tensor([0.0, 0.0, raw]).reshape(3, 1, 1)).log_scale
    expected = math.log((math.exp(-7) + math.exp(raw)) / 2)
    assert float(log_scale) == pytest.approx(expected, rel=1e-6)


def test_a_mixture_starts_with_equal_weights_and_scales_of_a_tenth():
    part = built(specs.LogisticMixture(2))
    px = part(part.start(torch.full((1, 1, 1), 0.3)))
    torch.testing.assert_close(px.loc.flatten(), torch.tensor([0.3, 0.3]))
    torch.testing.assert_close(px.log_weights.exp().flatten(), torch.tensor([0.5, 0.5]))
    torch.testing.assert_close(px.log_scale.exp().flatten(), torch.full((2,), 0.1 + math.exp(-7) / 2))


def test_a_categorical_is_a_softmax_with_the_moments_of_its_masses():
    logits = 20 * torch.randn(256, 1, 1, 1, generator=torch.Generator().manual_seed(0))
    px, exact = CategoricalImage(logits), logits.flatten().double().log_softmax(0)
    torch.testing.assert_close(masses(px).double(), exact, rtol=4 * EPS, atol=1e-5)
    levels = torch.arange(256, dtype=torch.float64) / 255
    mean = (exact.exp() * levels).sum()
    assert float(px.mean) == pytest.approx(float(mean), abs=1e-6)
    assert float(px.variance) == pytest.approx(float((exact.exp() * (levels - mean) ** 2).sum()), abs=1e-6)


@pytest.mark.parametrize("spec", MASSES, ids=str)
def test_a_pixel_between_levels_is_scored_as_the_nearest(spec):
    part = built(spec)
    px = part(parameters(part, (1, 1, 1)))
    levels = one_pixel(*LEVELS.tolist())
    for shift in (0.4 / 255, -0.4 / 255):
        torch.testing.assert_close(px.log_prob((levels + shift).clamp(0, 1)), px.log_prob(levels), rtol=0, atol=0)


# --- real-valued pixels ---------------------------------------------------------------------------------------------


def test_the_optimal_sigma_has_the_gradient_of_the_profile_likelihood():
    """Value and gradient of -D/2 (log 2 pi e MSE), with K samples of B images, by autograd through the MSE itself."""
    part, shape = specs.OptimalGaussian().build(3), (3, 4, 5)
    params, x = parameters(part, shape, 2, 6).requires_grad_(), pixels(part.spec, shape, 6)
    loss = -part(params).log_prob(x).mean()
    mse = (x - torch.sigmoid(params)).square().mean()
    profile = 0.5 * math.prod(shape) * torch.log(2 * math.pi * math.e * mse)
    torch.testing.assert_close(loss, profile)
    torch.testing.assert_close(torch.autograd.grad(loss, params), torch.autograd.grad(profile, params))
    torch.testing.assert_close(part.log_sigma, 0.5 * mse.detach().log())


def test_the_optimal_sigma_is_set_in_training_alone():
    part, shape = specs.OptimalGaussian().build(1), (1, 4, 4)
    params, x = parameters(part, shape, 3), pixels(part.spec, shape, 3)
    assert float(part.log_sigma) == 0
    part(params).log_prob(x)
    kept = part.log_sigma.clone()
    assert float(kept) < 0
    reference = Normal(torch.sigmoid(params), kept.exp()).log_prob(x / 2).sum((1, 2, 3))
    torch.testing.assert_close(part.eval()(params).log_prob(x / 2), reference)
    torch.testing.assert_close(part.log_sigma, kept, rtol=0, atol=0)
    other = specs.OptimalGaussian().build(1)
    other.load_state_dict(part.state_dict())
    samples = []
    for mode in (part.train(), part.eval(), other):
        torch.manual_seed(0)
        samples.append(mode(params).sample())
    assert torch.equal(samples[0], samples[1]), "sampling never depends on the mode"
    assert torch.equal(samples[0], samples[2]), "sigma is saved with the weights"


def test_a_perfect_reconstruction_has_a_finite_loss():
    part = specs.OptimalGaussian().build(1)
    params = torch.zeros(2, 1, 3, 3, requires_grad=True)
    log_px = part(params).log_prob(torch.full((2, 1, 3, 3), 0.5))
    log_px.sum().backward()
    assert float(part.log_sigma) == pytest.approx(math.log(1e-3))
    torch.testing.assert_close(log_px, torch.full((2,), -9 * math.log(1e-3 * math.sqrt(2 * math.pi))))
    assert torch.equal(params.grad, torch.zeros_like(params))


@pytest.mark.parametrize("raw", [-60.0, -3.0, 2.0])
def test_pixel_sigmas_have_a_soft_lower_bound(raw):
    px = built(specs.PixelGaussian(min_sigma=0.05))(torch.tensor([0.3, raw]).reshape(2, 1, 1))
    assert float(px.stddev) == pytest.approx(0.05 + math.exp(raw), rel=1e-6)
    assert float(px.mean) == pytest.approx(1 / (1 + math.exp(-0.3)), rel=1e-6)


def test_laplace_is_the_absolute_error():
    px = built(specs.Laplace(0.25, learn_scale=False))(torch.zeros(1, 2, 2))
    x = torch.tensor([[[0.5, 0.75], [0.0, 1.0]]])
    assert float(px.log_prob(x)) == pytest.approx(-(0 + 0.25 + 0.5 + 0.5) / 0.25 - 4 * math.log(2 * 0.25))


# --- training -------------------------------------------------------------------------------------------------------

TINY = override(recipe("mlp"), data="digits", encoder_hidden_dims=(32,), decoder_hidden_dims=(32,), latent_dim=4,
                batch_size=64, epochs=2, learning_rate=3e-3, precision="fp32", compile="off")  # fmt: skip


def trained(spec, data, steps=20, **changes) -> Trainer:
    trainer = Trainer(override(TINY, likelihood=spec, **changes), data, CPU)
    for _ in range(steps):
        trainer.train_step()
    trainer.check_finite()
    return trainer


@pytest.mark.parametrize("spec", ALL, ids=str)
def test_twenty_steps_lower_the_loss(spec, digits):
    size = {"batch_size": 8} if spec.word == "categorical" else {}  # its decoder has 200,704 outputs an image
    losses = trained(spec, digits, **size).terms[:20, 0]
    assert losses[-3:].mean() < losses[:3].mean()


@pytest.mark.parametrize(("kind", "size", "flag"), [
    (specs.Gaussian, "sigma", "learn_sigma"), (specs.Laplace, "scale", "learn_scale"),
    (specs.DiscretizedLogistic, "scale", "learn_scale"),
])  # fmt: skip
def test_a_scale_is_learned_only_if_it_is_to_be(kind, size, flag, digits):
    for learn in (True, False):
        spec = kind(**{size: 0.25, flag: learn})
        assert [float(p.detach().exp()) for p in built(spec).parameters()] == pytest.approx([0.25] if learn else [])
        moved = getattr(trained(spec, digits, steps=2).model.likelihood_head, f"log_{size}").detach()
        assert (abs(float(moved) - math.log(0.25)) > 1e-4) == learn
    assert getattr(kind(), flag), "as a rule it is"


def test_a_regularised_autoencoder_minimises_the_squared_error():
    """A Gaussian's -log p is the squared error and a constant where sigma^2 is 1/2 and stays so."""
    head = recipe("rae").likelihood.build(1)
    x, params = torch.rand(2, 1, 3, 3), torch.randn(2, 1, 3, 3)
    px = head(params)
    squared = (x - params.sigmoid()).square().sum((1, 2, 3))
    torch.testing.assert_close(-px.log_prob(x), squared + 9 * math.log(math.pi) / 2)
    assert not list(head.parameters())


@pytest.mark.parametrize("spec", [specs.LogisticMixture(3), specs.PixelGaussian(), specs.Categorical256()], ids=str)
def test_training_can_start_from_the_mean_image(spec, digits):
    """Glorot's weights come with a decoder's bias that gives the mean of the pixels, for any number of parameters."""
    model = trained(spec, digits, steps=0, init="glorot").model
    with torch.no_grad():
        mean = model.likelihood(torch.zeros(1, 4)).mean[0]
    assert (mean - digits.train.mean()).abs().mean() < 0.06


def test_traced_steps_are_the_plain_ones(digits, uncompiled):
    spec = specs.OptimalGaussian()  # the one with a buffer that a step changes
    plain, traced = (trained(spec, digits, compile=way) for way in ("off", "on"))
    assert isinstance(traced._take_step, CompiledStep)
    assert not traced._take_step._failed
    assert len(traced._take_step._functions) == 1
    torch.testing.assert_close(traced.terms[:20], plain.terms[:20], rtol=2e-4, atol=1e-3)
    ours, theirs = (float(trainer.model.likelihood_head.log_sigma) for trainer in (traced, plain))
    assert ours == pytest.approx(theirs, abs=1e-4)
    assert ours < math.log(0.5), "sigma was set inside the traced step"


def test_augmented_images_are_scored_at_their_nearest_levels(digits):
    trainer = trained(specs.DiscretizedLogistic(), digits, 5, augment_prob=1.0, rotate=10.0)
    assert torch.isfinite(trainer.terms[:5]).all()


@pytest.mark.parametrize("changes", [{"scale": 0.0}, {"likelihood": "pixel-gaussian", "min_sigma": 0.0},
                                     {"likelihood": "logistic-mixture", "num_components": 0}])  # fmt: skip
def test_settings_that_cannot_be_meant_are_refused(changes):
    with pytest.raises(UsageError, match="must be greater than 0"):
        override(override(TINY, likelihood="laplace"), **changes)


def test_a_draw_scores_k_samples_as_they_are():
    """Through the whole model in colour: log p(x|z) of a draw is the likelihood's of each latent alone."""
    shape, x = (3, 9, 8), torch.randint(0, 256, (4, 3, 9, 8), generator=torch.Generator().manual_seed(0)) / 255
    for spec in ALL:
        run = override(dataclasses.replace(TINY, likelihood=spec), latent_dim=3)
        model = build_model(run, shape).eval()
        draw = model.draw(x, num_samples=2, noise=StepNoise(0, 0))
        alone = torch.stack([model.likelihood(z).log_prob(x) for z in draw.z[0]])
        torch.testing.assert_close(draw.log_px, alone, rtol=1e-5, atol=1e-3)

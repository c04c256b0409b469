"""Codes whose information, distance from the prior and classes are known, and proof that an error would be noticed."""

import functools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.integrate import quad
from torch import nn
from torch.distributions import ExpTransform, Independent, Laplace, MultivariateNormal, Normal, TransformedDistribution

from oracle import dataset, linear_vae, sample_images
from vaelab import specs
from vaelab.config import override
from vaelab.data import load
from vaelab.data.datasets import Dataset, Split, unit
from vaelab.errors import FailureError, UsageError
from vaelab.evaluate import classifiers, latents
from vaelab.evaluate.overview import overview
from vaelab.models import VAE, Batch
from vaelab.objectives import elbo_terms
from vaelab.posteriors import NormalPosterior
from vaelab.priors import UnitNormal
from vaelab.recipes import recipe
from vaelab.runtime import RowNoise
from vaelab.train import fit
from vaelab.training.trainer import build_model


class Plain(Independent):
    """A diagonal normal that is no ``NormalPosterior``: scored by its own ``log_prob``."""

    family = Normal

    def __init__(self, loc, log_scale):
        super().__init__(self.family(loc, torch.exp(log_scale), validate_args=False), 1, validate_args=False)

    def rsample_and_log_prob(self, shape, noise, *, stop=False):
        loc, scale = self.base_dist.loc, self.base_dist.scale
        u = noise.uniform("z", (len(loc), shape[0], loc.shape[1])).transpose(0, 1).clamp(1e-6, 1 - 1e-6)
        z = self.family(loc, scale).icdf(u)
        return z, lambda: self.log_prob(z)


class LaplacePosterior(Plain):
    family = Laplace


class Table(nn.Module):
    """A model whose posteriors stand in the images: (N, 1, 2, D), location and log-scale."""

    def __init__(self, posterior, prior, latent_dim):
        super().__init__()
        self.kind, self.pz = posterior, prior or UnitNormal(torch.zeros(latent_dim), torch.ones(latent_dim))

    def prior(self, y=None):
        return self.pz

    def posterior(self, x, y=None):
        return self.kind(x[:, 0, 0], x[:, 0, 1])


def table(loc, log_scale, y=None):
    loc = torch.as_tensor(loc, dtype=torch.float64)
    x = torch.stack([loc, torch.as_tensor(log_scale, dtype=torch.float64).expand_as(loc)], 1)[:, None]
    part = Split(x, None if y is None else torch.as_tensor(y), torch.arange(len(x)))
    return Dataset("table", "grey", part, part, part, binary=False, classes=None)


def codes_of(loc, log_scale=-3.0, y=None, *, posterior=NormalPosterior, prior=None, **options):
    data = table(loc, log_scale, y)
    return latents.encode(Table(posterior, prior, data.shape[-1]), data, "test", **options)


def same_as(z, z_prior=None):
    """Codes with these draws, whatever their posteriors."""
    z = np.asarray(z)
    codes = codes_of(np.zeros((len(z), 1)))
    return replace(
        codes, z=z, z_prior=np.random.default_rng(7).standard_normal(z.shape) if z_prior is None else z_prior
    )


# --- information ----------------------------------------------------------------------------------------------------

CENTRES = np.array([-2.0, -0.6, 0.6, 2.0])
FAMILIES = {NormalPosterior: stats.norm, Plain: stats.norm, LaplacePosterior: stats.laplace}


def mixture(scale, posterior=NormalPosterior, count=2000):
    """An encoder that knows four kinds of images; its aggregate posterior is exactly a mixture of four."""
    loc = np.tile(CENTRES, count // 4)[:, None]
    return codes_of(loc, math.log(scale), posterior=posterior)


@functools.cache
def exact(scale, family):
    """Mutual information and KL(q(z) || p(z)) of that mixture, by quadrature."""

    def q(z):
        return family.pdf(z, CENTRES, scale).mean()

    def integral(f):
        edges = np.unique(np.concatenate([CENTRES + k * scale for k in (-40, -8, -2, 0, 2, 8, 40)]))
        return sum(quad(f, a, b, epsabs=1e-10)[0] for a, b in zip(edges[:-1], edges[1:], strict=True))

    entropy = -integral(lambda z: q(z) * math.log(q(z)) if q(z) > 0 else 0.0)
    cross = integral(lambda z: q(z) * stats.norm.logpdf(z))
    return entropy - family(0, scale).entropy(), -entropy - cross


@pytest.mark.parametrize("posterior", [NormalPosterior, Plain, LaplacePosterior])
@pytest.mark.parametrize("scale", [0.03, 0.5, 1.5])
def test_information_and_distance_from_the_prior_agree_with_quadrature(posterior, scale):
    codes = mixture(scale, posterior)
    information, distance = exact(scale, FAMILIES[posterior])
    mi, kl = latents.mutual_information(codes, "table"), latents.aggregate_kl(codes, "table")
    assert abs(mi.value - information) <= 3 * mi.stderr + 1e-6
    assert abs(kl.value - distance) <= 3 * kl.stderr + 1e-6
    assert not latents.saturated(mi)
    density = FAMILIES[posterior].pdf(codes.z, CENTRES, scale).mean(1)
    np.testing.assert_allclose(codes.log_agg_qz, np.log(density), atol=1e-9)


@pytest.mark.parametrize("posterior", [NormalPosterior, LaplacePosterior])
def test_information_and_distance_add_up_to_the_rate(posterior):
    codes = mixture(0.5, posterior)
    mi, kl = latents.mutual_information(codes, ""), latents.aggregate_kl(codes, "")
    sampled = codes.log_qz - codes.log_pz
    assert mi.value + kl.value == pytest.approx(sampled.mean(), abs=1e-10)
    assert abs(sampled.mean() - codes.rate.sum(1).mean()) <= 3 * sampled.std() / len(codes) ** 0.5
    information, distance = exact(0.5, FAMILIES[posterior])
    assert codes.rate.sum(1).mean() == pytest.approx(information + distance, abs=1e-6)


@pytest.mark.parametrize("mistake", ["means in place of samples", "own code alone", "density of the average posterior"])
def test_quadrature_notices_common_mistakes(mistake):
    codes, scale = mixture(0.5), 0.5
    log_q = stats.norm.logpdf(codes.z, codes.loc.T, scale)
    if mistake == "means in place of samples":
        log_agg = np.log(stats.norm.pdf(codes.loc, CENTRES, scale).mean(1))
        wrong = stats.norm.logpdf(0, 0, scale) - log_agg
    elif mistake == "own code alone":
        wrong = codes.log_qz - (np.diagonal(log_q) - math.log(len(codes)))
    else:
        wrong = codes.log_qz - log_q.mean(1)
    right = latents.mutual_information(codes, "")
    assert abs(wrong.mean() - exact(scale, stats.norm)[0]) > 10 * right.stderr


@pytest.mark.parametrize("log_scale", [-4.0, -9.0, -18.0])
def test_narrow_posteriors_tell_their_examples_apart_and_that_is_log_n(log_scale):
    loc = np.random.default_rng(0).standard_normal((1000, 5))
    codes = codes_of(loc, log_scale)
    mi = latents.mutual_information(codes, "table")
    assert mi.value == pytest.approx(math.log(1000), abs=1e-9)
    assert mi.value <= math.log(1000)
    assert latents.saturated(mi)
    assert mi.protocol == "table, aggregate of N=1,000 codes, at most log N = 6.91: saturated"
    kl = latents.aggregate_kl(codes, "table")
    assert kl.protocol.endswith("aggregate of N=1,000 codes, at least the rate less log N = 6.91: saturated")
    assert kl.value == pytest.approx((codes.log_qz - codes.log_pz).mean() - math.log(1000), abs=1e-9)
    assert not latents.saturated(replace(mi, value=math.log(1000) - 0.51))


def test_posteriors_too_narrow_for_a_matrix_product_are_scored_one_by_one(monkeypatch):
    """Five images, forty times each: log 5, however narrow. Multiplied out, the squares have no digits left."""
    loc = np.repeat(np.random.default_rng(1).standard_normal((5, 3)), 40, 0)
    codes = codes_of(loc, -18.0)
    assert latents.mutual_information(codes, "").value == pytest.approx(math.log(5), abs=1e-9)
    monkeypatch.setattr(latents, "_LOST_NATS", math.inf)
    rounded = codes.log_qz - latents.log_aggregate(codes)
    assert not abs(rounded.mean() - math.log(5)) < 0.01


@pytest.mark.parametrize("posterior", [NormalPosterior, Plain])
def test_the_block_changes_nothing_and_the_matrix_product_is_the_density(posterior):
    rng = np.random.default_rng(2)
    # Of very different widths, so that both ways of scoring are taken.
    loc, log_scale = rng.standard_normal((301, 4)), rng.uniform(-16, 0.5, (301, 1)) * np.ones(4)
    codes = codes_of(loc, log_scale, posterior=posterior, batch_size=64)
    q = stats.norm.logpdf(codes.z[:, None], codes.loc, np.exp(log_scale)).sum(2)
    expected = np.logaddexp.reduce(q, axis=1) - math.log(301)
    for rows in (1, 7, 64, 301, None):
        np.testing.assert_allclose(latents.log_aggregate(codes, rows=rows), expected, rtol=0, atol=1e-6)
        np.testing.assert_allclose(latents.log_aggregate(codes, rows=rows), codes.log_agg_qz, rtol=0, atol=1e-9)


def test_a_posterior_of_correlated_dimensions_has_no_rate_per_dimension():
    class Correlated(MultivariateNormal):
        def rsample_and_log_prob(self, shape, noise, *, stop=False):
            eps = noise.normal("z", (len(self.loc), *shape, 2)).transpose(0, 1).double()
            z = self.loc + eps @ self.scale_tril[0].mT
            return z, lambda: self.log_prob(z)

    root = torch.tensor([[1.0, 0.0], [0.6, 0.8]], dtype=torch.float64)
    loc = np.random.default_rng(3).standard_normal((400, 2))
    codes = codes_of(loc, 0.0, posterior=lambda loc, _: Correlated(loc, scale_tril=root.expand(len(loc), 2, 2)))
    assert codes.rate is None
    assert codes.log_scale is None
    q = [stats.multivariate_normal(mean, root @ root.mT).pdf(codes.z) for mean in loc]
    np.testing.assert_allclose(codes.log_agg_qz, np.log(np.mean(q, 0)), atol=1e-9)


def test_a_collapsed_posterior_says_nothing():
    codes = codes_of(np.zeros((3000, 6)), 0.0)
    mi, kl = latents.mutual_information(codes, ""), latents.aggregate_kl(codes, "")
    assert mi.value == pytest.approx(0, abs=1e-9)
    assert kl.value == pytest.approx(0, abs=1e-9)
    assert latents.active_units(codes, "").value == 0
    assert not codes.rate.any()
    test = classifiers.two_sample_test(codes, "")
    assert abs(test.value - 0.5) < 3 * 0.5 / test.n**0.5
    assert np.abs(codes.z.mean(0)).max() < 3.5 * (1 / 3000) ** 0.5
    assert np.abs(codes.z.var(0) - 1).max() < 3.5 * (2 / 3000) ** 0.5


# --- units ---------------------------------------------------------------------------------------------------------


def test_units_are_active_by_the_variance_of_their_means():
    spread = np.sqrt([1.0, 0.02, 0.005, 0.0])
    loc = np.random.default_rng(4).standard_normal((2000, 4)) * spread
    codes = codes_of(loc, 0.0)
    units = latents.active_units(codes, "table test")
    assert (units.value, units.stderr, units.unit, units.n) == (2, 0, "units", 2000)
    assert units.protocol == "table test, of 4, Var_x E[z|x] > 0.01"
    np.testing.assert_allclose(latents.variance_of_means(codes), loc.var(0, ddof=1), atol=1e-12)
    assert (codes.z.var(0) > latents.ACTIVE).all(), "draws vary where means do not: they must not be counted"


def test_a_unit_at_the_threshold_is_as_uncertain_as_resampling_makes_it():
    loc = np.random.default_rng(5).standard_normal((500, 1))
    loc *= np.sqrt(0.0102 / loc.var(ddof=1))
    units = latents.active_units(codes_of(loc), "")
    rng = np.random.default_rng(6)
    resampled = [rng.choice(loc[:, 0], 500).var(ddof=1) > 0.01 for _ in range(4000)]
    assert units.stderr == pytest.approx(np.std(resampled), abs=0.04)
    assert units == latents.active_units(codes_of(loc), "")


# --- two-sample test ------------------------------------------------------------------------------------------------


def shape_of(kind, count, dims, rng):
    """Codes that differ from N(0, I) in one or two dimensions."""
    z = rng.standard_normal((count, dims))
    if kind == "shift":
        z[:, 0] += 1.0
    elif kind == "scale":
        z[:, 0] *= 2.0
    elif kind == "clusters":  # mean 0 and variance 1
        z[:, 0] = 0.95 * rng.choice([-1, 1], count) + math.sqrt(1 - 0.95**2) * z[:, 0]
    elif kind == "ring":  # mean 0, variance 1 and uncorrelated
        angle, radius = rng.uniform(0, 2 * math.pi, count), math.sqrt(2) + 0.1 * z[:, 0]
        z[:, 0], z[:, 1] = radius * np.cos(angle), radius * np.sin(angle)
    return z


def best_accuracy(kind):
    """What the best classifier of all reaches: (1 + total variation) / 2."""
    z = np.linspace(-12, 12, 200_001)
    p, step = stats.norm.pdf(z), z[1] - z[0]
    if kind == "shift":
        q = stats.norm.pdf(z, 1)
    elif kind == "scale":
        q = stats.norm.pdf(z, scale=2)
    elif kind == "clusters":
        q = 0.5 * (stats.norm.pdf(z, 0.95, math.sqrt(1 - 0.95**2)) + stats.norm.pdf(z, -0.95, math.sqrt(1 - 0.95**2)))
    else:
        p, q = stats.rayleigh.pdf(z), stats.norm.pdf(z, math.sqrt(2), 0.1)
    return 0.5 + 0.25 * np.abs(p - q).sum() * step


# How far below the best classifier, at most: in 50 dimensions, 10,000 codes are few.
@pytest.mark.parametrize(
    ("kind", "dims", "count", "short"),
    [
        *[(kind, 2, 4000, 0.03) for kind in ("shift", "scale", "clusters", "ring")],
        *[(kind, 10, 4000, 0.06) for kind in ("shift", "scale", "clusters", "ring")],
        *[(kind, 50, 10_000, 0.09) for kind in ("shift", "clusters", "ring")],
    ],
)
def test_a_two_sample_test_is_close_to_the_best_classifier_and_never_better(kind, dims, count, short):
    codes = same_as(shape_of(kind, count, dims, np.random.default_rng(8)))
    test = classifiers.two_sample_test(codes, "table")
    assert (test.unit, test.n) == ("accuracy", count)
    assert test.stderr == pytest.approx(math.sqrt(test.value * (1 - test.value) / count))
    assert best_accuracy(kind) - short < test.value < best_accuracy(kind) + 3.5 * test.stderr


def test_the_order_of_the_codes_does_not_tell_them_from_the_prior():
    """Halves of sorted codes are nothing like each other; all of them together are the prior's."""
    z = np.random.default_rng(0).standard_normal((2000, 2))
    test = classifiers.two_sample_test(
        same_as(z[np.argsort(z[:, 0])], np.random.default_rng(1).standard_normal(z.shape)), ""
    )
    assert abs(test.value - 0.5) < 3 * test.stderr


def test_a_two_sample_test_raises_no_false_alarm_and_is_fixed():
    scores = []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        codes = same_as(rng.standard_normal((500, 4)), rng.standard_normal((500, 4)))
        test = classifiers.two_sample_test(codes, "")
        scores.append((test.value - 0.5) / (0.5 / test.n**0.5))
    assert test == classifiers.two_sample_test(codes, "")
    assert abs(np.mean(scores)) < 3 / 20**0.5
    assert 0.55 < np.std(scores) < 1.5
    assert np.abs(scores).max() < 4


def test_the_false_alarm_rate_notices_points_that_were_trained_on():
    """Scored on points that it has seen, the same classifier would find a difference where there is none."""
    scores = []
    for seed in range(8):
        z, z_prior = np.random.default_rng(seed).standard_normal((2, 250, 20))
        test = classifiers.two_sample_test(same_as(np.concatenate([z, z]), np.concatenate([z_prior, z_prior])), "")
        scores.append((test.value - 0.5) / (0.5 / test.n**0.5))
    assert np.mean(scores) > 3 / 8**0.5


def test_a_handful_of_codes_is_refused():
    with pytest.raises(UsageError, match="two-sample test of 19 codes"):
        classifiers.two_sample_test(same_as(np.zeros((19, 2))), "")
    assert classifiers.two_sample_test(same_as(np.full((20, 2), 9.0)), "").n == 20


# --- probes ---------------------------------------------------------------------------------------------------------


def test_a_perfect_code_is_read_perfectly_and_a_useless_one_by_chance():
    rng = np.random.default_rng(10)
    y = rng.integers(0, 5, 2000)
    perfect = np.eye(5)[y] * 4 + 0.1 * rng.standard_normal((2000, 5))
    useless = rng.standard_normal((2000, 5))
    train, test = (codes_of(perfect[part], y=y[part]) for part in (slice(1000), slice(1000, None)))
    for name, probe in classifiers.probes(train, test, "table").items():
        assert (probe.value, probe.stderr, probe.unit, probe.n) == (1, 0, "accuracy", 1000), name
        assert "fitted on 1,000 codes" in probe.protocol
    train, test = (codes_of(useless[part], y=y[part]) for part in (slice(1000), slice(1000, None)))
    for probe in classifiers.probes(train, test, "").values():
        assert abs(probe.value - 0.2) < 4 * probe.stderr
        assert probe.stderr == pytest.approx(math.sqrt(probe.value * (1 - probe.value) / 999))


def test_the_linear_probe_is_linear_and_neighbours_ignore_units_out_of_use():
    rng = np.random.default_rng(11)
    loc = rng.standard_normal((2000, 2))
    y = (loc[:, 0] * loc[:, 1] > 0).astype(int)
    loc = np.concatenate([loc, 1e-3 * rng.standard_normal((2000, 30))], 1)
    train, test = (codes_of(loc[part], y=y[part]) for part in (slice(1000), slice(1000, None)))
    found = classifiers.probes(train, test, "")
    assert found["linear_probe"].value < 0.58
    assert found["knn_probe"].value > 0.93


def test_probes_need_labels_and_classes():
    loc = np.zeros((10, 2))
    with pytest.raises(TypeError, match="the data have no labels"):
        classifiers.probes(codes_of(loc), codes_of(loc), "")
    one = codes_of(loc, y=np.ones(10, int))
    with pytest.raises(UsageError, match="2 classes to be fitted on: got 10, 1"):
        classifiers.probes(one, one, "")


# --- encoding -------------------------------------------------------------------------------------------------------


def test_codes_are_the_draws_and_rates_of_the_elbo_and_batches_change_nothing():
    model = linear_vae(3).train()
    data = dataset(sample_images(model, 230))
    codes = latents.encode(model, data, "test")
    assert model.training, "the mode is restored"
    draw = model.draw(data.test.x, noise=next(data.batches("test", 230))[1])
    np.testing.assert_allclose(codes.z, draw.z[0][0].detach(), atol=1e-6)
    np.testing.assert_allclose(codes.log_qz, draw.log_qz[0].detach(), atol=1e-4)
    np.testing.assert_allclose(codes.log_pz, draw.log_pz[0].detach(), atol=1e-5)
    np.testing.assert_allclose(codes.loc, draw.qz.mean.detach(), atol=1e-6)
    np.testing.assert_allclose(codes.log_scale, draw.qz.log_scale.detach(), atol=1e-6)
    _, rate = elbo_terms(model, [(Batch(data.test.x), RowNoise(0))])
    np.testing.assert_allclose(codes.rate.sum(1), rate, atol=1e-4)
    for options in ({"batch_size": 37}, {"batch_size": 230}, {"limit": 100}, {"limit": 100, "batch_size": 64}):
        other = latents.encode(model, data, "test", **options)
        count = options.get("limit", 230)
        assert len(other) == count
        for name in ("z", "loc", "log_scale", "log_pz", "rate"):
            np.testing.assert_allclose(getattr(other, name), getattr(codes, name)[:count], atol=1e-6)
        if count == 230:
            for metric in (latents.mutual_information, latents.aggregate_kl):
                assert metric(other, "").value == pytest.approx(metric(codes, "").value, abs=1e-6)


def test_dropout_is_off_and_dynamic_pixels_are_scored_binary(monkeypatch):
    run = override(recipe("conv-beta"), dropout=0.5)
    data = load("digits", protocol="dynamic")
    model = build_model(run, data.shape).train()
    seen, original = [], VAE.posterior
    monkeypatch.setattr(VAE, "posterior", lambda self, x, y=None: (seen.append(x), original(self, x, y))[1])
    first, again = (latents.encode(model, data, "train", limit=300, batch_size=size) for size in (500, 64))
    np.testing.assert_allclose(first.loc, again.loc, atol=1e-6)
    assert model.training
    assert torch.equal(seen[0], torch.cat(seen[1:]))
    assert set(seen[0].unique().tolist()) == {0.0, 1.0}


def test_the_mode_is_restored_after_a_failure_too():
    loc = np.zeros((10, 2))
    data = table(loc, 0.0)
    model = Table(lambda *_: 1 / 0, None, 2).train()
    with pytest.raises(ZeroDivisionError):
        latents.encode(model, data, "test")
    assert model.training


def test_global_generators_are_left_alone_and_the_prior_is_the_models_own():
    prior = Independent(Normal(torch.full((2,), 5.0), torch.full((2,), 0.1)), 1)
    torch.manual_seed(3)
    before, before_np = torch.get_rng_state(), np.random.get_state()[1].copy()
    codes = codes_of(np.zeros((2000, 2)), 0.0, prior=prior)
    again = codes_of(np.zeros((2000, 2)), 0.0, prior=prior)
    classifiers.two_sample_test(codes, "")
    latents.active_units(codes, "")
    assert torch.equal(torch.get_rng_state(), before)
    assert (np.random.get_state()[1] == before_np).all()
    np.testing.assert_array_equal(codes.z_prior, again.z_prior)
    np.testing.assert_allclose(codes.z_prior.mean(0), 5.0, atol=0.01)
    expected = 0.5 * ((1 + 25) / 0.01 - 1) + math.log(0.1)
    np.testing.assert_allclose(codes.rate, expected, rtol=1e-5)


def test_what_is_undefined_is_a_type_error():
    class Sampled(Independent):  # a density, but no mean
        def rsample_and_log_prob(self, shape, noise, *, stop=False):
            z = noise.normal("z", (self.batch_shape[0], *shape, 1)).transpose(0, 1).exp()
            return z, lambda: self.log_prob(z)

    flow = codes_of(
        np.zeros((40, 1)),
        posterior=lambda loc, s: Sampled(TransformedDistribution(Normal(loc, s.exp() * 0 + 1), ExpTransform()), 1),
    )
    assert latents.mutual_information(flow, "").value == pytest.approx(0, abs=1e-9)
    for undefined in (latents.active_units, latents.variance_of_means):
        with pytest.raises(TypeError, match="means are undefined for this model: its posterior Sampled"):
            undefined(flow, *[""] * (undefined is latents.active_units))

    class Point(Plain):  # a mean, but no density
        def rsample_and_log_prob(self, shape, noise, *, stop=False):
            return self.mean[None], None

    points = codes_of(np.random.default_rng(0).standard_normal((40, 2)), posterior=Point)
    assert latents.active_units(points, "").value == 2
    for undefined in (latents.mutual_information, latents.aggregate_kl):
        with pytest.raises(TypeError, match="undefined for this model: its posterior Point has no density"):
            undefined(points, "")


def test_an_overview_has_the_moments_of_draws_and_of_means(digits, monkeypatch):
    monkeypatch.setattr(latents, "FEW", 30)  # of slow densities alone
    data = replace(digits, train=digits.train.first(150))
    model = build_model(override(recipe("mlp"), seed=3), digits.shape)
    found, codes = overview(model, data, "validation", 100), latents.encode(model, data, "validation", limit=100)
    lists = {name: np.array(values) for name, values in found["per_dimension"].items()}
    np.testing.assert_allclose(lists["rate"], codes.rate.sum(0) / 100)
    np.testing.assert_allclose(lists["variance_of_means"], np.cov(codes.loc.T).diagonal())
    np.testing.assert_allclose(lists["mean"], codes.z.sum(0) / 100)
    np.testing.assert_allclose(lists["variance"], np.cov(codes.z.T).diagonal())
    assert found["metrics"]["active_units"].value == (lists["variance_of_means"] > 0.01).sum()
    assert found["metrics"]["mutual_information"].n == found["metrics"]["two_sample_accuracy"].n == 100
    assert found["metrics"]["active_units"].protocol.startswith("digits validation (first 100 images), ")
    probes = classifiers.probes(latents.encode(model, data, "train"), codes, "")
    assert {n: found["metrics"][n].value for n in probes} == {n: probe.value for n, probe in probes.items()}
    one = overview(model, data, "validation", 1)["per_dimension"]
    assert one["variance"] is None
    assert one["mean"] == pytest.approx(codes.z[0].tolist())


@pytest.mark.parametrize(("split", "count"), [("train", 30), ("validation", 25)])
def test_an_aggregate_of_slow_densities_is_of_few_codes(digits, monkeypatch, split, count):
    """Of a flow that needs passes of a network for each; where there are no more codes than these, of all of them."""
    monkeypatch.setattr(latents, "FEW", 30)
    data = replace(digits, train=digits.train.first(100), validation=digits.validation.first(25))
    model = build_model(override(recipe("mlp"), posterior=specs.IAF(3, 1, (8,))), digits.shape)
    metrics = overview(model, data, split, 80)["metrics"]
    codes = latents.encode(model, data, split, limit=count)
    log_q = [codes.batches[0].qz.log_prob(torch.from_numpy(z).float()[None]).detach().double() for z in codes.z]
    log_agg = torch.stack(log_q).logsumexp(1).numpy() - math.log(count)
    information = metrics["mutual_information"]
    assert information.n == metrics["aggregate_kl"].n == count
    assert information.value == pytest.approx((codes.log_qz - log_agg).mean(), abs=1e-4)
    assert metrics["aggregate_kl"].value == pytest.approx((log_agg - codes.log_pz).mean(), abs=1e-4)
    for name in ("mutual_information", "aggregate_kl"):
        assert ("(first 30 images)" in metrics[name].protocol) == (split == "train")
        assert f"aggregate of N={count} codes" in metrics[name].protocol
    assert ("(first 80 images)" in metrics["two_sample_accuracy"].protocol) == (split == "train")


def test_an_information_is_saturated_within_half_a_nat_of_its_limit():
    codes = codes_of(np.random.default_rng(0).standard_normal((50, 2)), -9.0)
    mi = latents.mutual_information(codes, "")
    for below, full in ((0.0, True), (0.49, True), (0.51, False), (2.0, False)):
        assert latents.saturated(replace(mi, value=math.log(50) - below)) == full


def test_nothing_to_encode_and_numbers_that_are_none_are_said():
    with pytest.raises(UsageError, match="no image of table test to encode: limit 0, 10 images"):
        codes_of(np.zeros((10, 2)), limit=0)
    loc = np.zeros((10, 2))
    loc[3] = np.nan
    with pytest.raises(FailureError, match="not all latents of table test are finite"):
        codes_of(loc)


def test_a_trained_model(digits):
    model = fit(override(recipe("mlp"), epochs=3), digits)
    train, test = (latents.encode(model, digits, split) for split in ("train", "test"))
    assert (len(train), len(test), test.y.tolist()) == (1437, 180, digits.test.y.tolist())
    found = classifiers.probes(train, test, "digits")
    assert found["linear_probe"].value > 0.7
    assert found["knn_probe"].value > 0.7
    mi, kl = latents.mutual_information(train, ""), latents.aggregate_kl(train, "")
    assert 0 < mi.value <= math.log(1437)
    assert mi.value + kl.value == pytest.approx((train.log_qz - train.log_pz).mean())
    with torch.no_grad():
        means = model.posterior(unit(digits.train.x)).mean
    assert latents.active_units(train, "").value == (means.var(0) > 0.01).sum() > 0

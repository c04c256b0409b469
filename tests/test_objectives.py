"""Objectives: identities on one draw, gradients in mean, closed forms, and that each of them trains and resumes."""

import dataclasses
import itertools
import math

import pytest
import torch
from torch import nn
from torch.distributions import Independent, MultivariateNormal, Normal, kl_divergence

from oracle import bend, dataset, exact_log_px, linear_vae, sample_images
from vaelab import objectives, samplers, specs
from vaelab.config import Augment, override
from vaelab.data.augment import augment
from vaelab.data.datasets import binarize_batch
from vaelab.divergences import (
    aggregate_log_prob,
    log_mean_exp,
    mmd_of_rows,
    permute_dimensions,
    resample,
    scale_gradient,
    similarity,
    squared_distances,
)
from vaelab.errors import UsageError
from vaelab.models import VAE, Batch, Draw
from vaelab.objectives.objective import means_of, sum_parts
from vaelab.posteriors import NormalPosterior
from vaelab.priors import UnitNormal
from vaelab.processes.distributed import Team
from vaelab.recipes import recipe
from vaelab.runs.folder import RunFolder
from vaelab.runtime import Noise, RowNoise, StepNoise
from vaelab.train import fit
from vaelab.training.compiling import can_compile
from vaelab.training.stepping import CompiledStep, _with_images
from vaelab.training.trainer import Trainer, build_model

CPU = torch.device("cpu")
NOISE = StepNoise(0, 0)


def vae(prior=specs.StandardNormal(), likelihood=specs.Bernoulli(), shape=(1, 8, 8)) -> VAE:
    torch.manual_seed(0)
    parts = specs.MLPEncoder((16,)), specs.DiagonalNormal(3), prior, specs.MLPDecoder((16,)), likelihood
    return VAE(*parts, shape)


def images(count: int = 6) -> Batch:
    return Batch(torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(1)))


def yields(objective, model, batch=None, noise=NOISE):
    """What an objective yields, as (name, loss), its networks, and what it returns; nobody steps."""
    networks = objective.networks(model)
    found, losses = {}, objective.losses(model, networks, batch or images(), noise)
    while True:
        try:
            names, values = next(losses)
        except StopIteration as end:
            return found, networks, end.value
        found |= {names: values} if isinstance(names, str) else dict(zip(names, values, strict=True))


def parts_of(objective, model, batch=None, noise=NOISE):
    return objective.parts(model, objective.networks(model), batch or images(), noise)


def gradient(loss, parameters):
    found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]


class Posed:
    """A model whose draws come with another posterior, or without a density."""

    def __init__(self, model, **changes):
        self._model, self._changes = model, changes

    def __getattr__(self, name):
        return getattr(self._model, name)

    def draw(self, *args, **kwargs):
        return dataclasses.replace(self._model.draw(*args, **kwargs), **self._changes)


# --- bounds, on one draw --------------------------------------------------------------------------------------------


def test_the_bound_of_one_sample_is_the_elbo_with_a_sampled_kl():
    model, batch = bend(linear_vae(4), 0.5), Batch(sample_images(linear_vae(4), 50))
    draw = model.draw(batch.x, noise=NOISE)
    by_hand = draw.log_px[0] - (draw.log_qz[0] - draw.log_pz[0])
    torch.testing.assert_close(parts_of(objectives.IWAE(1), model, batch)["bound"], by_hand, rtol=1e-6, atol=1e-5)


def test_analytic_and_sampled_kl_agree_in_mean():
    model, batch = bend(linear_vae(4), 0.5, 0.3), Batch(sample_images(linear_vae(4), 4000))
    analytic, sampled = (parts_of(rule, model, batch) for rule in (objectives.ELBO(), objectives.IWAE(1)))
    torch.testing.assert_close(analytic["distortion"], sampled["distortion"])
    difference = (analytic["distortion"] + analytic["rate"] + sampled["bound"]).detach().double()
    assert difference.mean().abs() <= 3 * difference.std() / len(difference) ** 0.5
    assert difference.std() > 0.1, "one of them is not the other"


@pytest.mark.parametrize(
    ("rule", "part", "of"),
    [(objectives.IWAE(6), "bound", "posterior_head"), (objectives.DReG(6), "bound", "decoder"),
     (objectives.DReG(6), "surrogate", "posterior_head"), (objectives.IWAE(4, 3), "bound", "posterior_head"),
     (objectives.IWAE(4, 3, elbo_share=0.4), "bound", "posterior_head"), (objectives.PIWAE(4, 3), "bound", "decoder"),
     (objectives.PIWAE(4, 3), "averaged", "posterior_head")],
)  # fmt: skip
def test_a_gradient_through_few_samples_is_the_whole_one_in_mean(rule, part, of):
    """The parts are the same numbers; their gradient agrees in mean over choices, and differs on each."""
    model, batch = bend(linear_vae(3), 0.8), images(4)
    parameters = list(getattr(model, of).parameters())
    whole, few = parts_of(rule, model, batch), dataclasses.replace(rule, backward_samples=2)
    noise = NOISE
    exact = torch.cat([g.flatten() for g in gradient(whole[part].mean(), parameters)])

    class Choosing(Noise):  # the same samples, and other choices of them
        def __init__(self, step):
            self._other = StepNoise(1, step)

        def drawn(self, sampler, stream, shape):
            return (noise if sampler is torch.randn else self._other).drawn(sampler, stream, shape)

    drawn = []
    for step in range(1600):
        parts = parts_of(few, model, batch, Choosing(step))
        for name in whole.keys() - {"surrogate"}:  # which is a gradient alone
            torch.testing.assert_close(parts[name], whole[name], rtol=1e-6, atol=1e-5)
        drawn.append(torch.cat([g.flatten() for g in gradient(parts[part].mean(), parameters)]))
    found = torch.stack(drawn).double()
    error = (found.mean(0) - exact.double()) / (found.std(0) / 40 + 1e-9)
    assert error.abs().max() < 4.5
    assert error.square().mean() < 2
    assert (found.std(0) > 1e-4).float().mean() > 0.5, "a choice makes no difference"


def test_resampling_picks_by_weight():
    share = torch.tensor([[0.0], [1.0], [-2.0], [2.0]]).softmax(0).expand(-1, 3)
    u = torch.rand(3, 20_000, generator=torch.Generator().manual_seed(0))
    drawn = torch.stack([(resample(share, u) == k).float().mean(1) for k in range(4)])
    torch.testing.assert_close(drawn, share, atol=2e-3, rtol=0)
    assert resample(share, torch.ones(3, 5)).max() == 3, "rounding leads beyond no end"


def test_few_samples_and_a_sigma_that_each_scoring_sets_are_refused():
    model = vae(likelihood=specs.OptimalGaussian())
    with pytest.raises(UsageError, match="would set its sigma twice: take --likelihood gaussian"):
        objectives.IWAE(4, backward_samples=1).groups(model, nn.ModuleDict())
    for kind in (objectives.DReG, objectives.PIWAE):
        with pytest.raises(UsageError, match="would set its sigma twice"):
            kind(4, backward_samples=1).groups(model, nn.ModuleDict())
    assert objectives.IWAE(4).groups(model, nn.ModuleDict())


@pytest.mark.parametrize("kind", [objectives.IWAE, objectives.DReG, objectives.PIWAE])
@pytest.mark.parametrize("side", ["encoder", "decoder"])
def test_few_samples_and_batch_norm_are_refused(kind, side):
    """Of the samples that are chosen it would make other means than of all."""
    run = override(recipe("conv-2d"), **{f"{side}_batch_norm": True})
    model = build_model(run, (1, 28, 28))
    with pytest.raises(UsageError, match="batch norm would normalise otherwise: leave one out"):
        kind(4, backward_samples=1).groups(model, nn.ModuleDict())
    assert kind(4).groups(model, nn.ModuleDict())


def test_few_samples_and_dropout_are_refused():
    """It would draw other masks for the samples that are chosen."""
    model = build_model(override(recipe("conv-2d"), dropout=0.1), (1, 28, 28))
    with pytest.raises(UsageError, match="dropout would draw other masks: leave one out"):
        objectives.PIWAE(4, backward_samples=1).groups(model, nn.ModuleDict())
    assert objectives.PIWAE(4).groups(model, nn.ModuleDict())


def test_averages_of_bounds_are_what_their_names_say():
    """MIWAE averages M bounds of K samples; CIWAE adds a share of the mean log weight; the ends are IWAE and ELBO."""
    model, batch, (samples, bounds) = bend(linear_vae(3), 0.6), images(5), (4, 3)
    log_w = model.draw(batch.x, num_samples=samples * bounds, noise=NOISE).log_w
    of_each = torch.stack([log_mean_exp(log_w[m::bounds]) for m in range(bounds)])

    def bound(*args, **options):
        return parts_of(objectives.IWAE(*args, **options), model, batch)["bound"]

    torch.testing.assert_close(bound(samples, bounds), of_each.mean(0))
    torch.testing.assert_close(bound(samples * bounds), log_mean_exp(log_w))
    torch.testing.assert_close(bound(1, samples * bounds), log_w.mean(0))
    torch.testing.assert_close(bound(samples * bounds, elbo_share=1.0), log_w.mean(0))
    mixed = 0.3 * log_w.mean(0) + 0.7 * of_each.mean(0)
    torch.testing.assert_close(bound(samples, bounds, elbo_share=0.3), mixed)
    piwae = parts_of(objectives.PIWAE(samples, bounds), model, batch)
    torch.testing.assert_close(piwae["bound"], log_mean_exp(log_w))
    torch.testing.assert_close(piwae["averaged"], of_each.mean(0))
    alone = parts_of(objectives.PIWAE(samples, 1), model, batch)
    torch.testing.assert_close(alone["bound"], alone["averaged"])


def test_piwae_trains_each_side_by_its_own_bound():
    model, batch = vae(), images()
    groups = objectives.PIWAE().groups(model, nn.ModuleDict())
    found, _, _ = yields(objectives.PIWAE(3, 2), model, batch)
    for name, alike in (("decoder", objectives.IWAE(6)), ("encoder", objectives.IWAE(3, 2))):
        expected = gradient(yields(alike, model, batch)[0]["model"], groups[name])
        torch.testing.assert_close(gradient(found[name], groups[name]), expected)


# --- gradients, in mean ---------------------------------------------------------------------------------------------


class Many(nn.Module):
    """x = w z + sigma eps in float64, with parameters of its own for each row: one backward pass, many gradients."""

    def __init__(self, rows, loc, log_scale, sigma=0.7, w=1.3):
        super().__init__()
        self.posterior_head = nn.ParameterDict({"loc": _rows(loc, rows), "log_scale": _rows(log_scale, rows)})
        self.decoder = nn.ParameterDict({"w": _rows(w, rows)})
        self.prior_part, self.sigma = nn.Identity(), sigma

    @classmethod
    def exact(cls, rows, x, sigma=0.7, w=1.3):
        """With the true posterior of x."""
        precision = 1 + w**2 / sigma**2
        return cls(rows, w * x / sigma**2 / precision, -0.5 * math.log(precision))

    def draw(self, x, y=None, num_samples=1, *, noise, stop_qz=False):
        qz = NormalPosterior(self.posterior_head["loc"], self.posterior_head["log_scale"])
        z, log_density = qz.rsample_and_log_prob((num_samples,), noise, stop=stop_qz)
        log_px = Normal(z * self.decoder["w"], self.sigma).log_prob(x).sum(-1)
        one = torch.ones(1, dtype=torch.float64)
        return Draw((z,), log_px, x.new_zeros(len(x)), qz, UnitNormal(0 * one, one), log_density)


def _rows(value, rows):
    return nn.Parameter(torch.full((rows, 1), value, dtype=torch.float64))


X = 0.9


def gradients_of(objective, model, group="posterior_head"):
    """(rows, parameters): one gradient for each draw of the noise."""
    rows = len(model.decoder["w"])
    batch = Batch(torch.full((rows, 1), X, dtype=torch.float64))
    found, _, _ = yields(objective, model, batch)
    loss = found.get("model", found.get("encoder"))
    return rows * torch.cat(gradient(loss, list(getattr(model, group).values())), 1)


def errors_of_mean(difference):
    """Each mean in its own standard errors."""
    return (difference.mean(0) / (difference.std(0) / len(difference) ** 0.5)).abs()


@pytest.mark.parametrize("kind", [objectives.IWAE, objectives.PIWAE, objectives.DReG])
def test_samples_grow(kind):
    rule = kind(50, warm_samples=(1, 5), warm_epochs=(3, 2))
    assert [rule.at(epoch) for epoch in (0.0, 2.9, 3.0, 4.9, 5.0, math.inf)] == [
        kind(1), kind(1), kind(5), kind(5), kind(50), kind(50)
    ]  # fmt: skip
    assert rule.annealing_epochs == 5
    with pytest.raises(UsageError, match="each count needs epochs"):
        kind(50, warm_samples=(1, 5), warm_epochs=(3,))


@pytest.mark.parametrize("samples", [1, 2, 8])
def test_dreg_is_iwaes_gradient_in_mean_with_less_variance(samples):
    model = Many(20_000, loc=0.1, log_scale=-0.9)
    dreg, iwae = (gradients_of(rule, model) for rule in (objectives.DReG(samples), objectives.IWAE(samples)))
    assert (errors_of_mean(dreg - iwae) < 4).all()
    assert (errors_of_mean(iwae) > 10).any(), "a gradient that is told from none"
    assert (dreg.var(0) < iwae.var(0)).all()


def test_stl_is_the_elbos_gradient_at_one_sample_and_biased_at_more():
    model = Many(20_000, loc=0.1, log_scale=-0.9)
    one, elbo = (gradients_of(rule, model) for rule in (objectives.STL(1), objectives.ELBO()))
    assert (errors_of_mean(one - elbo) < 4).all()
    several, iwae = (gradients_of(rule, model) for rule in (objectives.STL(8), objectives.IWAE(8)))
    assert (errors_of_mean(several - iwae) > 6).any()


@pytest.mark.parametrize("samples", [1, 4])
def test_at_the_true_posterior_stl_has_no_gradient_at_all(samples):
    model = Many.exact(500, X)
    assert gradients_of(objectives.STL(samples), model).abs().max() < 1e-12
    assert gradients_of(objectives.DReG(samples), model).abs().max() < 1e-12
    for noisy in (objectives.ELBO(), objectives.IWAE(samples)):
        assert gradients_of(noisy, model).std(0).min() > 0.01


# --- weights on the rate --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("capacity", [0.1, 50.0])
def test_capacity_pulls_the_mean_rate_from_either_side(capacity):
    rule, model = objectives.Capacity(gamma=7.0, capacity=capacity, capacity_epochs=4.0), vae()
    means = means_of(parts_of(objectives.ELBO(), model))
    for epoch, reached in ((0, 0.0), (1, capacity / 4), (9, capacity)):
        expected = means["distortion"] + 7 * (means["rate"] - reached).abs()
        torch.testing.assert_close(yields(rule.at(epoch), model)[2]["loss"], expected.detach())


def test_free_bits_are_free():
    """Below lambda a dimension costs lambda and gets no gradient; above it costs its mean rate."""
    model, batch = vae(), images()
    with torch.no_grad():
        model.posterior_head.loc_and_log_scale.bias[0] += 2.0  # one dimension with a rate far above the others'
    means = means_of(parts_of(objectives.FreeBits(), model, batch))
    rates = means["rates"]
    free = float(rates.detach().sort().values[-2:].mean())
    loss = objectives.FreeBits(free).loss(means)
    torch.testing.assert_close(loss, means["distortion"] + 2 * free + rates.max())
    (grad,) = torch.autograd.grad(loss, rates)
    assert grad.tolist() == [1.0, 0.0, 0.0]


def test_balanced_kl_has_the_elbos_value_and_shared_out_gradients():
    model, alpha = vae(specs.Mixture(4)), 0.8
    found, _, _ = yields(objectives.BalancedELBO(alpha), model)
    draw = model.draw(images().x, noise=NOISE)
    distortion, rate = -draw.log_px.mean(), (draw.log_qz - draw.log_pz).mean()
    torch.testing.assert_close(found["model"], distortion + rate)
    prior, encoder, decoder = (list(p.parameters()) for p in (model.prior_part, model.encoder, model.decoder))
    for parameters, of_distortion, of_rate in ((prior, 0, alpha), (encoder, 1, 1 - alpha), (decoder, 1, 0)):
        terms = zip(gradient(distortion, parameters), gradient(rate, parameters), strict=True)
        expected = [of_distortion * a + of_rate * b for a, b in terms]
        torch.testing.assert_close(gradient(found["model"], parameters), expected, rtol=1e-4, atol=1e-6)


def test_a_scaled_gradient_leaves_the_numbers_as_they_are():
    """To the last bit, also where the factor is large: at a balance of 0.01 that of latents is 99."""
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0)).requires_grad_()
    scaled = scale_gradient(x, 99.0)
    assert torch.equal(scaled, x)
    (grad,) = torch.autograd.grad(scaled.sum(), x)
    assert torch.equal(grad, torch.full_like(x, 99.0))


# --- the aggregate posterior ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("weighting", ["weighted", "stratified"])
def test_the_rate_is_the_sum_of_its_three_parts_on_every_draw(weighting):
    rule, model = objectives.BetaTC(1.0, 1.0, 1.0, weighting), bend(linear_vae(4), 0.3, 0.2)
    batch = Batch(sample_images(linear_vae(4), 40), total=1000)
    parts, one = parts_of(rule, model, batch), parts_of(objectives.IWAE(1), model, batch)
    torch.testing.assert_close(parts["mi"] + parts["tc"] + parts["dwkl"], one["rate"], rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(parts["rate"], one["rate"], rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(rule.loss(means_of(parts)), -one["bound"].mean())
    heavy = objectives.BetaTC(2.0, 3.0, 4.0, weighting).loss(means_of(parts))
    added = parts["mi"].mean() + 2 * parts["tc"].mean() + 3 * parts["dwkl"].mean()
    torch.testing.assert_close(heavy, rule.loss(means_of(parts)) + added)


def codes_of(size, dim=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    loc, scale = torch.randn(size, dim, generator=g).double(), torch.rand(size, dim, generator=g).double() + 0.1
    return loc + scale * torch.randn(size, dim, generator=g), Normal(loc, scale)


@pytest.mark.parametrize(
    ("weighting", "own", "rest"), [("weighted", 1 / 250, 1 / 250), ("stratified", 1 / 50, 49 / 200)]
)
def test_the_aggregates_densities_are_sums_over_the_batch(weighting, own, rest):
    z, q = codes_of(5)
    log_qz, log_qz_d = aggregate_log_prob(z, q, 50, weighting)
    for i in range(5):
        weights = [own if i == j else rest for j in range(5)]
        p = torch.stack([Normal(q.loc[j], q.scale[j]).log_prob(z[i]).exp() for j in range(5)])
        torch.testing.assert_close(log_qz[i].exp(), sum(w * p[j].prod() for j, w in enumerate(weights)))
        torch.testing.assert_close(log_qz_d[:, i].exp(), sum(w * p[j] for j, w in enumerate(weights)))


def test_stratified_weights_give_the_density_of_all_the_data_in_mean_over_all_batches():
    z, q = codes_of(6)
    whole = torch.stack([Independent(Normal(q.loc[j], q.scale[j]), 1).log_prob(z[0]).exp() for j in range(6)]).mean()
    batches = [[0, *others] for others in itertools.combinations(range(1, 6), 2)]
    estimates = {
        weighting: torch.stack(
            [
                aggregate_log_prob(z[rows], Normal(q.loc[rows], q.scale[rows]), 6, weighting)[0][0].exp()
                for rows in batches
            ]
        )
        for weighting in ("weighted", "stratified")
    }
    torch.testing.assert_close(estimates["stratified"].mean(), whole)
    assert estimates["weighted"].mean() < 0.9 * whole
    alone = aggregate_log_prob(z, q, 6, "stratified")[0][0].exp()
    torch.testing.assert_close(alone, whole, msg="a batch that is all the data")


def test_total_correlation_of_normal_codes_is_the_known_one():
    """Codes whose aggregate is N(0, S): TC = -1/2 log det of the correlation matrix, mi and dwkl in closed form too."""
    torch.manual_seed(0)
    size, noise = 2500, 0.6
    aggregate = torch.tensor([[1.6, 0.9], [0.9, 1.4]], dtype=torch.float64)
    inner = MultivariateNormal(torch.zeros(2, dtype=torch.float64), aggregate - noise**2 * torch.eye(2))
    q = Normal(inner.sample((size,)), torch.full((size, 2), noise, dtype=torch.float64))
    z = q.sample()
    log_qz, log_qz_d = aggregate_log_prob(z, q, size, "stratified")
    variances = aggregate.diagonal()
    expected = {
        "tc": 0.5 * (variances.log().sum() - aggregate.logdet()),
        "mi": 0.5 * aggregate.logdet() - 2 * math.log(noise),
        "dwkl": 0.5 * (variances - 1 - variances.log()).sum(),
    }
    log_pz = Normal(0, 1).log_prob(z).sum(1)
    parts = {"tc": log_qz - log_qz_d.sum(0), "mi": q.log_prob(z).sum(1) - log_qz, "dwkl": log_qz_d.sum(0) - log_pz}
    for name, values in parts.items():
        # Besides the draw of z, the means themselves are a sample: twice the variance bounds both.
        assert (values.mean() - expected[name]).abs() < 3 * (2 * values.var() / size) ** 0.5, name


def test_only_products_of_normal_dimensions_have_these_parts():
    full = MultivariateNormal(torch.zeros(6, 3), torch.eye(3))
    for rule in (objectives.BetaTC(), objectives.DIP()):
        with pytest.raises(TypeError, match="independent normal dimensions, and MultivariateNormal is none"):
            parts_of(rule, Posed(vae(), qz=full))


def test_permuted_codes_keep_each_marginal_and_lose_the_joint():
    torch.manual_seed(0)
    size = 4000
    shared = torch.randn(size, 1)
    z = 0.95 * shared + 0.3 * torch.randn(size, 4)
    permuted = permute_dimensions(z, NOISE)
    assert torch.equal(permuted.sort(0).values, z.sort(0).values), "every column holds the same numbers"
    assert torch.equal(permuted, permute_dimensions(z, NOISE))
    assert not torch.equal(permuted, permute_dimensions(z, StepNoise(0, 1)))
    off = ~torch.eye(4, dtype=torch.bool)
    assert torch.corrcoef(z.mT)[off].min() > 0.85
    assert torch.corrcoef(permuted.mT)[off].abs().max() < 4 / size**0.5
    assert torch.corrcoef(torch.cat([z, permuted], 1).mT)[:4, 4:].abs().max() < 4 / size**0.5, "each column is moved"


def test_a_trained_critic_measures_the_total_correlation():
    torch.manual_seed(0)
    model, rule = bend(linear_vae(2)), objectives.Factor(critic_dims=(32,))
    with torch.no_grad():  # codes of which the second follows the first
        weight = model.posterior_head.loc_and_log_scale.weight
        weight[1] += 1.5 * weight[0]
    x = sample_images(linear_vae(2), 6000)
    codes = model.draw(x, noise=StepNoise(1, 0)).z[0][0].detach()
    known = -0.5 * float(torch.corrcoef(codes.mT).logdet())  # the aggregate is normal
    networks = rule.networks(model)
    optimizer = torch.optim.Adam(networks.parameters(), 3e-3)
    for step in range(200):
        batch = Batch(x[torch.randperm(6000)[:1000]])
        (_, (_, loss)) = next(rule.losses(model, networks, batch, StepNoise(0, step)))
        optimizer.zero_grad()
        loss.backward(inputs=list(networks.parameters()))
        optimizer.step()
    found = rule.parts(model, networks, Batch(x), StepNoise(1, 0))["tc"].detach().mean()
    assert known > 0.3
    assert abs(float(found) - known) < 0.15 * known


# --- moments and samples --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("covariance", ["means", "codes"])
def test_dip_weighs_the_covariance_of_means_or_of_codes(covariance):
    rule, model, batch = objectives.DIP(covariance, 2.0, 3.0), vae(), images(50)
    qz = model.posterior(batch.x)
    c = torch.cov(qz.loc.mT, correction=0) + (qz.variance.mean(0).diag() if covariance == "codes" else 0)
    off = c - c.diagonal().diag()
    expected = 2 * off.square().sum() + 3 * (c.diagonal() - 1).square().sum()
    means = means_of(parts_of(rule, model, batch))
    torch.testing.assert_close(rule.loss(means) - objectives.ELBO().loss(means), expected, rtol=1e-3, atol=1e-4)
    assert expected > 0.1


def test_what_dip_monitors_does_not_depend_on_how_the_data_are_cut():
    rule, model, x = objectives.DIP(), vae(), images(50).x
    none = nn.ModuleDict()
    zeros = {name: torch.zeros_like(part[0], dtype=torch.float64) for name, part in parts_of(rule, model).items()}
    losses = []
    for size in (50, 17):
        cut = [(Batch(x[i : i + size]), RowNoise(0, i)) for i in range(0, 50, size)]
        sums = sum_parts(rule, model, none, cut, zeros)
        losses.append(rule.loss({name: total / 50 for name, total in sums.items()}))
    torch.testing.assert_close(*losses)


@pytest.mark.parametrize("kernel", ["imq", "rbf"])
def test_the_discrepancy_is_gretton_s_estimate(kernel):
    torch.manual_seed(0)
    x, y = torch.randn(7, 3, dtype=torch.float64), torch.randn(7, 3, dtype=torch.float64) + 1
    torch.testing.assert_close(squared_distances(x, y), torch.cdist(x, y).square())

    def k(a, b):
        s = float((a - b).square().sum())
        if kernel == "rbf":
            return math.exp(-s / 6)
        return sum(6 * a / (6 * a + s) for a in (0.1, 0.2, 0.5, 1, 2, 5, 10))

    pairs = [(i, j) for i in range(7) for j in range(7)]
    within = sum(k(a[i], a[j]) for a in (x, y) for i, j in pairs if i != j) / 42
    across = 2 * sum(k(x[i], y[j]) for i, j in pairs) / 49
    assert float(mmd_of_rows(x, y, kernel).mean()) == pytest.approx(within - across, rel=1e-9)


@pytest.mark.parametrize("shift", [0.0, 0.7])
def test_the_discrepancy_is_unbiased(shift):
    """In mean it is the known one of two normal distributions under the Gaussian kernel, and 0 for equal ones."""
    torch.manual_seed(0)
    dim, scale = 3, 1.0 if shift == 0 else 1.4
    c = 2.0 * dim

    def expected(mean, variance):  # E exp(-|d|^2 / c), d ~ N(mean, variance I)
        return (1 + 2 * variance / c) ** (-dim / 2) * math.exp(-dim * mean**2 / (c + 2 * variance))

    exact = expected(0, 2 * scale**2) + expected(0, 2) - 2 * expected(shift, scale**2 + 1)
    x, y = shift + scale * torch.randn(600, 16, dim), torch.randn(600, 16, dim)
    found = torch.stack([mmd_of_rows(a, b, "rbf").mean() for a, b in zip(x, y, strict=True)])
    assert abs(float(found.mean()) - exact) < 3 * float(found.std()) / 600**0.5
    assert shift or (found < 0).any(), "an unbiased estimate of 0 is negative now and then"


def test_kernels_are_positive_definite():
    z = torch.randn(40, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for kernel in ("imq", "rbf"):
        gram = similarity(squared_distances(z, z), 3, kernel)
        assert torch.linalg.eigvalsh(gram).min() > 0


def test_mmd_asks_for_a_rate_only_if_it_has_a_weight():
    bare = Posed(vae(), qz=MultivariateNormal(torch.zeros(6, 3), torch.eye(3)), log_density=None)
    assert parts_of(objectives.MMD(), bare).keys() == {"distortion", "mmd", "penalty"}
    full = Posed(vae(specs.Mixture(3)), log_density=None)
    with pytest.raises(TypeError, match="has no density"):
        parts_of(objectives.MMD(rate_weight=0.5), full)
    means = means_of(parts_of(objectives.MMD(2.0, 0.5), vae()))
    expected = means["distortion"] + 2 * means["mmd"] + 0.5 * means["rate"]
    torch.testing.assert_close(objectives.MMD(2.0, 0.5).loss(means), expected)
    assert (objectives.MMD().beta, objectives.MMD(rate_weight=0.5).beta) == (0.0, 0.5)


@pytest.mark.parametrize("rule", [objectives.MMD(), objectives.AAE((4,))])
def test_a_prior_that_nothing_would_train_is_refused(rule):
    model = vae(specs.Mixture(3))
    with pytest.raises(UsageError, match=f"--objective {rule.word} leads the codes to a prior that stays"):
        rule.groups(model, rule.networks(model))
    weighed = objectives.MMD(rate_weight=1.0)
    assert len(weighed.groups(model, nn.ModuleDict())["model"]) == len(list(model.parameters()))


# --- critics --------------------------------------------------------------------------------------------------------


def test_a_critic_at_a_loss_costs_everyone_log_two():
    model = vae()
    for rule in (objectives.AAE((8,)), objectives.Factor(critic_dims=(8,))):
        networks = rule.networks(model)
        with torch.no_grad():
            for parameter in networks["critic"][-2].parameters():
                parameter.zero_()
        parts = rule.parts(model, networks, images(), NOISE)
        half = torch.full((6,), math.log(2))
        torch.testing.assert_close(parts["critic"], half)
        torch.testing.assert_close(parts.get("adversarial", half + parts.get("tc", 0)), half)


def test_an_adversarial_autoencoder_reconstructs_then_tells_then_fools():
    """Each later loss sees what the earlier steps have changed, and reaches its own group alone."""
    rule, model, batch = objectives.AAE((8,)), vae(), images()
    networks = rule.networks(model)
    groups = rule.groups(model, networks)
    losses = rule.losses(model, networks, batch, NOISE)
    name, loss = next(losses)
    assert name == "autoencoder"
    torch.testing.assert_close(loss, parts_of(rule, model, batch)["distortion"].mean())
    with torch.no_grad():
        model.posterior_head.loc_and_log_scale.bias += 0.5
    name, loss = next(losses)
    assert name == "critic"
    torch.testing.assert_close(loss, rule.parts(model, networks, batch, NOISE)["critic"].mean())
    assert all(g.abs().sum() == 0 for g in gradient(loss, list(model.parameters())))
    assert any(g.abs().sum() > 0 for g in gradient(loss, groups["critic"]))
    with torch.no_grad():
        networks["critic"][-2].bias += 0.5
    name, loss = next(losses)
    assert name == "encoder"
    torch.testing.assert_close(loss, rule.parts(model, networks, batch, NOISE)["adversarial"].mean())
    assert any(g.abs().sum() > 0 for g in gradient(loss, groups["encoder"]))
    assert all(g.abs().sum() == 0 for g in gradient(loss, list(model.decoder.parameters())))


def test_aae_critic_and_encoder_pull_in_opposite_directions():
    """Along the encoder's gradient step the critic's loss rises: it is the one that is fooled."""
    rule, model = objectives.AAE((8,)), vae()
    networks = rule.networks(model)
    parts = rule.parts(model, networks, images(), NOISE)
    logits = networks["critic"](model.draw(images().x, noise=NOISE).z[0][0])
    torch.testing.assert_close(parts["adversarial"], -torch.sigmoid(logits).log())
    of_codes = 2 * parts["critic"] + torch.sigmoid(networks["critic"](model.prior().rsample_from(NOISE, 6))).log()
    torch.testing.assert_close(of_codes, -torch.sigmoid(-logits).log())


def test_vae_gan_losses_are_those_of_the_paper():
    rule, model, batch = objectives.VAEGAN(0.3), vae(), images()
    torch.manual_seed(3)
    found, networks, record = yields(rule, model, batch)
    assert networks["features"].spec is model.encoder.spec
    draw = model.draw(batch.x, noise=NOISE)
    pictures = batch.x, model.likelihood(draw.z[0][0]).mean, model.likelihood(model.prior().rsample_from(NOISE, 6)).mean
    features = [networks["features"](x) for x in pictures]
    odds = [torch.sigmoid(networks["verdict"](f)) for f in features]
    similarity_ = 0.5 * (features[0] - features[1]).square().sum(1).mean()
    log = torch.log
    torch.testing.assert_close(found["encoder"], draw.kl.mean() + similarity_)
    torch.testing.assert_close(found["decoder"], 0.3 * similarity_ - (log(odds[1]) + log(odds[2])).mean())
    told = log(odds[0]) + log(1 - odds[1]) + log(1 - odds[2])
    torch.testing.assert_close(found["critic"], -told.mean())
    torch.testing.assert_close(record["distortion"], -draw.log_px.mean().detach())
    assert "likelihood" not in found, "a Bernoulli has no parameters of its own"


def test_vae_gan_leaves_a_learned_sigma_to_the_likelihood():
    model = vae(likelihood=specs.Gaussian())
    found, networks, record = yields(objectives.VAEGAN(), model)
    groups = objectives.VAEGAN().groups(model, networks)
    assert groups["likelihood"] == [model.likelihood_head.log_sigma]
    torch.testing.assert_close(found["likelihood"], record["distortion"])
    everyone = [parameter for group in groups.values() for parameter in group]
    assert len(everyone) == len(set(everyone)) == len([*model.parameters(), *networks.parameters()])


@pytest.mark.parametrize(
    "likelihood", [specs.PixelGaussian(), specs.LogisticMixture(2), specs.Categorical256()], ids=str
)
def test_vae_gan_refuses_what_no_mean_image_shows(likelihood):
    model = vae(likelihood=likelihood)
    with pytest.raises(UsageError, match=f"the decoder of --likelihood {likelihood.word} learns more"):
        objectives.VAEGAN().groups(model, objectives.VAEGAN().networks(model))


# --- wake and sleep -------------------------------------------------------------------------------------------------


def test_the_wake_phase_is_the_gradient_of_the_joint_on_held_codes():
    rule, model, batch = objectives.WakeSleep(), vae(specs.Mixture(3), specs.Gaussian()), images()
    decoding = rule.groups(model, nn.ModuleDict())["decoder"]
    found, _, record = yields(rule, model, batch)
    z = model.draw(batch.x, noise=NOISE).z[0][0].detach()
    joint = model.likelihood(z).log_prob(batch.x) + model.prior().log_prob(z)
    torch.testing.assert_close(gradient(found["decoder"], decoding), gradient(-joint.mean(), decoding))
    bound = parts_of(objectives.IWAE(1), model, batch)["bound"].mean()
    torch.testing.assert_close(record["loss"], -bound.detach(), rtol=1e-5, atol=1e-4)


def test_the_sleep_phase_lowers_the_reverse_divergence():
    """On the same dreams the loss of a spoilt encoder exceeds the exact one's by KL(p(z|x) || q(z|x)), in mean."""
    rule, exact, spoilt = objectives.WakeSleep(), linear_vae(3), bend(linear_vae(3), 0.4, 0.3)
    size = 2000
    batch = Batch(torch.zeros(size, 1, 8, 8))
    losses = []
    for model in (exact, spoilt):
        torch.manual_seed(7)
        losses.append(float(yields(rule, model, batch)[0]["encoder"].detach()))
    torch.manual_seed(7)
    with torch.no_grad():
        z = exact.prior().rsample_from(NOISE, size)
        x = exact.likelihood(z).sample()
        true, other = exact.posterior(x), spoilt.posterior(x)
        gap = true.log_prob(z) - other.log_prob(z)
        known = kl_divergence(Independent(true.base_dist, 1), Independent(other.base_dist, 1))
    assert losses[1] - losses[0] == pytest.approx(float(gap.mean()), abs=1e-3), "both dreamt the same"
    difference = (gap - known).double()
    assert difference.mean().abs() < 3 * difference.std() / size**0.5
    assert known.mean() > 0.2


def test_wake_sleep_learns_the_true_posterior_of_a_fixed_decoder():
    rule, model = objectives.WakeSleep(), bend(linear_vae(2), 0.5, 0.4)
    encoding = rule.groups(model, nn.ModuleDict())["encoder"]
    optimizer, x = torch.optim.Adam(encoding, 0.02), sample_images(linear_vae(2), 300)

    def gap():
        with torch.no_grad():
            return float(
                kl_divergence(linear_vae(2).posterior(x).base_dist, model.posterior(x).base_dist).sum(1).mean()
            )

    before = gap()
    torch.manual_seed(0)
    for step in range(150):
        loss = yields(rule, model, Batch(x[:64]), StepNoise(0, step))[0]["encoder"]
        optimizer.zero_grad()
        loss.backward(inputs=encoding)
        optimizer.step()
    assert before > 0.3
    assert gap() < 0.2 * before


def test_a_posterior_that_scores_only_its_own_codes_cannot_sleep():
    class OwnCodesOnly(Independent):
        penalty = None

        def log_prob(self, value):
            raise NotImplementedError

    with pytest.raises(TypeError, match=r"wake-sleep scores codes .* OwnCodesOnly cannot"):
        parts_of(objectives.WakeSleep(), Posed(vae(), qz=OwnCodesOnly(Normal(torch.zeros(6, 3), 1.0), 1)))


# --- chains ---------------------------------------------------------------------------------------------------------


def mcem(model, x, steps, step=lambda group, loss: None, **settings):
    """Take steps of MCEM on all images at once; its chains' states after each, and its networks."""
    rule, batch = objectives.MCEM(**settings), Batch(x, None, torch.arange(len(x)))
    networks, states = rule.networks(model), []
    for number in range(steps):
        for names, losses in rule.losses(model, networks, batch, StepNoise(0, number)):
            for name, loss in zip(names, losses, strict=True):
                step(name, loss)
        states.append(networks["chains"].z.clone())
    return states, networks


def test_the_chains_of_mcem_draw_from_the_true_posterior():
    exact = linear_vae(3)
    x = sample_images(exact, 200)
    states, networks = mcem(exact, x, 300, weight_steps=1)
    with torch.no_grad():
        qz = exact.posterior(x).base_dist
    z = ((torch.stack(states[100:]) - qz.mean) / qz.stddev).double()  # standard normal: the encoder is exact
    assert z.mean().abs() < 0.02
    assert z.square().mean() == pytest.approx(1, abs=0.03)
    assert (z[..., 0] * z[..., 1]).mean().abs() < 0.03
    assert networks["chains"].log_eps > -2.0, "these proposals were accepted more often than nine times of ten"


def test_the_step_size_is_led_to_nine_of_ten_accepted(monkeypatch):
    seen, plain = [], samplers.hamiltonian

    def hamiltonian(*args):
        z, probability = plain(*args)
        seen.append(probability.mean())
        return z, probability

    monkeypatch.setattr(samplers, "hamiltonian", hamiltonian)
    mcem(linear_vae(3), sample_images(linear_vae(3), 100), 300, weight_steps=1)
    assert torch.stack(seen[200:]).mean() == pytest.approx(0.9, abs=0.03)
    assert torch.stack(seen[:5]).mean() > 0.95


def test_mcem_raises_the_exact_likelihood_whatever_the_encoder_is():
    x, model = sample_images(linear_vae(2), 400), bend(linear_vae(2), 2.0, 1.0)
    with torch.no_grad():
        model.decoder.layers[0].weight.mul_(0.5)
        model.decoder.layers[0].bias.add_(0.3)
    groups = objectives.MCEM().groups(model, nn.ModuleDict())
    optimizers = {name: torch.optim.Adam(group, 0.01) for name, group in groups.items()}

    def step(name, loss):
        optimizers[name].zero_grad()
        loss.backward(inputs=groups[name])
        optimizers[name].step()

    def shortfall():
        return float((exact_log_px(linear_vae(2), x) - exact_log_px(model, x)).mean())

    def gap():
        with torch.no_grad():
            qz, true = model.posterior(x).base_dist, linear_vae(2).posterior(x).base_dist
            return float(kl_divergence(true, qz).sum(1).mean())

    before, gap_before = shortfall(), gap()
    mcem(model, x, 120, step)
    assert before > 10
    assert abs(shortfall()) < 0.05 * before
    assert gap() < 0.2 * gap_before, "the encoder learns what the chains have found"


def test_each_image_has_its_chain_and_one_that_comes_first_begins_at_the_prior():
    rule, model, x = objectives.MCEM(weight_steps=1), linear_vae(3), sample_images(linear_vae(3), 8)
    networks = rule.networks(model)
    chains = networks["chains"]

    def visit(rows, step):
        list(rule.losses(model, networks, Batch(x[rows], None, torch.tensor(rows)), StepNoise(0, step)))

    visit([1, 5], 0)
    first = chains.z.clone()
    assert first.isnan().all(1).tolist() == [True, False, True, True, True, False]
    visit([7, 5], 1)
    assert len(chains.z) == 8
    assert torch.equal(chains.z[1], first[1]), "it was not its turn"
    assert not torch.equal(chains.z[5], first[5])
    start = torch.full((2, 3), 9.0)
    assert torch.equal(chains.of(torch.tensor([2, 5]), start), torch.stack([start[0], chains.z[5]]))


def test_dropout_and_precision_do_not_reach_the_chains():
    networks = specs.ConvEncoder((4,), (), dropout=0.5), specs.ConvDecoder((4, 4), (), batch_norm=True)
    rule, batch, found = objectives.MCEM(), dataclasses.replace(images(), index=torch.arange(6)), []
    for training, bf16 in ((False, False), (True, False), (True, True)):
        torch.manual_seed(0)
        parts = networks[0], specs.DiagonalNormal(2), specs.StandardNormal(), networks[1], specs.Bernoulli()
        model = VAE(*parts, (1, 8, 8)).train(training)
        kept = rule.networks(model)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            next(rule.losses(model, kept, batch, NOISE))
        assert model.training == training
        found.append(kept["chains"].z)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_mcem_is_no_compiled_step_and_stays_in_training_mode(digits, caplog, monkeypatch):
    run = dataclasses.replace(TINY, objective=objectives.MCEM())
    with caplog.at_level("INFO", "vaelab"):
        plain, asked = (trained(run, digits, 2, way) for way in ("off", "on"))
    assert caplog.messages.count("steps of --objective mcem are not compiled") == 1
    assert not asked.compiled
    assert torch.equal(plain.terms, asked.terms)

    def broken(x, z):
        raise RuntimeError("broken")

    monkeypatch.setattr(asked.model, "log_px", broken)
    with pytest.raises(RuntimeError, match="broken"):
        next(run.objective.losses(asked.model, asked.networks, digits.train.rows(slice(0, 4)), NOISE))
    assert asked.model.training


@pytest.mark.filterwarnings("ignore:.*which is a no-op")  # as on a GPU, but for the numbers
def test_chains_come_back_on_the_device_of_their_run():
    chains = objectives.MCEM().networks(linear_vae(3)).to("meta")
    chains.load_state_dict({"chains.z": torch.zeros(5, 3), "chains.log_eps": torch.tensor(0.5)})
    assert chains["chains"].z.device.type == "meta"
    assert chains["chains"].z.shape == (5, 3)


def test_mcem_trains_in_one_process_on_latents_that_fill_a_space(digits):
    run = dataclasses.replace(TINY, objective=objectives.MCEM())
    with pytest.raises(UsageError, match="--objective mcem keeps something of each image"):
        Trainer(run, digits, CPU, Team(0, 2))
    shared = dataclasses.replace(digits.train, index=torch.zeros_like(digits.train.index))
    with pytest.raises(UsageError, match="several images have the same"):
        Trainer(run, dataclasses.replace(digits, train=shared), CPU)
    with pytest.raises(UsageError, match="--objective mcem moves codes along gradients"):
        Trainer(dataclasses.replace(run, posterior=specs.VonMisesFisher(3), prior=specs.UniformSphere()), digits, CPU)


# --- in training ----------------------------------------------------------------------------------------------------

TINY = override(
    recipe("mlp"), data="digits", epochs=3, batch_size=64, latent_dim=4, encoder_hidden_dims=(32,),
    decoder_hidden_dims=(32,), learning_rate=3e-3,
)  # fmt: skip
RULES = [
    objectives.ELBO(), objectives.Capacity(capacity=3.0, capacity_epochs=0.0), objectives.FreeBits(),
    objectives.IWAE(3), objectives.PIWAE(2, 2), objectives.DReG(3), objectives.STL(), objectives.BetaTC(),
    objectives.BetaTC(weighting="stratified"), objectives.Factor(critic_dims=(16,)), objectives.DIP(),
    objectives.DIP("codes"), objectives.MMD(), objectives.MMD(rate_weight=0.5, kernel="rbf"), objectives.AAE((16,)),
    objectives.VAEGAN(), objectives.WakeSleep(), objectives.MCEM(),
]  # fmt: skip


def trained(run, data, steps, compiled="off"):
    trainer = Trainer(override(run, compile=compiled), data, CPU)
    for _ in range(steps):
        trainer.train_step()
    return trainer


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_twenty_steps_lower_the_loss(rule, digits):
    trainer = Trainer(dataclasses.replace(TINY, objective=rule), digits, CPU)
    if rule.word == "vae-gan":  # a similarity that is being learned has no fixed scale: hold it
        trainer.optimizers["critic"].step = lambda: None
    before = trainer.validate()["validation_loss"]
    for _ in range(20):
        trainer.train_step()
    losses = trainer.terms[:20, 0]
    assert trainer.steps_per_epoch > 20
    assert torch.isfinite(trainer.terms).all()
    assert losses[-5:].mean() < losses[:5].mean()
    assert trainer.validate()["validation_loss"] < before


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_one_image_alone_has_finite_parts(rule):
    """A validation set may end in a batch of one."""
    for name, part in parts_of(rule, vae(), images(1)).items():
        assert torch.isfinite(part).all(), name


def test_the_size_of_the_data_reaches_the_objective(digits):
    batch = digits.train.rows(torch.arange(3))
    assert batch.total == len(digits.train) == 1437
    assert digits.scored("validation", slice(0, 5)).total == len(digits.validation)
    for kept in (
        binarize_batch(batch, NOISE),
        augment(batch, Augment(5, 1, 1.0), NOISE),
        _with_images(batch, [batch.x, batch.index] if batch.y is None else [batch.x, batch.y, batch.index]),
    ):
        assert kept.total == 1437


def test_a_model_that_an_objective_cannot_train_is_refused_in_one_line():
    x = sample_images(linear_vae(2), 20)
    run = dataclasses.replace(TINY, objective=objectives.WakeSleep(), prior=specs.VampPrior(4))
    with pytest.raises(UsageError, match="--objective wake-sleep trains encoder and decoder apart"):
        Trainer(run, dataset(x.clamp(0, 1)), CPU)


VQ = {"encoder": specs.ResidualEncoder((4, 4)), "posterior": specs.VectorQuantized((7, 7), 5, 2),
      "prior": specs.UniformCodes(), "decoder": specs.ResidualDecoder((4, 4), from_grid=True)}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"posterior": specs.Deterministic(2)}, "has no density; rae, mmd and aae need no density"),
        ({"prior": specs.TwoStage()}, "not trained with it: vaelab refit RUN --prior two-stage"),
        ({"posterior": specs.IAF(2), "prior": specs.VampPrior(3)}, "^--prior vamp is made of normal posteriors"),
        ({**VQ, "objective": objectives.ELBO(beta=2.0)}, "the same for every image"),
        ({**VQ, "objective": objectives.ELBO(kl_warmup_epochs=1.0)}, "the same for every image"),
        ({**VQ, "objective": objectives.Capacity()}, "the same for every image"),
        ({"objective": objectives.IWAE(5, backward_samples=5)}, "must be fewer than --num-samples 5"),
    ],
)
def test_what_cannot_be_trained_or_changes_nothing_is_refused_with_what_would(changes, message, digits):
    with pytest.raises(UsageError, match=message) as caught:
        Trainer(dataclasses.replace(TINY, **changes), digits, CPU)
    assert "\n" not in str(caught.value)
    Trainer(dataclasses.replace(TINY, **{**VQ, "objective": objectives.ELBO()}), digits, CPU)


@pytest.mark.parametrize(
    "rule",
    [objectives.AAE((16,)), objectives.WakeSleep(), objectives.MCEM(), objectives.Factor(critic_dims=(16,))],
    ids=str,
)
def test_a_run_that_is_taken_up_again_is_the_run_that_was_not_left(rule, digits, tmp_path):
    run = dataclasses.replace(TINY, objective=rule)
    torch.manual_seed(1)
    whole = trained(run, digits, 8)
    torch.manual_seed(2)  # what torch's global generator does is none of a run's business
    torch.save(trained(run, digits, 4).state(), tmp_path / "state.pt")
    torch.manual_seed(3)
    parts = Trainer(run, digits, CPU)
    parts.load_state(torch.load(tmp_path / "state.pt", weights_only=True), None)
    for _ in range(4):
        parts.train_step()
    for name, value in whole.model.state_dict().items():
        assert torch.equal(parts.model.state_dict()[name], value), name
    for name, value in whole.networks.state_dict().items():
        torch.testing.assert_close(parts.networks.state_dict()[name], value, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(parts.terms[:8], whole.terms[:8])


def test_a_run_of_three_groups_that_dies_within_a_step_and_is_resumed_ends_with_the_same_bits(
    tmp_path, digits, monkeypatch
):
    run = override(recipe("mlp"), data="digits", epochs=2, batch_size=256, encoder_hidden_dims=(16,),
                   decoder_hidden_dims=(16,), objective="aae", critic_dims=(16,), save_every=2)  # fmt: skip
    fit(run, digits, out=tmp_path / "whole")

    def descend(trainer, names, original=Trainer._descend):
        if trainer.step == 7:
            raise RuntimeError("dead")
        return original(trainer, names)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_descend", descend)
        with pytest.raises(RuntimeError, match="dead"):
            fit(run, digits, out=tmp_path / "parts")
    assert RunFolder.open(tmp_path / "parts").load_last()["step"] == 6
    fit(run, digits, out=tmp_path / "parts", resume=True)
    whole, parts = (RunFolder.open(tmp_path / name) for name in ("whole", "parts"))
    last = whole.load_last(), parts.load_last()
    for kind in ("model", "networks"):
        for name, value in last[0][kind].items():
            assert torch.equal(last[1][kind][name], value), name
    assert [record["critic"] for record in whole.history()] == [record["critic"] for record in parts.history()]


TRACED = [rule for rule in RULES[7:] if rule.word not in ("aae", "mcem")]


@pytest.mark.parametrize("rule", TRACED, ids=str)
def test_the_traced_step_is_the_plain_one(rule, digits, uncompiled):
    """What the compiler is given; that what it makes of it is the same, is tested once, below."""
    run = override(dataclasses.replace(TINY, objective=rule), learning_rate=1e-4)
    plain, traced = (Trainer(run, digits, CPU) for _ in range(2))
    traced.compiled = True
    for trainer in (plain, traced):
        # Not Adam, which makes a whole step of a gradient that is nothing but rounding.
        trainer.optimizers = {name: torch.optim.SGD(group, 1e-4) for name, group in trainer.groups.items()}
        for _ in range(5):
            trainer.train_step()
    assert isinstance(traced._take_step, CompiledStep)
    assert not traced._take_step._failed
    torch.testing.assert_close(traced.terms[:5], plain.terms[:5], rtol=1e-5, atol=1e-3)
    for kind in ("model", "networks"):
        for name, value in getattr(plain, kind).state_dict().items():
            torch.testing.assert_close(getattr(traced, kind).state_dict()[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not can_compile(CPU), reason="no C++ compiler or no headers of Python here")
def test_the_compiled_step_of_two_groups_is_the_plain_one(digits):
    run = dataclasses.replace(TINY, objective=objectives.Factor(critic_dims=(16,)))
    plain, compiled = (trained(run, digits, 10, way) for way in ("off", "on"))
    assert isinstance(compiled._take_step, CompiledStep)
    assert not compiled._take_step._failed
    torch.testing.assert_close(compiled.terms[:10], plain.terms[:10], rtol=1e-4, atol=1e-3)
    for name, value in plain.networks.state_dict().items():
        torch.testing.assert_close(compiled.networks.state_dict()[name], value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("rule", [*RULES, objectives.RAE(gradient_penalty=1e-3), objectives.BalancedELBO()], ids=str)
def test_a_posteriors_penalty_is_in_every_loss(rule):
    means = means_of(parts_of(rule, vae()))
    of_drawn_codes = ("iwae", "piwae", "dreg", "stl", "wake-sleep", "mcem")  # which ask for densities of these
    if rule.word in of_drawn_codes:
        assert "penalty" not in means
        return
    more = {**means, "penalty": means["penalty"] + 3}
    torch.testing.assert_close(rule.loss(more), rule.loss(means) + 3, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    ("rule", "name"),
    [
        (rule, field.name)
        for rule in (*RULES, objectives.RAE(gradient_penalty=1e-3))
        for field in dataclasses.fields(rule)
        if isinstance(getattr(rule, field.name), float) and not field.name.endswith("_epochs")
    ],
    ids=str,
)
def test_every_weight_moves_a_loss(rule, name):
    found = []
    for value in (0.25, 1e6):
        torch.manual_seed(0)
        found.append(yields(dataclasses.replace(rule, **{name: value}), vae())[0])
    assert any(not torch.equal(found[0][group], found[1][group]) for group in found[0])


@pytest.mark.parametrize(
    "rule", [objectives.IWAE(4), objectives.DReG(4), objectives.STL(4), objectives.PIWAE(2, 2)], ids=str
)
def test_as_many_samples_as_asked_for_make_a_bound(rule):
    log_w = vae().draw(images().x, num_samples=4, noise=NOISE).log_w
    torch.testing.assert_close(parts_of(rule, vae())["bound"], log_mean_exp(log_w))


def test_recorded_terms_are_means_over_the_samples():
    model = vae()
    draw = model.draw(images().x, num_samples=4, noise=NOISE)
    parts = parts_of(objectives.IWAE(4), model)
    torch.testing.assert_close(parts["distortion"], -draw.log_px.mean(0))
    torch.testing.assert_close(parts["rate"], (draw.log_qz - draw.log_pz).mean(0))


@pytest.mark.parametrize("kernel", ["imq", "rbf"])
def test_the_kernel_that_is_asked_for_is_taken(kernel):
    codes = vae().draw(images().x, noise=NOISE).z[0][0]
    expected = mmd_of_rows(codes, NOISE.normal("prior", codes.shape), kernel)
    torch.testing.assert_close(parts_of(objectives.MMD(kernel=kernel), vae())["mmd"], expected)


@pytest.mark.parametrize("weighting", ["weighted", "stratified"])
def test_the_weighting_that_is_asked_for_is_taken(weighting):
    batch, model = dataclasses.replace(images(), total=100), vae()
    draw = model.draw(batch.x, noise=NOISE)
    log_qz, _ = aggregate_log_prob(draw.z[0][0], draw.qz.base_dist, 100, weighting)
    parts = parts_of(objectives.BetaTC(weighting=weighting), model, batch)
    torch.testing.assert_close(parts["mi"], draw.log_qz[0] - log_qz)

"""Continuous posteriors and flows: densities against integrals, Jacobians and closed forms; bounds against an exact one."""

import math
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import integrate, special
from torch.distributions import MultivariateNormal, kl_divergence
from torch.nn.functional import normalize

from oracle import SHAPE, LinearGaussian, exact_log_px, linear_vae, sample_images
from vaelab import specs
from vaelab.config import override
from vaelab.distribution import NoDensityError
from vaelab.divergences import analytic_kl, log_mean_exp
from vaelab.errors import UsageError
from vaelab.flows import MaskedFlow, Planar
from vaelab.models import VAE, Batch
from vaelab.objectives import ELBO, STL
from vaelab.posteriors import VonMisesFisherPosterior
from vaelab.posteriors.sphere import AngleLaw, log_area
from vaelab.priors.flow import FlowDistribution
from vaelab.priors.sphere import UniformOnSphere
from vaelab.recipes import recipe
from vaelab.runtime import Noise, RowNoise, StepNoise
from vaelab.training.compiling import can_compile
from vaelab.training.stepping import CompiledStep
from vaelab.training.trainer import Trainer

CPU = torch.device("cpu")
F64 = torch.float64
FLOWS = [specs.PlanarFlow(2, 3), specs.RadialFlow(2, 3), specs.IAF(2, 2, (16,))]
REAL = [
    specs.DiagonalNormal(3),
    specs.FullNormal(3),
    specs.PlanarFlow(3, 3),
    specs.RadialFlow(3, 3),
    specs.IAF(3, 2, (16,)),
]
KINDS = ["coupling", "maf", "nsf"]


class Given(Noise):
    """Noise that is given: every request for normal numbers (B, K, D) is answered with these."""

    def __init__(self, eps):
        self.eps = eps

    def drawn(self, sampler, stream, shape):
        assert sampler is torch.randn, "no uniform numbers are asked for here"
        assert tuple(shape) == self.eps.shape
        return self.eps


def random_posterior(spec, size=1, seed=0):
    """A posterior of random features, of weights that are large enough for the flow to matter."""
    torch.manual_seed(seed)
    head = spec.build(6)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.mul_(2.0)
    return head(torch.randn(size, 6))


def plane(width, count):
    """Points (count^2, 2) of a square of this half-width, and the area of each."""
    line = torch.linspace(-width, width, count, dtype=F64)
    return torch.cartesian_prod(line, line), float(line[1] - line[0]) ** 2


# --- flows ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", FLOWS, ids=str)
@pytest.mark.parametrize("seed", [0, 1])
@torch.no_grad()
def test_a_flows_density_is_normalised_where_it_samples(spec, seed):
    """E_q[g(z) / q(z)] = 1 for any density g: an integral over the base's noise, which needs no inverse."""
    qz = random_posterior(spec, seed=seed)
    eps, area = plane(8, 301)
    z, log_density = qz.rsample_and_log_prob((len(eps),), Given(eps.float()[None]))
    base = torch.exp(-0.5 * eps.square().sum(1)) / (2 * math.pi) * area
    scale = 0.5 * (base @ (z[:, 0] - qz.center[0]).double().square()).sqrt()
    g = torch.distributions.Normal(qz.center[0].double(), scale).log_prob(z[:, 0].double()).sum(-1)
    assert float((base * torch.exp(g - log_density()[:, 0])).sum()) == pytest.approx(1, abs=2e-3)
    moved = (z[:, 0] - qz.base.loc) / qz.base.scale - eps
    assert float((base * moved.norm(dim=-1)).sum()) > 0.05, "the flow is far from the identity"


@pytest.mark.parametrize("seed", [0, 1])
@torch.no_grad()
def test_the_density_of_iaf_integrates_to_one_over_the_plane(seed):
    z, area = plane(16, 401)
    log_q = random_posterior(FLOWS[2], seed=seed).log_prob(z.float()[:, None])
    assert float(log_q.double().exp().sum()) * area == pytest.approx(1, abs=2e-3)


@pytest.mark.parametrize(("kind", "weight", "width"), [("coupling", 1.5, 14), ("maf", 1.5, 14), ("nsf", 1.0, 10)])
@torch.no_grad()
def test_the_density_of_a_flow_prior_integrates_to_one_over_the_plane(kind, weight, width):
    torch.manual_seed(0)
    flow = MaskedFlow(2, 0, 2, (16,), kind)
    for parameter in flow.parameters():
        parameter.mul_(weight)
    pz = FlowDistribution(flow, torch.tensor([0.5, -1.0]), torch.tensor([0.7, 1.3]))
    z, area = plane(width, 301)
    p = pz.log_prob(z.float()).double().exp() * area
    assert float(p.sum()) == pytest.approx(1, abs=2e-3)
    sampled = pz.rsample_from(StepNoise(0, 0), 10_000).double()
    for power in (lambda a: a, lambda a: a.square(), lambda a: a.prod(1, keepdim=True)):
        expected, found = (p[:, None] * power(z)).sum(0), power(sampled)
        assert ((found.mean(0) - expected).abs() < 4 * found.std(0) / 100 + 5e-3).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dim", [1, 2, 5])
def test_a_masked_flows_inverse_and_its_log_determinant(kind, dim):
    """Back and forth is the identity, and autograd's Jacobian has the determinant that the flow says."""
    torch.manual_seed(0)
    flow = MaskedFlow(dim, 3, 3, (12,), kind).double()
    z, context = torch.randn(4, dim, dtype=F64), torch.randn(4, 3, dtype=F64)
    image, log_det = flow(z, context)
    back, again = flow(image, context, inverse=True)
    torch.testing.assert_close(back, z)
    torch.testing.assert_close(again, log_det)
    for row in range(4):
        jacobian = torch.autograd.functional.jacobian(lambda a, row=row: flow(a, context[row])[0], z[row])
        torch.testing.assert_close(torch.linalg.slogdet(jacobian)[1], log_det[row])


@pytest.mark.parametrize("spec", REAL, ids=str)
def test_the_density_of_a_draw_is_the_change_of_variables(spec):
    """log q(z) = log N(eps; 0, I) - log |det dz/deps|, with the Jacobian by autograd."""
    qz = random_posterior(spec, size=2, seed=3)
    eps = torch.randn(2, 1, 3)
    _, log_density = qz.rsample_and_log_prob((1,), Given(eps))
    jacobian = torch.autograd.functional.jacobian(lambda e: qz.rsample_and_log_prob((1,), Given(e))[0][0], eps)
    for row in range(2):
        log_det = torch.linalg.slogdet(jacobian[row, :, row, 0].double())[1]
        expected = -0.5 * (eps[row, 0].double().square() + math.log(2 * math.pi)).sum() - log_det
        torch.testing.assert_close(log_density()[0, row].double(), expected, atol=1e-4, rtol=1e-5)


def test_the_inverse_of_iaf_gives_the_density_of_any_z_under_any_example():
    qz = random_posterior(specs.IAF(4, 3, (16,)), size=5)
    z, log_density = qz.rsample_and_log_prob((7,), StepNoise(0, 0))
    torch.testing.assert_close(qz.log_prob(z), log_density(), atol=2e-4, rtol=1e-4)
    crossed = qz.log_prob(z[0][:, None])  # (R, 1, D) against 5 examples
    assert crossed.shape == (5, 5)
    torch.testing.assert_close(crossed.diagonal(), log_density()[0], atol=2e-4, rtol=1e-4)
    assert (crossed - crossed.diagonal()).abs().max() > 0.1


@pytest.mark.parametrize("size", [1e-20, 1e-3, 1.0, 30.0])
def test_planar_transforms_stay_invertible_for_all_parameters(size):
    """Whatever u and w are: one plus w'u_hat is positive, the log-determinant is finite, and nothing explodes."""
    torch.manual_seed(0)
    w = torch.nn.functional.normalize(torch.randn(64, 1, 3, dtype=F64), dim=-1) * size
    u = torch.randn(64, 1, 3, dtype=F64).requires_grad_()
    flow = Planar(u, w, torch.zeros(64, 1, dtype=F64))
    moved, log_det = flow(torch.zeros(64, 3, dtype=F64))  # at the bend, where tanh' = 1: log det = log(1 + w'u_hat)
    assert log_det.isfinite().all()
    along = (u * w).sum((-2, -1))
    torch.testing.assert_close(log_det.exp(), torch.log1p((math.e - 1) * along.exp()), rtol=1e-6, atol=0)
    far, _ = flow(torch.full((64, 3), 10.0, dtype=F64))
    assert (far - 10).abs().max() < 2 * u.detach().norm(dim=-1).max() + 1 + 2 / size * (size > 1e-2)
    (gradient,) = torch.autograd.grad(log_det.sum() + moved.sum(), u)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("spec", REAL[1:], ids=str)
def test_densities_are_computed_in_fp32_under_autocast(spec):
    qz = random_posterior(spec, size=4)
    z, log_density = qz.rsample_and_log_prob((3,), StepNoise(0, 0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        same, log_same = qz.rsample_and_log_prob((3,), StepNoise(0, 0))
        assert same.dtype == torch.float32
        torch.testing.assert_close(same, z, rtol=0, atol=0)
        torch.testing.assert_close(log_same(), log_density(), rtol=0, atol=0)


def test_a_flow_leaves_torchs_validation_of_arguments_as_it_was():
    """Importing zuko switches it off for the whole process; who builds a flow here keeps it.

    In a process of its own, as torch's compiler switches it off too.
    """
    code = (
        "import sys, torch; from vaelab import specs; specs.IAF(2, 1, (4,)).build(3)\n"
        "assert 'zuko' in sys.modules\n"
        "torch.distributions.Normal(0.0, -1.0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "ValueError" in done.stderr
    assert "to satisfy the constraint" in done.stderr


@pytest.mark.parametrize("spec", FLOWS[:2], ids=str)
def test_flows_without_an_inverse_say_so(spec):
    qz = random_posterior(spec)
    kind = spec.word
    with pytest.raises(TypeError, match=f"a {kind} flow has no inverse.*--posterior iaf"):
        qz.rsample_and_log_prob((1,), StepNoise(0, 0), stop=True)
    with pytest.raises(NotImplementedError, match=f"a {kind} flow has no inverse"):
        qz.log_prob(torch.zeros(1, 2))


# --- against the exact likelihood -----------------------------------------------------------------------------------


def correlated(dim=3):
    """A linear VAE whose decoder's columns are far from orthogonal, and the precision of its true posterior."""
    exact = linear_vae(dim)
    weight = exact.decoder.layers[0].weight
    with torch.no_grad():
        weight.copy_(0.4 * weight + weight.mean(1, keepdim=True))
    w, sigma = weight.detach().double(), exact.likelihood_head.spec.sigma
    return exact, w.mT @ w / sigma**2 + torch.eye(dim, dtype=F64)


def with_posterior(exact, spec, seed=0):
    """The same p(x, z) with another posterior, whose parameters but location and log-scales are random and small.

    All heads emit locations and log-scales first: these are the best that a diagonal normal can have.
    """
    torch.manual_seed(seed)
    model = VAE(specs.MLPEncoder(()), spec, specs.StandardNormal(), specs.MLPDecoder(()), LinearGaussian(0.5), SHAPE)
    model.decoder.load_state_dict(exact.decoder.state_dict())
    w, b = (t.detach().double() for t in (model.decoder.layers[0].weight, model.decoder.layers[0].bias))
    precision = w.mT @ w / 0.25 + torch.eye(w.shape[1], dtype=F64)
    loc = torch.linalg.solve(precision, w.mT / 0.25)
    head = next(layer for layer in model.posterior_head.children() if isinstance(layer, torch.nn.Linear))
    dim = len(precision)
    with torch.no_grad():
        head.weight[:dim], head.bias[:dim] = loc, -loc @ b
        head.weight[dim : 2 * dim], head.bias[dim : 2 * dim] = 0, -0.5 * precision.diagonal().log()
        head.weight[2 * dim :] *= 0.3
        head.bias[2 * dim :] *= 0.3
    return model.eval()


@pytest.mark.parametrize("spec", REAL, ids=str)
@torch.no_grad()
def test_bounds_are_ordered_and_below_the_exact_likelihood(spec):
    exact, _ = correlated()
    model = with_posterior(exact, spec)
    x = sample_images(model, 400)
    log_w = model.draw(x, num_samples=64, noise=StepNoise(0, 0)).log_w.double()
    elbo, iwae, log_px = log_w.mean(0), log_mean_exp(log_w), exact_log_px(model, x)
    gained, missing = iwae - elbo, log_px - iwae
    assert gained.mean() > 3 * gained.std() / 20, "a posterior that is not exact gains by more samples"
    assert missing.mean() > -3 * missing.std() / 20
    assert (log_px - elbo).mean() > 3 * (log_px - elbo).std() / 20


def trained(model, x, steps, rate):
    objective, optimizer = ELBO(), torch.optim.Adam(model.posterior_head.parameters(), rate)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * (1 - step / steps)
        for _, loss in objective.losses(model, objective.networks(model), Batch(x), StepNoise(0, step)):
            optimizer.zero_grad()
            loss.backward(inputs=list(model.posterior_head.parameters()))
            optimizer.step()
    return model


@pytest.mark.parametrize(
    ("spec", "steps", "rate", "share"),
    [(REAL[0], 150, 0.02, None), (REAL[1], 150, 0.02, 0.1), (specs.IAF(3, 1, (16,)), 250, 0.01, 0.25)],
    ids=str,
)
def test_training_closes_the_gap_that_a_diagonal_posterior_cannot(spec, steps, rate, share):
    r"""With precision P of the true posterior, a diagonal one misses at least (sum log P_dd - log det P) / 2 nats."""
    exact, precision = correlated()
    least = 0.5 * float(precision.diagonal().log().sum() - torch.logdet(precision))
    model = with_posterior(exact, spec)
    x = sample_images(model, 256)
    trained(model, x, steps, rate)
    with torch.no_grad():
        draw = model.draw(x, num_samples=32, noise=RowNoise(7))
        gap = exact_log_px(model, x) - draw.log_w.double().mean(0)
    stderr = float(gap.std()) / 16
    assert least > 1
    if share is None:
        assert least - 3 * stderr < gap.mean() < 1.1 * least + 3 * stderr
    else:
        assert -3 * stderr < gap.mean() < share * least


@pytest.mark.parametrize("name", ["full-normal", "iaf"])
def test_sticking_the_landing_has_no_gradient_at_the_exact_posterior(name):
    exact, precision = correlated() if name == "full-normal" else (linear_vae(3), None)
    model = with_posterior(exact, {"full-normal": specs.FullNormal(3), "iaf": specs.IAF(3, 2, (16,))}[name])
    head = model.posterior_head
    with torch.no_grad():
        if precision is None:  # the true posterior is diagonal: a flow that is the identity
            for step in head.flow.steps:
                step.hyper[-1].weight.zero_()
                step.hyper[-1].bias.zero_()
        else:
            factor = torch.linalg.cholesky(torch.linalg.inv(precision)).float()
            entries = torch.cat([factor.diagonal().log(), factor.flatten()[head.below]])
            head.loc_and_factor.weight[3:] = 0
            head.loc_and_factor.bias[3:] = entries
    x = sample_images(model, 20)
    norms = []
    for objective in (STL(2), ELBO()):
        _, loss = next(objective.losses(model, objective.networks(model), Batch(x), StepNoise(0, 0)))
        found = torch.autograd.grad(loss, list(head.parameters()), allow_unused=True)
        norms.append(torch.cat([g.flatten() for g in found if g is not None]).norm())
    assert norms[0] < 1e-3 * norms[1], "not only on average: for each draw"


# --- a normal with full covariance ----------------------------------------------------------------------------------


def test_the_divergence_of_a_full_normal_is_torchs_and_monte_carlos():
    model = VAE(
        specs.MLPEncoder((8,)),
        specs.FullNormal(4),
        specs.StandardNormal(),
        specs.MLPDecoder(()),
        specs.Bernoulli(),
        SHAPE,
    )
    qz, pz = random_posterior(specs.FullNormal(4), size=3), model.prior()
    exact = analytic_kl(qz, pz)
    plain = MultivariateNormal(qz.loc, scale_tril=qz.scale_tril)
    torch.testing.assert_close(exact, kl_divergence(plain, MultivariateNormal(torch.zeros(4), torch.eye(4))))
    z, log_density = qz.rsample_and_log_prob((20_000,), StepNoise(1, 0))
    sampled = (log_density() - pz.log_prob(z)).detach()
    assert ((sampled.mean(0) - exact).abs() < 4 * sampled.std(0) / 20_000**0.5).all()
    torch.testing.assert_close(log_density(), plain.log_prob(z))


def test_a_full_normals_samples_are_correlated_as_it_says():
    qz = random_posterior(specs.FullNormal(4))
    z, _ = qz.rsample_and_log_prob((40_000,), StepNoise(1, 0))
    covariance, scale = qz.covariance_matrix[0].detach(), qz.stddev[0].detach()
    error = (torch.cov(z[:, 0].detach().mT) - covariance) / torch.outer(scale, scale)
    assert error.abs().max() < 5 * 2**0.5 / 200
    assert (covariance - covariance.diagonal().diag()).abs().max() > 0.1


# --- the sphere -----------------------------------------------------------------------------------------------------

DIMS, KAPPAS = [2, 3, 5, 11, 40], [1e-3, 0.3, 1.0, 10.0, 100.0, 1e4]


def log_integral(dim, kappa):
    """log of the integral of exp(kappa (cos t - 1)) sin^(D - 2) t, by the Bessel function."""
    order = dim / 2 - 1
    bessel = math.log(special.ive(order, kappa)) + order * math.log(2 / kappa)
    return bessel + math.lgamma(order + 0.5) + 0.5 * math.log(math.pi)


def resultant(dim, kappa):
    """A_D(kappa) = I_{D/2}(kappa) / I_{D/2 - 1}(kappa)."""
    return special.ive(dim / 2, kappa) / special.ive(dim / 2 - 1, kappa)


def cumulative(dim, kappa, theta):
    """The probability of an angle below theta, by adaptive quadrature."""
    where = min(math.pi, math.sqrt(dim / kappa))
    f = lambda t: math.exp(kappa * (math.cos(t) - 1) - log_integral(dim, kappa)) * math.sin(t) ** (dim - 2)  # noqa: E731
    return integrate.quad(f, 0, theta, points=[p for p in (where, 3 * where) if p < theta] or None, limit=200)[0]


def directions(size, dim, seed=0):
    return normalize(torch.randn(size, dim, generator=torch.Generator().manual_seed(seed)), dim=-1)


@pytest.mark.parametrize("dim", DIMS)
def test_the_normaliser_of_the_sphere_is_the_bessel_function_and_an_integral(dim):
    kappa = torch.tensor(KAPPAS, dtype=F64)
    qz = VonMisesFisherPosterior(directions(len(KAPPAS), dim).double(), kappa)
    for row, value in enumerate(KAPPAS):
        order = dim / 2 - 1
        log_c = order * math.log(value) - 0.5 * dim * math.log(2 * math.pi) - math.log(special.ive(order, value))
        at_mean = float(qz.log_prob(qz.loc)[row])
        assert at_mean == pytest.approx(log_c, abs=1e-6)  # log C_D + kappa - kappa: ive carries exp(-kappa)
        assert cumulative(dim, value, math.pi) == pytest.approx(1, abs=1e-7)
        assert float(qz.angle.mean[row]) == pytest.approx(resultant(dim, value) - 1, rel=1e-6, abs=1e-12)
    prior = UniformOnSphere(torch.zeros(dim))
    closed = [k * resultant(dim, k) + float(qz.log_prob(qz.loc)[i]) - k + log_area(dim) for i, k in enumerate(KAPPAS)]
    torch.testing.assert_close(analytic_kl(qz, prior), torch.tensor(closed, dtype=F64), atol=1e-6, rtol=1e-6)
    assert float(analytic_kl(qz, prior)[0]) == pytest.approx(KAPPAS[0] ** 2 / (2 * dim), rel=0.1, abs=1e-8)


@pytest.mark.parametrize("dim", DIMS)
def test_the_spheres_derivatives_are_those_of_the_bessel_function(dim):
    """d log C / d kappa = -A, and d KL / d kappa = kappa A' = kappa (1 - A^2 - (D - 1) A / kappa)."""
    values = KAPPAS[1:]
    kappa = torch.tensor(values, dtype=F64, requires_grad=True)
    qz = VonMisesFisherPosterior(directions(len(values), dim).double(), kappa)
    z = directions(len(values), dim, seed=1).double()
    (score,) = torch.autograd.grad(qz.log_prob(z).sum(), kappa)
    a = torch.tensor([resultant(dim, k) for k in values], dtype=F64)
    torch.testing.assert_close(score, (qz.loc * z).sum(-1) - a, atol=1e-6, rtol=1e-6)
    (steeper,) = torch.autograd.grad(qz.kl_to_uniform().sum(), kappa)
    k = kappa.detach()
    torch.testing.assert_close(steeper, k * (1 - a * a - (dim - 1) * a / k), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("kappa", [1e-3, 1.0, 30.0, 1e4])
def test_angles_are_quantiles_of_their_law_and_move_as_these_do(dim, kappa):
    u = torch.tensor([1e-4, 0.05, 0.3, 0.5, 0.9, 0.999], dtype=F64)[:, None]
    k = torch.tensor([kappa], dtype=F64, requires_grad=True)
    theta = AngleLaw(k, dim).quantile(u)
    for angle, share in zip(theta.detach().flatten().tolist(), u.flatten().tolist(), strict=True):
        assert cumulative(dim, kappa, angle) == pytest.approx(share, rel=2e-4, abs=1e-7)
    step = 1e-3 * kappa
    above, below = (AngleLaw(k.detach() + s, dim).quantile(u) for s in (step, -step))
    slopes = [torch.autograd.grad(t, k, retain_graph=True)[0] for t in theta[:, 0]]
    spread = float(theta.detach().max() - theta.detach().min()) / kappa
    torch.testing.assert_close(torch.stack(slopes), (above - below) / (2 * step), rtol=2e-2, atol=3e-2 * spread)


def test_angles_in_three_dimensions_have_a_closed_form():
    u = torch.rand(200, 3, dtype=F64, generator=torch.Generator().manual_seed(0))
    kappa = torch.tensor([0.1, 4.0, 500.0], dtype=F64, requires_grad=True)
    ours = AngleLaw(kappa, 3).quantile(u)
    # cos = 1 + log(1 - u (1 - exp(-2 kappa))) / kappa, for a share u below the angle.
    closed = torch.acos(1 + torch.log1p(u * torch.expm1(-2 * kappa)) / kappa)
    torch.testing.assert_close(ours, closed, rtol=1e-4, atol=1e-5)
    for row in range(0, 200, 20):
        mine, exact = (torch.autograd.grad(t[row].sum(), kappa, retain_graph=True)[0] for t in (ours, closed))
        torch.testing.assert_close(mine, exact, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("kappa", [1e-3, 1.0, 30.0, 1e4])
@torch.no_grad()
def test_draws_on_the_sphere_have_the_resultant_length_of_their_law(dim, kappa):
    qz = VonMisesFisherPosterior(directions(1, dim, seed=2), torch.tensor([kappa]))
    z = qz.rsample_and_log_prob((20_000,), StepNoise(0, 0))[0][:, 0].double()
    torch.testing.assert_close(z.norm(dim=-1), torch.ones(20_000, dtype=F64), atol=1e-6, rtol=0)
    mean, variance = qz.mean[0].double(), qz.variance[0].double()
    assert float(mean.norm()) == pytest.approx(resultant(dim, kappa), abs=1e-6)
    assert ((z.mean(0) - mean).abs() < 4.5 * (variance / 20_000).sqrt()).all()
    along = (z * qz.loc.double()).sum(-1)
    assert abs(float(along.mean()) - resultant(dim, kappa)) < 4 * float(along.std()) / 20_000**0.5
    spread = (z - mean).square()
    assert ((spread.mean(0) - variance).abs() < 4.5 * spread.std(0) / 20_000**0.5).all()
    drawn = qz.sample((2000,))[:, 0].double()
    assert ((drawn.mean(0) - mean).abs() < 4.5 * (variance / 2000).sqrt()).all()


@pytest.mark.parametrize("towards", [1.0, -1.0, 0.0])
def test_the_mean_direction_may_be_the_axis_itself(towards):
    """At the axis, next to it, and opposite: draws keep their angle to the mean, and gradients are finite."""
    near = torch.tensor([[towards, 0.0, 0.0, 0.0], [towards, 1e-7, 0.0, 0.0], [towards, 1e-3, -1e-3, 1e-3]])
    loc = normalize(near + (towards == 0) * torch.tensor([0.0, 0.0, 1.0, 0.0]), dim=-1).requires_grad_()
    kappa = torch.full((3,), 5.0)
    qz = VonMisesFisherPosterior(loc, kappa)
    u = torch.linspace(0.01, 0.99, 9)[:, None].expand(9, 3)
    z = qz._place(u, torch.randn(9, 3, 3, generator=torch.Generator().manual_seed(0)))
    torch.testing.assert_close((z * loc).sum(-1), torch.cos(qz.angle.quantile(u)), atol=1e-6, rtol=0)
    (gradient,) = torch.autograd.grad((z * torch.arange(4.0)).sum(), loc)
    assert gradient.isfinite().all()
    assert gradient.abs().max() < 1e3


@pytest.mark.parametrize(("dim", "kappa"), [(2, 2.0), (3, 0.5), (5, 20.0), (11, 4.0)])
def test_gradients_of_expectations_on_the_sphere(dim, kappa):
    r"""Of E[a'z + (b'z)^2], against its closed form: E[zz'] = s I + (m - s) mu mu', m = E cos^2, s = (1 - m) / (D - 1)."""
    a, b, raw = (torch.randn(dim, dtype=F64, generator=torch.Generator().manual_seed(seed)) for seed in range(3))
    count = 8000  # one example a draw: each has a gradient of its own
    k = torch.full((count,), kappa, dtype=F64, requires_grad=True)
    direction = raw.expand(count, dim).clone().requires_grad_()
    qz = VonMisesFisherPosterior(normalize(direction, dim=-1), k)
    z = qz.rsample_and_log_prob((1,), StepNoise(0, 0))[0][0]
    by_kappa, by_direction = torch.autograd.grad((z @ a + (z @ b).square()).sum(), (k, direction))

    def expectation(kappa, raw):
        mu, length = raw / np.linalg.norm(raw), resultant(dim, kappa)
        second = 1 - (dim - 1) * length / kappa  # E cos^2
        across = (1 - second) / (dim - 1)
        return length * (a.numpy() @ mu) + across * (b @ b).item() + (second - across) * (b.numpy() @ mu) ** 2

    h, at = 1e-5, raw.numpy()
    exact = (expectation(kappa + h, at) - expectation(kappa - h, at)) / (2 * h)
    assert abs(float(by_kappa.mean()) - exact) < 4 * float(by_kappa.std()) / count**0.5
    for axis, one in enumerate(np.eye(dim) * h):
        exact = (expectation(kappa, at + one) - expectation(kappa, at - one)) / (2 * h)
        found = by_direction[:, axis]
        assert abs(float(found.mean()) - exact) < 4 * float(found.std()) / count**0.5


def test_the_divergence_from_the_uniform_law_is_monte_carlos():
    qz = VonMisesFisherPosterior(directions(3, 6), torch.tensor([0.5, 8.0, 300.0]))
    pz = UniformOnSphere(torch.zeros(6))
    z, log_density = qz.rsample_and_log_prob((20_000,), StepNoise(4, 0))
    sampled = log_density() - pz.log_prob(z)
    assert ((sampled.mean(0) - analytic_kl(qz, pz)).abs() < 4 * sampled.std(0) / 20_000**0.5 + 1e-6).all()


def test_the_uniform_prior_on_the_sphere():
    """E_p[q / p] = 1 for any density q on the sphere: the areas of both agree."""
    pz = UniformOnSphere(torch.zeros(4))
    for z in (pz.sample((20_000,)), pz.rsample_from(StepNoise(0, 0), 20_000)):
        torch.testing.assert_close(z.norm(dim=-1), torch.ones(20_000), atol=1e-6, rtol=0)
        assert (z.mean(0).abs() < 4.5 * 0.5 / 20_000**0.5).all()
        ratio = (VonMisesFisherPosterior(directions(1, 4), torch.tensor([3.0])).log_prob(z) - pz.log_prob(z)).exp()
        assert abs(float(ratio.mean()) - 1) < 4 * float(ratio.std()) / 20_000**0.5
    assert math.exp(log_area(2)) == pytest.approx(2 * math.pi)


def test_a_concentration_is_one_at_least():
    """1 + log(1 + e^a): the last number of the head; the others are the direction, whatever their length."""
    head = specs.VonMisesFisher(2).build(3)
    with torch.no_grad():
        head.direction_and_kappa.weight.copy_(torch.eye(3))
        head.direction_and_kappa.bias.zero_()
    qz = head(torch.tensor([[3.0, 4.0, -50.0], [-0.3, 0.4, 0.0], [0.0, 2.0, 30.0]]))
    torch.testing.assert_close(qz.kappa, torch.tensor([1.0, 1 + math.log(2), 31.0]))
    torch.testing.assert_close(qz.loc, torch.tensor([[0.6, 0.8], [-0.6, 0.8], [0.0, 1.0]]))


@pytest.mark.parametrize("dim", [2, 5])
def test_a_concentration_of_zero_is_the_uniform_law(dim):
    qz = VonMisesFisherPosterior(directions(1, dim), torch.zeros(1))
    assert float(qz.kl_to_uniform()) == pytest.approx(0, abs=1e-6)
    torch.testing.assert_close(qz.log_prob(directions(4, dim, seed=1)), torch.full((4,), -log_area(dim)))


def test_a_sphere_needs_two_dimensions_and_its_own_prior():
    with pytest.raises(UsageError, match="2 dimensions at least"):
        specs.VonMisesFisher(1).build(4)
    with pytest.raises(UsageError, match="--prior uniform-sphere"):
        VAE(
            specs.MLPEncoder(()),
            specs.VonMisesFisher(3),
            specs.StandardNormal(),
            specs.MLPDecoder(()),
            specs.Bernoulli(),
            SHAPE,
        )


# --- the compiled step ----------------------------------------------------------------------------------------------

RUN = override(recipe("mlp"), data="digits", encoder_hidden_dims=(16,), decoder_hidden_dims=(16,), batch_size=64)
TRACED = {
    "full-normal": {"posterior": specs.FullNormal(3)},
    "planar": {"posterior": specs.PlanarFlow(3, 2)},
    "iaf": {"posterior": specs.IAF(3, 1, (8,)), "objective": STL()},  # its inverse, with held parameters, as well
    "vmf": {"posterior": specs.VonMisesFisher(3), "prior": specs.UniformSphere()},
    "flow": {"posterior": specs.DiagonalNormal(3), "prior": specs.FlowPrior("nsf", 1, (8,))},
}


def both_ways(run, data):
    """A trainer that took some steps plainly, and one that took them by the compiled step."""
    plain, compiled = (Trainer(override(run, compile=way), data, CPU) for way in ("off", "on"))
    for _ in range(3):
        plain.train_step()
        compiled.train_step()
    return plain, compiled


def are_one(plain, compiled) -> bool:
    weights = zip(plain.model.parameters(), compiled.model.parameters(), strict=True)
    return torch.allclose(compiled.terms[:3], plain.terms[:3], rtol=1e-4, atol=1e-3) and all(
        torch.allclose(b, a, rtol=1e-3, atol=1e-4) for a, b in weights
    )


@pytest.mark.parametrize("name", TRACED)
def test_steps_are_traced_with_the_numbers_of_plain_ones(name, digits, uncompiled):
    """The graph that the compiler is given; a posterior whose step depends on its data could not be traced."""
    plain, traced = both_ways(replace(RUN, **TRACED[name]), digits)
    assert isinstance(traced._take_step, CompiledStep)
    assert not traced._take_step._failed
    assert are_one(plain, traced)


@pytest.mark.skipif(not can_compile(CPU), reason="no C++ compiler or no headers of Python here")
def test_steps_are_compiled_with_the_numbers_of_plain_ones(digits):
    plain, compiled = both_ways(replace(RUN, **TRACED["iaf"]), digits)
    assert isinstance(compiled._take_step, CompiledStep)
    assert not compiled._take_step._failed
    assert are_one(plain, compiled)


def test_what_a_posterior_has_not_is_said_in_words():
    point = specs.Deterministic(2).build(8)(torch.randn(3, 8))
    with pytest.raises(NoDensityError, match="it has no density"):
        point.log_prob(point.mean)
    flow = specs.PlanarFlow(2).build(8)(torch.randn(3, 8))
    with pytest.raises(NotImplementedError, match="center is a typical point of it"):
        _ = flow.mean


@pytest.mark.parametrize(
    "spec",
    [
        specs.DiagonalNormal(2), specs.FullNormal(2), specs.IAF(2, num_transforms=2, hidden_dims=(4,)),
        specs.VonMisesFisher(3), specs.GumbelSoftmax(2, 3),
    ],
    ids=str,
)  # fmt: skip
def test_a_stopped_density_has_a_gradient_through_the_draw_alone(spec):
    torch.manual_seed(0)
    head = spec.build(5)
    parameters = list(head.parameters())
    z, log_density = head(torch.randn(4, 5)).rsample_and_log_prob((3,), StepNoise(0, 0), stop=True)
    total = log_density().sum()
    (by_z,) = torch.autograd.grad(total, z, retain_graph=True)
    expected = torch.autograd.grad(z, parameters, by_z, retain_graph=True, allow_unused=True)
    found = torch.autograd.grad(total, parameters, allow_unused=True)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)

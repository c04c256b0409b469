"""Annealing against distributions and a model whose constants are known exactly; and proof that errors would show."""

import copy
import functools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.distributions import Distribution, MultivariateNormal, Normal

from oracle import bend, dataset, exact_log_px, linear_vae, sample_images
from vaelab import samplers
from vaelab.config import override
from vaelab.errors import FailureError, UsageError
from vaelab.evaluate import annealed as module
from vaelab.evaluate.annealed import Annealing, ais_rows, bdmc_rows, summarize, summarize_gap
from vaelab.evaluate.elbo import bound_protocol
from vaelab.evaluate.pieces import join
from vaelab.models import VAE
from vaelab.recipes import recipe
from vaelab.runtime import RowNoise
from vaelab.samplers import annealed_importance_sampling, pilot_step_sizes, sigmoid_schedule
from vaelab.train import fit

# --- one transition -------------------------------------------------------------------------------------------------

TARGET = MultivariateNormal(torch.tensor([1.0, -2.0, 0.5]), torch.tensor([[1.0, 0.6, 0.0], [0.6, 1.5, 0.3], [0, 0.3, 0.4]]))  # fmt: skip
M = 20_000


def noise(seed, rows, dims, uniforms=()):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(rows, dims, generator=g), torch.rand(*uniforms, rows, generator=g)


def moved(log_density, z, eps, transitions, metropolis=True, num_leapfrog=3):
    """The rows after some transitions, and the share of those that were accepted."""

    def log_densities(z):
        return (log_density(z),)

    shares, point = [], samplers._at(log_densities, z)
    for i in range(transitions):
        momentum, uniform = noise(i, *z.shape)
        steps = torch.full((len(z),), eps), momentum, uniform * metropolis, num_leapfrog
        point, accepted, _ = samplers._transition(log_densities, torch.ones(1), point, *steps)
        shares.append(accepted.float().mean().item())
    return point.z, sum(shares) / transitions


def assert_moments(z):
    error = (z - TARGET.mean) @ torch.linalg.inv(TARGET.scale_tril).mT
    assert error.mean(0).abs().max() < 4 / M**0.5
    deviation = error.mT @ error / M - torch.eye(3)
    assert deviation.abs().max() < 4 * 2**0.5 / M**0.5


def start(seed=99):
    return TARGET.loc + noise(seed, M, 3)[0] @ TARGET.scale_tril.mT


def test_hmc_leaves_a_gaussian_as_it_is():
    z, acceptance = moved(TARGET.log_prob, start(), eps=0.75, transitions=6)
    assert 0.3 < acceptance < 0.9, "or the correction has nothing to do"
    assert_moments(z)
    assert not z.requires_grad


def test_hmc_comes_to_it_from_elsewhere():
    z, _ = moved(TARGET.log_prob, 3 * noise(0, M, 3)[0], eps=0.6, transitions=40)
    assert_moments(z)


def test_that_a_missing_metropolis_correction_shows():
    z, acceptance = moved(TARGET.log_prob, start(), eps=0.75, transitions=6, metropolis=False)
    assert acceptance == 1
    with pytest.raises(AssertionError):
        assert_moments(z)


def test_in_equilibrium_as_many_rows_go_as_come_back():
    """Detailed balance, between each two of three regions: a cycle would leave moments alone, and show here."""
    z = start()
    after, _ = moved(TARGET.log_prob, z, eps=0.75, transitions=1)
    region, then = ((v[:, 0] > 0.5).long() + (v[:, 0] > 1.5).long() for v in (z, after))
    flow = torch.zeros(3, 3).index_put((region, then), torch.ones(M), accumulate=True)
    assert flow.min() > 100
    assert ((flow - flow.mT).abs() <= 4 * (flow + flow.mT).sqrt()).all()


def test_acceptance_goes_to_one_as_steps_get_small():
    rejected = [1 - moved(TARGET.log_prob, start(), eps, transitions=1)[1] for eps in (0.4, 0.2, 0.1)]
    # The energy's error is of second order in the step, and the mean rejection of the same order.
    assert rejected[0] > 3 * rejected[1] > 9 * rejected[2]
    assert rejected[2] < 5e-3


def test_steps_out_of_the_support_are_rejected():
    """log z is NaN below 0; what stays is the Rayleigh distribution, of mean sqrt(pi / 2)."""

    def log_density(z):
        return (z.log() - z.square() / 2).sum(1)

    z = noise(5, M, 2)[0].square().sum(1, keepdim=True).sqrt()
    after, acceptance = moved(log_density, z, eps=0.9, transitions=5)
    assert 0.3 < acceptance < 0.98
    assert (after > 0).all()
    assert abs(after.mean() - math.sqrt(math.pi / 2)) < 4 * after.std() / M**0.5


# --- annealing between known distributions --------------------------------------------------------------------------

LOG_Z = 7.0
B, C, D = 500, 8, 3


def path(z):
    """From N(0, 1) to exp(7) N(0.4, 0.8^2), each over three dimensions."""
    log_q0, log_p = (Normal(loc, scale).log_prob(z).sum(1) for loc, scale in ((0.0, 1.0), (0.4, 0.8)))
    return log_q0, log_p + LOG_Z


def draws(seed, rows):
    return lambda i: noise(seed + i, rows, D, (2,))


def weights(num_distributions, reverse=False, eps=None):
    betas = sigmoid_schedule(num_distributions)
    if eps is None:
        eps = pilot_step_sizes(path, noise(1, B * 2, D)[0], betas, draws(1_000, B * 2), num_chains=2, num_leapfrog=5)
    z = noise(2, B * C, D)[0]
    z = 0.4 + 0.8 * z if reverse else z
    noises, options = draws(50_000, B * C), {"num_leapfrog": 5, "reverse": reverse}
    return annealed_importance_sampling(path, z, betas, eps.repeat(1, C), noises, **options)


def assert_unbiased(log_ratio):
    ratio = log_ratio.double().exp()
    assert abs(ratio.mean() - 1) <= 4 * ratio.std() / len(ratio) ** 0.5


@pytest.mark.parametrize("num_distributions", [2, 6, 20])
def test_weights_are_unbiased_in_both_directions(num_distributions):
    forward, reverse = (weights(num_distributions, r) for r in (False, True))
    assert_unbiased(forward.log_w - LOG_Z)
    assert_unbiased(reverse.log_w + LOG_Z)
    assert forward.log_w.mean() < LOG_Z < -reverse.log_w.mean(), "a bound below and a bound above"
    assert 0.3 < forward.acceptance.mean() < 0.95


def test_that_the_wrong_sign_in_reverse_shows():
    reverse = weights(20, reverse=True)
    with pytest.raises(AssertionError):
        assert_unbiased(-reverse.log_w + LOG_Z)
    assert not -(-reverse.log_w).mean() > LOG_Z


def test_that_a_missing_correction_at_large_steps_shows(monkeypatch):
    eps = torch.full((19, B), 0.9)
    assert_unbiased(weights(20, eps=eps).log_w - LOG_Z)
    transition = samplers._transition
    monkeypatch.setattr(samplers, "_transition", lambda *args: transition(*args[:5], 0 * args[5], *args[6:]))
    with pytest.raises(AssertionError):
        assert_unbiased(weights(20, eps=eps).log_w - LOG_Z)


def test_one_distribution_is_importance_sampling():
    z = noise(2, B, D)[0]
    betas = sigmoid_schedule(1)
    eps = pilot_step_sizes(path, z, betas, draws(0, B), num_chains=1)
    found = annealed_importance_sampling(path, z, betas, eps, draws(0, B))
    log_q0, log_p = path(z)
    torch.testing.assert_close(found.log_w, (log_p - log_q0).double())
    assert torch.equal(found.z, z)
    assert found.acceptance.isnan().all()


def test_a_transition_costs_a_gradient_a_leapfrog_step():
    calls = 0

    def counted(z):
        nonlocal calls
        calls += 1
        return path(z)

    eps = torch.full((6, 4), 0.1)
    annealed_importance_sampling(counted, noise(0, 4, D)[0], sigmoid_schedule(7), eps, draws(0, 4), num_leapfrog=5)
    assert calls == 1 + 6 * 5


def test_step_sizes_fit_each_problem_and_are_those_of_the_target_acceptance():
    scale = torch.tensor([0.01, 1.0, 100.0]).repeat_interleave(100)

    def log_densities(z):
        u = z / scale.repeat(len(z) // 300)[:, None]
        return -0.5 * u.square().sum(1), -(u**4).sum(1) / 8

    betas = sigmoid_schedule(60)
    first = scale.repeat(2)[:, None] * noise(3, 600, D)[0]
    eps = pilot_step_sizes(log_densities, first, betas, draws(0, 600), num_chains=2)
    assert eps.shape == (59, 300)
    by_scale = (eps / scale)[10:].unflatten(1, (3, 100)).mean(2)
    torch.testing.assert_close(by_scale[:, 0], by_scale[:, 1], rtol=0.1, atol=0)
    torch.testing.assert_close(by_scale[:, 2], by_scale[:, 1], rtol=0.1, atol=0)
    start = scale.repeat(C)[:, None] * noise(4, 300 * C, D)[0]
    found = annealed_importance_sampling(log_densities, start, betas, eps.repeat(1, C), draws(5_000, 300 * C))
    assert found.acceptance.mean().item() == pytest.approx(0.65, abs=0.06)


def test_the_schedule_rises_slowest_at_its_ends():
    betas = sigmoid_schedule(100)
    steps = betas.diff()
    assert betas[0] == 0
    assert betas[-1] == 1
    torch.testing.assert_close(betas, 1 - betas.flip(0))
    assert (steps > 0).all()
    assert steps[0] < 0.1 * steps[50]
    with pytest.raises(ValueError, match="got 0"):
        sigmoid_schedule(0)
    with pytest.raises(ValueError, match="3 transitions need as many step sizes: got 4"):
        annealed_importance_sampling(path, torch.zeros(1, D), sigmoid_schedule(4), torch.ones(4, 1), draws(0, 1))


# --- a model of known likelihood ------------------------------------------------------------------------------------

N = 150
ENCODERS = {"exact": (0.0, 0.0), "wide": (0.5, 0.0), "narrow": (-0.4, 0.0), "shifted": (0.0, 0.2)}
FEW = Annealing(num_chains=8, num_distributions=20, num_leapfrog=5)


@pytest.fixture(autouse=True)
def _big_blocks(monkeypatch):
    """Images of 64 pixels are best taken all at once."""
    monkeypatch.setattr(module, "_CPU_CHAINS", 4096)


def rows(model, data, how=FEW, **options):
    return join(ais_rows(model, data, "test", how, **options))


def gap(model, how=FEW, **options):
    return summarize_gap(join(bdmc_rows(model, how, **options)), how)


def errors(model, x, how=FEW):
    """Per example: the estimate's error in nats, and the weights' relative variance over twice their number."""
    found = rows(model, dataset(x), how)
    return found["log_px"] - exact_log_px(model, x).numpy(), (8 / found["ess"] - 1) / 16


def assert_right(error, allowance):
    ratio = np.exp(error)
    assert abs(error.mean()) <= 4 * error.std(ddof=1) / N**0.5 + allowance.mean() + 1e-4
    assert abs(ratio.mean() - 1) <= 4 * ratio.std(ddof=1) / N**0.5 + 1e-4


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("latent_dim", [2, 8])
def test_the_estimate_is_right_per_example(latent_dim, encoder):
    model = bend(linear_vae(latent_dim), *ENCODERS[encoder])
    assert_right(*errors(model, sample_images(model, N)))


@pytest.mark.parametrize("latent_dim", [2, 8])
def test_the_estimate_is_right_from_the_prior(latent_dim):
    model = linear_vae(latent_dim, sigma=2.0)
    with torch.no_grad():
        model.posterior_head.loc_and_log_scale.bias.fill_(50.0)  # an encoder that must not matter
    assert_right(*errors(model, sample_images(model, N), replace(FEW, start="prior", num_distributions=40)))


@pytest.mark.parametrize(
    "mistake", ["log C dropped", "no correction, large steps", "the prior twice", "weights of f_b"]
)
def test_that_comparison_notices(mistake, monkeypatch):
    model = bend(linear_vae(2), *ENCODERS["wide"])
    x = sample_images(model, N)
    if mistake == "log C dropped":
        monkeypatch.setattr(module, "log_mean_exp", lambda w: torch.logsumexp(w, 0))
    elif mistake == "no correction, large steps":
        transition, pilot = samplers._transition, module.pilot_step_sizes
        monkeypatch.setattr(samplers, "_transition", lambda *args: transition(*args[:5], 0 * args[5], *args[6:]))
        monkeypatch.setattr(module, "pilot_step_sizes", lambda *args, **kwargs: 1.3 * pilot(*args, **kwargs))
    elif mistake == "the prior twice":
        terms = module._Target._terms
        monkeypatch.setattr(module._Target, "_terms", lambda t, z: (v := terms(t, z)) | {"log p(z)": 2 * v["log p(z)"]})
    else:  # the path's own density in place of the ratio of its ends: (b' - b) log p*
        call = module._Target.__call__
        monkeypatch.setattr(module._Target, "__call__", lambda t, z: (0 * call(t, z)[0], call(t, z)[1]))
    with pytest.raises(AssertionError):
        assert_right(*errors(model, x))


@pytest.mark.parametrize("start", ["encoder", "prior"])
def test_bounds_of_simulated_images_hold_the_exact_value_between_them(start, monkeypatch):
    model = bend(linear_vae(4, sigma=1.5), 0.1, 0.5)
    made = []
    simulate = module._simulate
    monkeypatch.setattr(module, "_simulate", lambda *args: made.append(simulate(*args)) or made[-1])
    gaps = []
    for num_distributions in (3, 30):
        made.clear()
        how = replace(FEW, num_distributions=num_distributions, start=start)
        found = join(bdmc_rows(model, how, num_images=N))
        exact = exact_log_px(model, torch.cat([x for _, x in made])).numpy()
        below, above = exact - found["lower"], found["upper"] - exact
        for slack in (below, above):
            assert slack.mean() >= -4 * slack.std(ddof=1) / N**0.5
            assert_unbiased(torch.from_numpy(-slack))
        gaps.append(below + above)
    closer = gaps[0] - gaps[1]
    assert closer.mean() > 3 * closer.std(ddof=1) / N**0.5
    assert gaps[1].mean() > 0


def test_that_the_wrong_sign_of_reverse_weights_shows(monkeypatch):
    model = bend(linear_vae(4, sigma=1.5), 0.1, 0.2)
    sampling = module.annealed_importance_sampling

    def wrong(*args, reverse, **kwargs):
        found = sampling(*args, reverse=reverse, **kwargs)
        return found._replace(log_w=-found.log_w) if reverse else found

    assert 0 < gap(model, num_images=20)["bdmc_gap"].value < 5
    monkeypatch.setattr(module, "annealed_importance_sampling", wrong)
    assert abs(gap(model, num_images=20)["bdmc_gap"].value) > 5


# --- noise, memory, manners -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(digits):
    return fit(override(recipe("mlp"), epochs=1), digits)


@pytest.mark.parametrize("start", ["encoder", "prior"])
def test_memory_and_resuming_change_nothing(trained, digits, start):
    how = replace(FEW, num_distributions=3, start=start)
    whole = rows(trained, digits, how, rows=19)
    parts = list(ais_rows(trained, digits, "test", how, rows=19, memory=1))
    assert [part for part, _ in parts] == [slice(0, 16), slice(16, 19)]
    small, rest = join(parts), rows(trained, digits, how, rows=19, first_row=17)
    for name, values in whole.items():
        np.testing.assert_allclose(small[name], values, rtol=1e-4, err_msg=name)
        np.testing.assert_allclose(rest[name], values[17:], rtol=1e-4, err_msg=name)


@pytest.mark.parametrize("start", ["encoder", "prior"])
def test_workers_side_by_side_change_nothing(trained, digits, start):
    how = replace(FEW, num_distributions=3, start=start)
    for anneal in (lambda **more: ais_rows(trained, digits, "test", how, rows=40, **more),
                   lambda **more: bdmc_rows(trained, how, num_images=40, **more)):  # fmt: skip
        one = join(anneal())
        parts = list(anneal(workers=3))
        assert [part for part, _ in parts] == [slice(0, 16), slice(16, 32), slice(32, 40)], "none is idle"
        for name, values in join(parts).items():
            np.testing.assert_allclose(values, one[name], rtol=1e-4, err_msg=name)


def test_a_gpu_does_not_take_all_images_at_once(trained, monkeypatch):
    monkeypatch.setattr(type(trained), "device", torch.device("cuda"))
    monkeypatch.setattr(module, "decode_bytes", lambda model: 1000)
    pieces = module._Annealer(trained, Annealing(), 0).pieces(0, 1000, 2**30, 1)
    assert [piece.stop for piece in pieces] == [256, 512, 768, 1000]


def test_simulated_images_belong_to_their_rows_and_are_binary(trained):
    z, x = module._simulate(trained, range(6), 7, torch.device("cpu"))
    later_z, later_x = module._simulate(trained, range(4, 6), 7, torch.device("cpu"))
    assert torch.equal(z[4:], later_z)
    assert torch.equal(x[4:], later_x)
    assert set(x.unique().tolist()) == {0.0, 1.0}
    how = replace(FEW, num_distributions=3)
    whole, rest = (join(bdmc_rows(trained, how, num_images=6, first_row=first)) for first in (0, 4))
    np.testing.assert_array_equal(whole["upper"][4:], rest["upper"])
    np.testing.assert_array_equal(whole["lower"][4:], rest["lower"])


def test_nothing_global_is_touched(trained, digits):
    trained.train()
    trained.zero_grad(set_to_none=True)
    before = torch.get_rng_state()
    rows(trained, digits, replace(FEW, num_distributions=2, start="prior"), rows=2)
    gap(trained, Annealing(num_chains=2, num_distributions=2), num_images=2)
    assert torch.equal(torch.get_rng_state(), before)
    assert trained.training
    assert all(p.requires_grad and p.grad is None for p in trained.parameters())
    trained.eval()


def test_what_is_reported(trained, digits):
    how = Annealing(num_chains=4, num_distributions=5, num_leapfrog=3)
    protocol = functools.partial(bound_protocol, trained, digits, "test", rows=8)
    found = summarize(rows(trained, digits, how, rows=8), how, protocol)
    assert list(found) == ["nll_ais", "ais_ess", "ais_acceptance"]
    assert found["nll_ais"].n == 8
    assert found["nll_ais"].protocol == (
        "digits test (first 8 images), grey pixels, AIS from the encoder, 4 chains x 5 distributions x 3 leapfrog "
        "steps, cross-entropy: not a likelihood"
    )
    assert 1 <= found["ais_ess"].value <= 4
    assert 0 < found["ais_acceptance"].value < 1
    bounds = gap(trained, how, num_images=8, seed=3)
    assert list(bounds) == ["bdmc_lower", "bdmc_upper", "bdmc_gap"]
    assert bounds["bdmc_gap"].value == pytest.approx(bounds["bdmc_upper"].value - bounds["bdmc_lower"].value)
    assert bounds["bdmc_gap"].unit == "nats"
    assert "simulated data, and only indicates the error on real data" in bounds["bdmc_gap"].protocol
    assert gap(trained, how, num_images=8, seed=4)["bdmc_lower"] != bounds["bdmc_lower"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_chains": 0}, "num_chains 0: must be at least 1"),
        ({"num_distributions": 1}, "num_distributions 1: must be at least 2"),
        ({"num_leapfrog": 0}, "num_leapfrog 0: must be at least 1"),
        ({"start": "encoda"}, "no start 'encoda'; did you mean 'encoder'"),
    ],
)
def test_bad_input_is_one_line(options, message):
    with pytest.raises(UsageError, match=message):
        Annealing(**options)


@pytest.mark.parametrize(("part", "name"), [("posterior_head", r"log q\(z\|x\)"), ("decoder", r"log p\(x\|z\)")])
def test_a_model_that_yields_nan_is_named(trained, digits, part, name):
    model, how = copy.deepcopy(trained), Annealing(num_distributions=2)
    with torch.no_grad():
        next(getattr(model, part).parameters()).fill_(float("nan"))
    with pytest.raises(FailureError, match=f"{name} of image 3 of the test split is not finite"):
        list(ais_rows(model, digits, "test", how, first_row=3))
    with pytest.raises(FailureError, match="image 0 that the model made"):
        gap(model, how, num_images=2)


def test_a_posterior_without_density_is_no_start(trained, digits, monkeypatch):
    class Point(Distribution):
        def __init__(self, loc):
            super().__init__(loc.shape[:1], loc.shape[1:], validate_args=False)
            self.loc = loc

        def rsample_and_log_prob(self, shape, noise, *, stop=False):
            return self.loc.expand(*shape, *self.loc.shape), None

    posterior = VAE.posterior
    monkeypatch.setattr(VAE, "posterior", lambda self, x, y=None: Point(posterior(self, x, y).mean))
    with pytest.raises(TypeError, match='Point has no density; use start="prior"'):
        rows(trained, digits, Annealing(num_distributions=2), rows=1)
    assert np.isfinite(rows(trained, digits, Annealing(num_distributions=2, start="prior"), rows=1)["log_px"]).all()


def test_every_transition_has_noise_of_its_own():
    draws = module._RowDraws(RowNoise(0, 0, block=1), 2, 3, 2)
    for part in (0, 1):
        assert len(torch.stack([draws(i)[part].flatten() for i in range(60)]).unique(dim=0)) == 60


def test_pilot_and_both_directions_have_noise_of_their_own(monkeypatch):
    model, starts, numbers, lengths = bend(linear_vae(4, sigma=1.5), 0.1, 0.2), [], [], []
    begin, draws, anneal = module._Target.start_chains, module._Annealer._draws, module.annealed_importance_sampling
    monkeypatch.setattr(module._Target, "start_chains", lambda *a: starts.append(begin(*a)) or starts[-1])
    monkeypatch.setattr(module._Annealer, "_draws", lambda *a: numbers.append(draws(*a)(0)[1][0, :2]) or draws(*a))
    monkeypatch.setattr(
        module, "annealed_importance_sampling",
        lambda *a, **k: lengths.append(k.get("num_leapfrog")) or anneal(*a, **k),
    )  # fmt: skip
    list(bdmc_rows(model, Annealing(4, 3, num_leapfrog=2), num_images=2))
    assert len(starts) == 2
    assert not (starts[0] == starts[1][:2]).any()
    assert len({tuple(x.tolist()) for x in numbers}) == len(numbers) == 3
    assert lengths == [2, 2]

"""One contract for all parts: a new network, posterior, prior or likelihood is one more line in a list here."""

import copy
import itertools
import math

import pytest
import torch
from torch.distributions import Bernoulli, Independent, Normal, kl_divergence
from torch.fx.experimental.proxy_tensor import make_fx

from vaelab import specs
from vaelab.errors import UsageError
from vaelab.likelihoods import BernoulliImage, softplus_sum
from vaelab.models import VAE, Batch
from vaelab.networks import Dropout
from vaelab.networks.narrow import DoublingConv, HalvingConv
from vaelab.objectives import (
    AAE,
    DIP,
    ELBO,
    IWAE,
    MCEM,
    MMD,
    PIWAE,
    RAE,
    STL,
    VAEGAN,
    BalancedELBO,
    BetaTC,
    Capacity,
    DReG,
    Factor,
    FreeBits,
    WakeSleep,
)  # fmt: skip
from vaelab.runtime import StepNoise
from vaelab.specs import Shape

NETWORKS = [
    (specs.MLPEncoder((16,)), specs.MLPDecoder((16,))),
    (specs.MLPEncoder((16, 8), "tanh"), specs.MLPDecoder((8, 16), "silu")),
    (specs.ConvEncoder((4, 8)), specs.ConvDecoder((8, 4))),
    (specs.ConvEncoder((4, 6, 8), (10,), batch_norm=True, dropout=0.2), specs.ConvDecoder((8, 6, 4), (10,), batch_norm=True)),
    (specs.ConvEncoder((4,), (), activation="gelu"), specs.ConvDecoder((4, 4))),
    (specs.ResidualEncoder((4, 6), 1, 3), specs.ResidualDecoder((6, 4), 1, 3)),
]  # fmt: skip
NORMAL, STANDARD = specs.DiagonalNormal(3), specs.StandardNormal()
POSTERIORS = [  # with a prior over the space of their latents
    (NORMAL, STANDARD),
    (specs.FullNormal(3), STANDARD), (specs.PlanarFlow(3, 4), STANDARD), (specs.RadialFlow(3, 4), STANDARD),
    (specs.IAF(3, 2, (16,)), STANDARD), (specs.VonMisesFisher(3), specs.UniformSphere()),
    (specs.VectorQuantized((1, 2), 4, 3), specs.UniformCodes()), (specs.GumbelSoftmax(2, 3), specs.UniformCategories()),
    (specs.Deterministic(3), STANDARD),
]  # fmt: skip
FLOW_PRIORS = [specs.FlowPrior(kind, 2, (16,)) for kind in ("coupling", "maf", "nsf")]
PRIORS = [STANDARD, specs.Mixture(4), specs.Mixture(4, "full"), specs.VampPrior(6), *FLOW_PRIORS]
LIKELIHOODS = [
    specs.Bernoulli(), specs.Gaussian(), specs.Gaussian(0.2, learn_sigma=False), specs.OptimalGaussian(),
    specs.PixelGaussian(0.05), specs.Laplace(), specs.Laplace(0.1, learn_scale=False), specs.ContinuousBernoulli(),
    specs.DiscretizedLogistic(), specs.LogisticMixture(3), specs.Categorical256(),
]  # fmt: skip
SHAPES: list[Shape] = [(1, 28, 28), (3, 33, 47), (1, 8, 8), (3, 28, 20), (1, 9, 31)]
OBJECTIVES = [
    ELBO(), Capacity(capacity=3.0), FreeBits(), BalancedELBO(), IWAE(3), IWAE(4, backward_samples=2), PIWAE(2, 3),
    PIWAE(2, 3, backward_samples=1), DReG(3),
    DReG(4, backward_samples=2), STL(), BetaTC(), Factor(critic_dims=(8,)), DIP(), MMD(), AAE((8,)), VAEGAN(), WakeSleep(),
    MCEM(), RAE(),
]  # fmt: skip
# The same with other settings: of one model.
OTHER_SETTINGS = [
    ELBO(beta=0.3, kl_warmup_epochs=2), IWAE(2, num_bounds=3, elbo_share=0.1), STL(3), BetaTC(weighting="stratified"),
    DIP("codes"), RAE(gradient_penalty=0.1),
]  # fmt: skip

(MLP, CONV) = NETWORKS[0], NETWORKS[2]
OF_NETWORKS = [(e, NORMAL, STANDARD, d, LIKELIHOODS[0], shape) for e, d in NETWORKS for shape in SHAPES]
OF_POSTERIORS = [(MLP[0], q, p, MLP[1], LIKELIHOODS[0], SHAPES[0]) for q, p in POSTERIORS]
OF_PRIORS = [(MLP[0], NORMAL, p, MLP[1], LIKELIHOODS[0], SHAPES[0]) for p in PRIORS]
OF_LIKELIHOODS = [(CONV[0], NORMAL, STANDARD, CONV[1], px, shape) for px in LIKELIHOODS for shape in SHAPES]
MODELS = list(dict.fromkeys([*OF_NETWORKS, *OF_POSTERIORS, *OF_PRIORS, *OF_LIKELIHOODS]))
CROSSED = [*OF_POSTERIORS, *OF_PRIORS[1:], *OF_LIKELIHOODS[2::5]]  # with all objectives: small images

# Posteriors without a density have no KL and no importance weight: these objectives refuse them.
WITHOUT_DENSITY = {"deterministic"}
NEED_NO_DENSITY: set[str] = {"mmd", "aae", "rae"}
# Flows, of which neither mean nor variance is known, and those whose density is known where they sampled alone.
WITHOUT_MOMENTS = {"planar", "radial", "iaf"}
WITHOUT_INVERSE = {"planar", "radial"}
# Posteriors that are no product of normal dimensions.
NOT_PRODUCTS = {"full-normal", "planar", "radial", "iaf", "vmf", "vq", "gumbel-softmax", "deterministic"}
# What else an objective refuses, with the words of the parts that it cannot do with.
REFUSED = {
    "free-bits": {"mixture", "vamp", "flow", "full-normal", "planar", "radial", "iaf", "vmf", "vq", "gumbel-softmax"},
    "piwae": {"vamp", "vq"},
    "factor": {"vmf", "vq", "gumbel-softmax"},
    "dreg": {"vamp", "planar", "radial", "vq"},
    "balanced-elbo": {"standard-normal", "uniform-sphere", "uniform-codes", "uniform-categories"},
    "iwae": {"vq"},
    "stl": {"planar", "radial", "vq"},
    "rae": {"mixture", "vamp", "flow"},
    "tc": NOT_PRODUCTS,
    "dip": NOT_PRODUCTS,
    "mmd": {"mixture", "vamp", "flow"},
    "aae": {"mixture", "vamp", "flow"},
    "vae-gan": {"pixel-gaussian", "logistic-mixture", "categorical"},
    "wake-sleep": {"vamp", "planar", "radial", "vq"},
    "mcem": {"vamp", "planar", "radial", "vq", "vmf", "gumbel-softmax"},
}


def name_of(parts):
    return "-".join([*(part.word for part in parts[:5]), "x".join(map(str, parts[5]))])


def refused(parts, objective) -> bool:
    words = {part.word for part in parts[:5]}
    if words & WITHOUT_DENSITY and objective.word not in NEED_NO_DENSITY:
        return True
    if "optimal-gaussian" in words and getattr(objective, "backward_samples", None):  # its sigma would be set twice
        return True
    return bool(words & REFUSED.get(objective.word, set()))


def make(parts) -> VAE:
    torch.manual_seed(0)
    return VAE(*parts)


def images(shape: Shape, count: int = 5) -> torch.Tensor:
    return torch.rand(count, *shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("parts", MODELS, ids=name_of)
def test_a_draw_has_the_shapes_of_the_contract(parts):
    model, shape = make(parts), parts[5]
    draw = model.draw(images(shape), num_samples=4, noise=StepNoise(0, 0))
    assert draw.z[0].shape == (4, 5, model.latent_dim)
    assert draw.log_px.shape == (4, 5)
    assert draw.penalty.shape == (5,)
    assert model.posterior(images(shape)).center.shape == (5, model.latent_dim)
    assert model.likelihood(draw.z[0]).mean.shape == (4, 5, *shape), "the decoder returns exactly H x W"
    assert model.prior().sample((2,)).shape == (2, model.latent_dim)
    assert model.prior().rsample_from(StepNoise(0, 0), 7).shape == (7, model.latent_dim)
    if parts[1].word in WITHOUT_DENSITY:
        for ask in (lambda: draw.kl, lambda: draw.log_w):
            with pytest.raises(TypeError, match="undefined for this model"):
                ask()
        return
    assert draw.log_pz.shape == draw.log_qz.shape == draw.log_w.shape == (4, 5)
    assert draw.kl.shape == (1, 5)


def gradient_sizes(parts, objective) -> dict[str, float]:
    """The summed size of what every loss sends to each parameter of model and objective, by its own group."""
    model = make(parts)
    networks = objective.networks(model)
    groups = objective.groups(model, networks)
    named = {**dict(model.named_parameters()), **dict(networks.named_parameters())}
    size = dict.fromkeys(named.values(), 0.0)
    for names, losses in objective.losses(model, networks, Batch(images(parts[5])), StepNoise(0, 0)):
        pairs = [(names, losses)] if isinstance(names, str) else list(zip(names, losses, strict=True))
        for name, loss in pairs:
            found = torch.autograd.grad(loss, groups[name], retain_graph=True, allow_unused=True)
            for parameter, gradient in zip(groups[name], found, strict=True):
                size[parameter] += 0.0 if gradient is None else float(gradient.abs().sum())
    return {name: size[parameter] for name, parameter in named.items()}


@pytest.mark.parametrize(
    ("parts", "objective"),
    [*itertools.product(CROSSED, OBJECTIVES), *itertools.product(CROSSED[:1], OTHER_SETTINGS)],
    ids=lambda value: name_of(value) if isinstance(value, tuple) else str(value),
)
def test_objectives_reach_every_parameter_or_refuse_the_model(parts, objective):
    """Losses give finite gradients, other than 0, to all parameters; together the groups hold all of the model's."""
    objective = objective.at(1.0)
    if refused(parts, objective):
        with pytest.raises((TypeError, UsageError)):
            gradient_sizes(parts, objective)
        return
    sizes = gradient_sizes(parts, objective)
    assert {name for name, size in sizes.items() if not 0 < size < math.inf} == set()


@pytest.mark.parametrize("parts", OF_POSTERIORS, ids=name_of)
def test_samples_that_carry_a_gradient_are_those_that_were_weighed(parts):
    """The chosen ones are drawn a second time, from the same noise."""
    rule = IWAE(4, 3, backward_samples=2)
    if refused(parts, rule):
        return
    few = rule._choose(2, make(parts), Batch(images(parts[5])), StepNoise(0, 0), num_bounds=3)
    assert few.chosen.shape == (2, 3, 5)
    assert few.log_w.std(0).min() > 1e-3, "any sample would do"
    torch.testing.assert_close(few.chosen_log_w, few.log_w.gather(0, few.chosen))


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("objective", [IWAE(4, backward_samples=2), PIWAE(4, 2, backward_samples=1)], ids=str)
def test_a_gradient_through_few_reaches_weights_that_were_cast_before(objective, precision):
    """Without gradient; torch up to 2.10 would take them from autocast's cache again, and learn nothing."""
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
        sizes = gradient_sizes(OF_POSTERIORS[0], objective)
    assert all(size > 0 for size in sizes.values())


@pytest.mark.parametrize("parts", [m for m in MODELS if m not in CROSSED], ids=name_of)
def test_gradients_of_the_elbo_reach_every_parameter(parts):
    sizes = gradient_sizes(parts, ELBO())
    assert {name for name, size in sizes.items() if not 0 < size < math.inf} == set()


@pytest.mark.parametrize("parts", [*OF_NETWORKS[::5], *CROSSED[1:]], ids=name_of)
def test_weights_survive_a_round_trip(parts, tmp_path):
    model = make(parts).eval()
    torch.save(model.state_dict(), tmp_path / "w.pt")
    other = VAE(*parts).eval()
    other.load_state_dict(torch.load(tmp_path / "w.pt", weights_only=True))
    x = images(parts[5])
    torch.testing.assert_close(model.posterior(x).center, other.posterior(x).center, rtol=0, atol=0)
    z = torch.randn(2, model.latent_dim)
    torch.testing.assert_close(model.likelihood(z).mean, other.likelihood(z).mean, rtol=0, atol=0)


@pytest.mark.parametrize("parts", OF_NETWORKS[::5], ids=name_of)
def test_sampling_in_chunks_never_changes_a_number(parts):
    model = make(parts).eval()
    z = torch.randn(4, 5, 3)
    whole = model.likelihood(z).mean
    parts_ = torch.stack([model.likelihood(row).mean for row in z])
    torch.testing.assert_close(whole, parts_, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("likelihood", LIKELIHOODS, ids=str)
def test_likelihoods_are_normalised(likelihood):
    """A mass sums to one over all values of a pixel; a density integrates to one (on a fine grid)."""
    part = likelihood.build(1).eval()
    px = part(torch.linspace(0.7, -0.4, part.params_per_channel).reshape(-1, 1, 1))
    grids = {"binary": (0, 1, 2), "bytes": (0, 1, 256), "unit": (0, 1, 20_001), "real": (-6, 7, 20_001)}
    low, high, count = grids[part.support]
    values = torch.linspace(low, high, count, dtype=torch.float64)
    p = px.log_prob(values.reshape(-1, 1, 1, 1)).double().exp()
    total = p.sum() if part.support in ("binary", "bytes") else torch.trapezoid(p, values)
    torch.testing.assert_close(total, torch.tensor(1.0, dtype=torch.float64), atol=1e-4, rtol=0)


def test_the_bernoullis_fast_log_probability_is_torchs():
    """Value and gradient, for logits of any size, grey pixels, and K samples broadcast against B images."""
    torch.manual_seed(0)
    logits = (torch.randn(4, 5, 3, 9, 8, dtype=torch.float64) * 30).requires_grad_()
    x = torch.rand(5, 3, 9, 8, dtype=torch.float64)
    fast = BernoulliImage(logits).log_prob(x)
    slow = Independent(Bernoulli(logits=logits, validate_args=False), 3, validate_args=False).log_prob(x)
    torch.testing.assert_close(fast, slow)
    weights = torch.randn(4, 5, dtype=torch.float64)
    (fast_grad,) = torch.autograd.grad((weights * fast).sum(), logits)
    (slow_grad,) = torch.autograd.grad((weights * slow).sum(), logits)
    torch.testing.assert_close(fast_grad, slow_grad)


@pytest.mark.parametrize("width", [1, 2, 7, 64, 65, 127, 784])
def test_a_sum_of_softplus_with_few_logarithms_is_one(width):
    logits = 30 * torch.randn(50, width, generator=torch.Generator().manual_seed(width))
    logits[0], logits[1], logits[2] = 200.0, -200.0, 0.0
    exact = torch.nn.functional.softplus(logits.double(), threshold=1000).sum(-1)
    torch.testing.assert_close(softplus_sum(logits).double(), exact, rtol=1e-6, atol=1e-4)


def test_the_fast_bernoulli_is_differentiable_in_pixels_and_twice():
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 1, 2, 2, dtype=torch.float64, requires_grad=True)
    x = torch.rand(3, 1, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, v: BernoulliImage(a).log_prob(v), (logits, x))
    assert torch.autograd.gradgradcheck(lambda a, v: BernoulliImage(a).log_prob(v), (logits, x))


def test_distributions_expand_as_torchs_do():
    qz = specs.DiagonalNormal(3).build(6)(torch.randn(1, 6)).expand((5,))
    assert qz.batch_shape == (5,)
    assert qz.rsample((2,)).shape == (2, 5, 3)
    assert BernoulliImage(torch.zeros(1, 1, 8, 8)).expand((4,)).log_prob(torch.ones(4, 1, 8, 8)).shape == (4,)


@pytest.mark.parametrize("posterior", [q for q, _ in POSTERIORS if q.word not in WITHOUT_DENSITY], ids=str)
def test_posterior_samples_match_their_density(posterior):
    """The density of what is sampled is that of the distribution, and the samples have its moments."""
    torch.manual_seed(0)
    qz = posterior.build(6)(torch.randn(2, 6))
    z, log_density = qz.rsample_and_log_prob((40_000,), StepNoise(3, 0))
    if posterior.word in WITHOUT_INVERSE:
        with pytest.raises(NotImplementedError, match="no inverse"):
            qz.log_prob(z)
    else:
        torch.testing.assert_close(log_density(), qz.log_prob(z), atol=2e-5, rtol=1e-4)
    if posterior.word not in WITHOUT_MOMENTS:
        torch.testing.assert_close(z.mean(0), qz.mean, atol=0.03, rtol=0)
        torch.testing.assert_close(z.var(0), qz.variance, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("prior", PRIORS, ids=str)
def test_priors_sample_what_they_score(prior):
    """E_p[log p] from samples equals minus the entropy that a numerical integral of the density gives, in one dimension."""
    torch.manual_seed(0)
    model = VAE(specs.MLPEncoder((16,)), specs.DiagonalNormal(1), prior, MLP[1], specs.Bernoulli(), SHAPES[0])
    with torch.no_grad():
        pz = model.prior()
    grid = torch.linspace(-12, 12, 40_001)[:, None]
    log_p = pz.log_prob(grid).double().detach()
    width = float(grid[1, 0] - grid[0, 0])
    assert abs(float(log_p.exp().sum()) * width - 1) < 1e-3
    expected = float((log_p.exp() * log_p).sum()) * width
    scored = pz.log_prob(pz.sample((40_000,))).detach()
    assert abs(float(scored.mean()) - expected) < 4 * float(scored.std()) / 200


def test_stopped_log_density_sends_no_gradient_to_the_parameters_of_q():
    model = make(MODELS[0])
    x = images((1, 28, 28))
    qz = model.posterior(x)
    _, log_density = qz.rsample_and_log_prob((3,), StepNoise(0, 0), stop=True)
    scale = qz.base_dist.scale
    (with_stop,) = torch.autograd.grad(log_density().sum(), scale, retain_graph=True)
    _, log_density = qz.rsample_and_log_prob((3,), StepNoise(0, 0))
    (without,) = torch.autograd.grad(log_density().sum(), scale)
    # d log q / d scale through the sample is -eps^2 / scale; the direct path adds (eps^2 - 1) / scale: together -1 / scale.
    torch.testing.assert_close(without, (-3 / scale).detach(), atol=1e-3, rtol=1e-3)
    assert (with_stop - without).abs().max() > 0.1


def test_kl_of_the_draw_is_the_analytic_one_and_lazy_densities_are_computed_once():
    model = make(MODELS[0])
    draw = model.draw(images((1, 28, 28)), noise=StepNoise(0, 0))
    plain = [Independent(Normal(d.mean, d.stddev), 1) for d in (draw.qz, draw.pz)]
    torch.testing.assert_close(draw.kl[0], kl_divergence(*plain))
    assert draw.log_qz is draw.log_qz
    assert "log_pz" not in draw.__dict__, "the ELBO with an analytic KL never computes log p(z)"


def test_a_posterior_without_density_refuses_rather_than_guesses():
    model = make(MODELS[0])
    draw = copy.copy(model.draw(images((1, 28, 28)), noise=StepNoise(0, 0)))
    object.__setattr__(draw, "log_density", None)
    assert draw.log_qz is None
    with pytest.raises(TypeError, match="has no density"):
        _ = draw.log_w


def test_an_unconditional_model_refuses_labels():
    model, x, y = make(MODELS[0]), images((1, 28, 28)), torch.zeros(5, dtype=torch.long)
    for call in (lambda: model.posterior(x, y), lambda: model.prior(y), lambda: model.likelihood(torch.zeros(1, 3), y)):
        with pytest.raises(TypeError, match="unconditional"):
            call()


def test_sampling_does_not_depend_on_training_mode():
    model = make(MODELS[0])
    x = images((1, 28, 28))
    training = model.train().draw(x, noise=StepNoise(0, 0)).z[0]
    evaluating = model.eval().draw(x, noise=StepNoise(0, 0)).z[0]
    torch.testing.assert_close(training, evaluating, atol=0, rtol=0)
    assert (training - model.posterior(x).mean).abs().max() > 0.1, "a sample, not the mean"


@pytest.mark.parametrize("side", [(7, 28), (28, 5)])
def test_images_that_are_too_small_are_refused(side):
    for encoder in (specs.MLPEncoder(), specs.ConvEncoder()):
        with pytest.raises(ValueError, match="too small"):
            encoder.build((1, *side))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(28, 28), (15, 9), (8, 21)])
@pytest.mark.parametrize("bias", [True, False])
def test_convolutions_of_few_channels_are_torchs(channels, size, bias):
    torch.manual_seed(0)
    x = torch.randn(4, channels, *size).to(memory_format=torch.channels_last).requires_grad_()
    half = [-(-side // 2) for side in size]
    grow = (1 - size[0] % 2, 1 - size[1] % 2)
    down, up = HalvingConv(channels, 6, bias), DoublingConv(6, channels, grow, bias)
    for layer, given, shape, torchs in (
        (down, x, (4, 6, *half), torch.nn.Conv2d.forward),
        (up, torch.randn(4, 6, *half, requires_grad=True), (4, channels, *size), torch.nn.ConvTranspose2d.forward),
    ):
        learned = (given, *layer.parameters())
        out, expected = layer(given), torchs(layer, given)
        assert out.shape == shape
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
        weights = torch.randn_like(out)
        for ours, theirs in zip(
            *(torch.autograd.grad((y * weights).sum(), learned) for y in (out, expected)), strict=True
        ):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert down(x).is_contiguous(memory_format=torch.channels_last), "what follows would be brought into order first"
    for layer, given in ((down, x.detach()), (up, torch.randn(4, 6, *half))):
        names = [str(node.target) for node in make_fx(layer)(given).graph.nodes]
        assert not [name for name in names if "convolution" in name], "torch's own layer was asked"
    assert up(torch.randn(4, 6, *half), output_size=[2 * side - 1 for side in half]).shape[2:] == tuple(
        2 * side - 1 for side in half
    )


@pytest.mark.parametrize("shape", [(64, 3, 15, 17), (999, 37)])
@pytest.mark.parametrize("p", [0.05, 0.5])
def test_dropout_drops_the_share_it_should_and_keeps_the_mean(shape, p):
    torch.manual_seed(0)
    layer, x = Dropout(p), torch.ones(shape, requires_grad=True)
    out = layer(x)
    dropped = (out == 0).double().mean().item()
    assert dropped == pytest.approx(p, abs=5 * math.sqrt(p * (1 - p) / x.numel()))
    kept = out[out != 0]
    torch.testing.assert_close(kept, torch.full_like(kept, 1 / (1 - p)), rtol=1e-4, atol=0)
    out.sum().backward()
    torch.testing.assert_close(x.grad, out.detach(), msg="of ones the gradient is what was multiplied by")
    assert layer.eval()(x) is x


def test_dropouts_mask_depends_on_the_seed_and_not_on_the_memorys_order():
    layer, x = Dropout(0.3), torch.rand(40, 4, 15, 17) + 1
    drawn = []
    for seed, order in ((0, torch.contiguous_format), (0, torch.channels_last), (1, torch.channels_last)):
        torch.manual_seed(seed)
        drawn.append(layer(x.contiguous(memory_format=order)))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[1], drawn[2])
    neighbours = torch.stack([drawn[1].permute(0, 2, 3, 1).flatten()[i::4] == 0 for i in range(4)]).double()
    assert (torch.corrcoef(neighbours) - torch.eye(4)).abs().max() < 0.05


def test_dropouts_masks_do_not_depend_on_each_other():
    layer, x = Dropout(0.3), torch.ones(200_000)
    torch.manual_seed(0)
    masks = torch.stack([layer(x) == 0 for _ in range(40)]).double()  # one after the other, as layers and steps do
    assert (torch.corrcoef(masks) - torch.eye(40)).abs().max() < 5 / 200_000**0.5
    assert len(masks.unique(dim=0)) == 40


def test_dropout_of_everything_leaves_nothing():
    assert Dropout(1.0)(torch.ones(5)).tolist() == [0] * 5


def test_gates_are_for_dense_layers():
    layers = specs.MLPEncoder((6,), "gated").build((1, 8, 8))
    x = torch.rand(3, 1, 8, 8)
    a, b = layers.layers[1](x.flatten(1)).chunk(2, 1)
    torch.testing.assert_close(layers(x), a * torch.sigmoid(b))
    for spec in (specs.ConvEncoder((4,), activation="gated"), specs.ConvDecoder((4, 4), activation="gated")):
        with pytest.raises(UsageError, match="gated is for dense layers"):
            spec.build((1, 8, 8)) if isinstance(spec, specs.ConvEncoder) else spec.build(2, (1, 8, 8))

"""Codes, one-hot latents and latents without a distribution, against brute force, formulas by hand and enumeration."""

import itertools
import math
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from torch.func import jacrev

import vaelab as v
from vaelab import specs
from vaelab.config import override
from vaelab.divergences import analytic_kl, log_mean_exp
from vaelab.errors import UsageError
from vaelab.evaluate.codebook import Usage, codebook_usage
from vaelab.evaluate.elbo import evaluate
from vaelab.evaluate.overview import overview
from vaelab.evaluate.undefined import why_no_annealing, why_no_bound
from vaelab.models import VAE, Batch
from vaelab.objectives import IWAE, RAE, elbo_terms
from vaelab.posteriors.codes import nearest
from vaelab.processes.distributed import Team
from vaelab.recipes import recipe
from vaelab.runtime import RowNoise, StepNoise, denormals_flushed
from vaelab.training.stepping import CompiledStep
from vaelab.training.trainer import Trainer

CPU = torch.device("cpu")
SMALL = (1, 8, 8)
VQ = {
    "posterior": specs.VectorQuantized((3, 3), 8, 3, codebook_decay=0.8),
    "prior": "uniform-codes",
    "encoder": specs.ResidualEncoder((4, 6, 6), 1, 4),
    "decoder": specs.ResidualDecoder((6, 6, 4), 1, 4, from_grid=True),
}
RUNS = {
    "vq": VQ,
    "gumbel-softmax": {"posterior": specs.GumbelSoftmax(3, 4), "prior": "uniform-categories"},
    "rae": {"posterior": specs.Deterministic(4), "objective": RAE(gradient_penalty=1e-3)},
}


def run_of(kind: str) -> v.Run:
    networks = {"encoder": specs.MLPEncoder((16,)), "decoder": specs.MLPDecoder((16,))}
    return override(recipe("mlp"), data="digits", batch_size=96, precision="fp32", **{**networks, **RUNS[kind]})


@pytest.fixture
def head():
    torch.manual_seed(0)
    return specs.VectorQuantized((2, 3), 7, 4).build(5 * 6)


def sites_of(head, features: torch.Tensor) -> torch.Tensor:
    """The encoder's vectors (B, S, C), by a linear map at each site."""
    weight, bias = head.to_code.weight[:, :, 0, 0], head.to_code.bias
    return torch.einsum("bfs,cf->bsc", features.unflatten(1, (-1, 6)), weight) + bias


def test_how_much_farther_than_the_closest_a_code_lies(head):
    features = torch.randn(4, 30)
    z_e, codebook = sites_of(head, features).detach().double(), head.codebook.double()
    distances = (z_e[:, :, None] - codebook).square().sum(3)
    closest, second = distances.argsort(2)[:, :, 0], distances.argsort(2)[:, :, 1]

    def excess(vectors: torch.Tensor) -> torch.Tensor:
        return head.excess(features, vectors.mT.flatten(1))

    torch.testing.assert_close(excess(head.codebook[closest]), torch.zeros(4, 6).double(), atol=1e-6, rtol=0)
    gap = (distances.gather(2, second[..., None]) - distances.gather(2, closest[..., None]))[..., 0]
    torch.testing.assert_close(excess(head.codebook[second]), gap / z_e.square().sum(2), atol=1e-5, rtol=1e-5)
    assert excess(head.codebook[closest] + 0.01).isinf().all(), "no code at all"


def same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# --- codes ----------------------------------------------------------------------------------------------------------


def test_the_nearest_code_is_that_of_all_distances():
    torch.manual_seed(0)
    vectors, codebook = torch.randn(50, 3, 4), torch.randn(9, 4)
    by_hand = [[min(range(9), key=lambda k: float((z - codebook[k]).square().sum())) for z in row] for row in vectors]
    assert nearest(vectors, codebook).tolist() == by_hand
    with torch.autocast("cpu", torch.bfloat16):
        assert nearest(vectors, codebook).tolist() == by_hand, "distances are in fp32 whatever is around them"


def test_latents_are_the_codes_vectors_channels_first(head):
    features = torch.randn(8, 30)
    qz = head(features)
    z_e = sites_of(head, features)
    codes = nearest(z_e, head.codebook)
    assert torch.equal(qz.codes, codes)
    for b, s, c in itertools.product(range(8), range(6), range(4)):
        assert qz.mean[b].reshape(4, 2, 3)[c, s // 3, s % 3] == head.codebook[codes[b, s], c]
    z, log_mass = qz.rsample_and_log_prob((3,), StepNoise(0, 0))
    assert torch.equal(z, qz.center.expand(3, 8, 24))
    assert torch.equal(log_mass(), torch.zeros(3, 8))
    assert torch.equal(qz.log_prob(z[:, :1]), torch.tensor(0.0).where(z[0, :1].eq(z[0]).all(1), -math.inf).expand(3, 8))


def test_the_gradient_goes_straight_through_to_the_encoders_vectors(head):
    """d f(z) / d z_e is d f / d z at the code; the codebook has none."""
    features = torch.randn(8, 30, requires_grad=True)
    target = torch.randn(8, 24)

    def loss(z):
        return (z - target).pow(4).sum()

    qz = head(features)
    (ours,) = torch.autograd.grad(loss(qz.mean), features)
    z = qz.mean.detach().requires_grad_()
    (at_code,) = torch.autograd.grad(loss(z), z)
    z_e = sites_of(head, features).mT.flatten(1)
    (expected,) = torch.autograd.grad(z_e, features, at_code)
    torch.testing.assert_close(ours, expected)
    assert not head.codebook.requires_grad


def test_the_commitment_is_a_squared_distance_and_moves_the_encoder_alone(head):
    features = torch.randn(8, 30)
    z_e = sites_of(head, features)
    qz = head(features)
    e = head.codebook[qz.codes]
    torch.testing.assert_close(qz.penalty, 0.25 * (z_e - e).square().sum((1, 2)))
    torch.manual_seed(0)
    model = VAE(specs.MLPEncoder((12,)), specs.VectorQuantized((2, 3), 7, 4), specs.UniformCodes(),
                specs.MLPDecoder((8,)), specs.Bernoulli(), SMALL)  # fmt: skip
    draw = model.draw(torch.rand(5, *SMALL), noise=StepNoise(0, 0))
    found = torch.autograd.grad(draw.penalty.sum(), list(model.parameters()), allow_unused=True)
    reached = {
        name.split(".")[0] for (name, _), g in zip(model.named_parameters(), found, strict=True) if g is not None
    }
    assert reached == {"encoder", "posterior_head"}


def test_the_codebook_follows_moving_averages_over_two_steps():
    """By the paper's counts and sums, code by code; a code that no vector takes keeps its place."""
    torch.manual_seed(0)
    head = specs.VectorQuantized((2, 3), 7, 4, codebook_decay=0.7, restart_below=0.0).build(30)
    codebook = head.codebook.clone()
    sites = 6 * 8
    counts, sums = torch.full((7,), sites / 7), codebook * sites / 7
    for _ in range(2):
        features = torch.randn(8, 30)
        z_e = sites_of(head, features).flatten(0, 1)
        codes = nearest(z_e, codebook)
        head.train()(features)
        torch.testing.assert_close(head.codebook, codebook, msg="a forward pass moves nothing")
        head.move(Team())
        for k in range(7):
            mine = z_e[codes == k]
            counts[k] = 0.7 * counts[k] + 0.3 * len(mine)
            sums[k] = 0.7 * sums[k] + 0.3 * mine.sum(0)
        codebook = (sums / counts[:, None]).detach()
        torch.testing.assert_close(head.codebook, codebook, rtol=1e-4, atol=1e-5)


def test_a_code_that_is_never_seen_again_keeps_its_place():
    """Where none is restarted, also after its averages have come to what a processor takes for 0."""
    torch.manual_seed(0)
    head = specs.VectorQuantized((2, 3), 7, 4, codebook_decay=0.9, restart_below=0.0).build(30)
    codebook = head.codebook.clone()
    with denormals_flushed():
        for _ in range(1000):
            head.move(Team())
    torch.testing.assert_close(head.codebook, codebook, rtol=1e-3, atol=1e-3)


def test_only_training_shows_the_codebook_anything(head):
    before = {name: value.clone() for name, value in head.state_dict().items()}
    seen = head.seen.clone()
    head.eval()(torch.randn(8, 30))
    assert torch.equal(head.seen, seen)
    assert same_bits(head.state_dict(), before)
    training, evaluating = head.train()(torch.ones(2, 30)), head.eval()(torch.ones(2, 30))
    assert torch.equal(training.mean, evaluating.mean)


def test_a_code_out_of_use_starts_again_at_a_vector_of_the_batch(head):
    with torch.no_grad():
        head.codebook[3] = 1e3
        head.share[3] = 1e-4
    features = torch.randn(8, 30)
    z_e = sites_of(head, features).flatten(0, 1)
    head.train()(features)
    head.move(Team())
    assert (head.codebook[3] == z_e).all(1).any() or torch.isclose(head.codebook[3], z_e, atol=1e-5).all(1).any()
    torch.testing.assert_close(head.share[3], torch.tensor(1 / 7))


def test_codes_of_less_than_a_part_of_an_even_share_start_again():
    """Of 4 codes an even share is a quarter; 0.4 of it is a tenth, and the shares become 0.9 of what they were."""
    head = specs.VectorQuantized((1, 2), 4, 3, codebook_decay=0.9, restart_below=0.4).build(6).train()
    with torch.no_grad():
        head.codebook[1:] = 1e3 * torch.eye(3)
        head.total.copy_(head.codebook / 4)
        head.share[1:] = torch.tensor([0.112, 0.110, 0.3])
    features = torch.randn(8, 6)
    with torch.no_grad():
        z_e = head._sites(features)
    head(features)
    head.move(Team())
    torch.testing.assert_close(head.share[1:], torch.tensor([0.1008, 0.25, 0.27]))
    torch.testing.assert_close(head.codebook[2], z_e[4, 1], msg="image 2 * 8 / 4, its other site")
    torch.testing.assert_close(head.codebook[1], 0.9 * 1e3 / 4 * torch.tensor([1.0, 0, 0]) / 0.1008)


def test_restarts_are_spread_over_the_batch():
    """One image for each code, the same distance apart."""
    head = specs.VectorQuantized((1, 1), 4, 1).build(1).train()
    with torch.no_grad():
        head.to_code.weight.fill_(1.0)
        head.to_code.bias.zero_()
    head(torch.arange(12.0)[:, None])
    assert head.seen[:, 2].tolist() == [0, 3, 6, 9]
    few = specs.VectorQuantized((1, 1), 8, 1).build(1).train()
    few.to_code.load_state_dict(head.to_code.state_dict())
    few(torch.arange(4.0)[:, None])
    assert few.seen[:, 2].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


def test_several_processes_learn_one_codebook_that_of_the_whole_batch(monkeypatch):
    """But for restarts, which come from one process or the other."""
    features = torch.randn(8, 30, generator=torch.Generator().manual_seed(2))

    def shown(rows: slice):
        torch.manual_seed(0)
        head = specs.VectorQuantized((2, 3), 7, 4).build(30).train()
        with torch.no_grad():
            head.codebook[[1, 4]] = 1e3
            head.share[[1, 4]] = 0.0
            head(features[rows])
        return head

    whole, halves = shown(slice(None)), [shown(slice(4)), shown(slice(4, None))]
    whole.move(Team())
    mail, together = [], threading.Barrier(2, timeout=20)  # a thread in place of each process

    def all_reduce(values):
        mail.append(values.clone())
        together.wait()
        values.copy_(mail[0] + mail[1])

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda rank: halves[rank].move(Team(rank, 2)), range(2)))
    assert same_bits(halves[0].state_dict(), halves[1].state_dict())
    kept = [0, 2, 3, 5, 6]
    torch.testing.assert_close(halves[0].share, whole.share)
    torch.testing.assert_close(halves[0].codebook[kept], whole.codebook[kept], rtol=1e-4, atol=1e-5)
    for code, half in ((1, slice(4, None)), (4, slice(4))):
        vectors = sites_of(whole, features[half]).flatten(0, 1)
        assert torch.isclose(halves[0].codebook[code], vectors, atol=1e-5).all(1).any(), "by its number modulo 2"


def test_codes_start_at_different_images(head):
    features = torch.randn(9, 30)
    head.start_at(features)
    z_e = sites_of(head, features)
    for k, code in enumerate(head.codebook):
        torch.testing.assert_close(code, z_e[k, k % 6], msg="code k is a vector of image k, of the next site each time")
    head.start_at(features[:2])
    for k, code in enumerate(head.codebook):
        torch.testing.assert_close(code, z_e[k % 2, (k + k // 2) % 6], msg="no vector twice")


def test_a_training_starts_with_codes_of_as_many_training_images(digits):
    trainer = Trainer(override(run_of("vq"), compile="off"), digits, CPU)
    head, images = trainer.model.posterior_head, trainer._some_images(8)
    assert len(images) == 8
    with torch.no_grad():
        z_e = head._sites(trainer.model.encoder(images))
    torch.testing.assert_close(head.codebook, z_e[range(8), range(8)], rtol=1e-4, atol=1e-5)


def test_the_uniform_prior_scores_and_samples_codes(head):
    part = specs.UniformCodes().build(head, SMALL)
    pz = part(codebook=head.codebook)
    z = pz.sample((5000,))
    codes = nearest(z.unflatten(1, (4, 6)).mT, head.codebook)
    torch.testing.assert_close(pz.log_prob(z), torch.full((5000,), -6 * math.log(7)))
    torch.testing.assert_close(pz.log_prob(head(torch.randn(3, 30)).mean), torch.full((3,), -6 * math.log(7)))
    share = torch.bincount(codes.flatten(), minlength=7) / codes.numel()
    assert ((share - 1 / 7).abs() < 5 * math.sqrt(6 / 49 / codes.numel())).all()
    again = pz.rsample_from(StepNoise(0, 0), 5000)
    share = torch.bincount(nearest(again.unflatten(1, (4, 6)).mT, head.codebook).flatten(), minlength=7) / codes.numel()
    assert ((share - 1 / 7).abs() < 5 * math.sqrt(6 / 49 / codes.numel())).all()
    assert pz.log_prob(z + 0.01).max() == -math.inf
    torch.testing.assert_close(analytic_kl(head(torch.randn(3, 30)), pz), torch.full((3,), 6 * math.log(7)))


@pytest.mark.parametrize(
    ("posterior", "prior"),
    [("vq", "standard-normal"), ("vq", "uniform-categories"), ("gumbel-softmax", "uniform-codes"),
     ("deterministic", "uniform-codes")],
)  # fmt: skip
def test_parts_over_other_latents_are_refused_in_one_line(posterior, prior):
    run = override(recipe("mlp"), posterior=posterior, prior=prior, encoder="residual")
    with pytest.raises(UsageError, match="--p") as caught:
        VAE(run.encoder, run.posterior, run.prior, run.decoder, specs.Bernoulli(), (1, 28, 28))
    assert "\n" not in str(caught.value)


def test_a_grid_that_the_features_do_not_fill_is_refused():
    with pytest.raises(UsageError, match="--grid 7 7: the encoder's 32 features are no multiple of 49 sites"):
        specs.VectorQuantized().build(32)
    with pytest.raises(UsageError, match="no multiple of 49"):
        specs.ResidualDecoder(from_grid=True).build(20, (1, 28, 28))
    with pytest.raises(UsageError, match="to nothing"):
        specs.ResidualEncoder((4,) * 4).build((1, 8, 8))


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 33, 47), (1, 9, 31)])
def test_a_decoder_from_a_grid_restores_the_size_and_keeps_places(shape):
    """Latents of one corner change pixels of that corner alone, as far as the blocks see."""
    torch.manual_seed(0)
    height, width = shape[1] // 4, shape[2] // 4
    decoder = specs.ResidualDecoder((6, 4), 0, 3, from_grid=True).build(2 * height * width, shape)
    z = torch.zeros(1, 2, height, width)
    corner = z.clone()
    corner[..., 0, 0] = 1
    with torch.no_grad():
        change = (decoder(corner.flatten(1)) - decoder(z.flatten(1))).abs().sum((0, 1))
    assert change.shape == shape[1:]
    assert change[:4, :4].max() > 0
    reach = 16  # a 3x3 and two 4x4 convolutions
    assert change[min(reach, shape[1]) :].sum() + change[:, min(reach, shape[2]) :].sum() == 0


# --- one-hot latents ------------------------------------------------------------------------------------------------


def categorical(rows: int = 3):
    torch.manual_seed(0)
    return specs.GumbelSoftmax(2, 3).build(6)(2 * torch.randn(rows, 6))


def every_latent(sites: int = 2, classes: int = 3) -> torch.Tensor:
    """All one-hot latents, (M^S, S M)."""
    numbers = torch.cartesian_prod(*[torch.arange(classes)] * sites)
    return torch.nn.functional.one_hot(numbers, classes).float().flatten(1)


def test_draws_are_one_hot_and_as_frequent_as_their_probabilities():
    qz, count = categorical(), 40_000
    z, log_mass = qz.rsample_and_log_prob((count,), StepNoise(1, 0))
    assert set(z.unique().tolist()) == {0.0, 1.0}
    assert (z.unflatten(-1, (2, 3)).sum(-1) == 1).all()
    for latent in every_latent():
        p = qz.log_prob(latent).exp()
        found = (z == latent).all(-1).float().mean(0)
        assert ((found - p).abs() < 5 * (p * (1 - p) / count).sqrt() + 1e-6).all()
    torch.testing.assert_close(log_mass(), qz.log_prob(z))
    total = torch.stack([qz.log_prob(latent) for latent in every_latent()]).logsumexp(0)
    torch.testing.assert_close(total, torch.zeros(3), atol=1e-5, rtol=0)


def test_gradients_are_those_of_the_softmax_with_the_same_noise():
    torch.manual_seed(0)
    head = specs.GumbelSoftmax(2, 3, temperature=0.7).build(6)
    features, target = torch.randn(3, 6, requires_grad=True), torch.randn(3, 6)
    z, _ = head(features).rsample_and_log_prob((1,), StepNoise(1, 0))
    (ours,) = torch.autograd.grad((z[0] * target).sum(), features)
    gumbel = -torch.log(-torch.log(StepNoise(1, 0).uniform("z", (3, 1, 2, 3))))[:, 0]
    logits = head.logits(features).unflatten(1, (2, 3)).log_softmax(-1)
    soft = ((logits + gumbel) / 0.7).softmax(-1).flatten(1)
    (expected,) = torch.autograd.grad((soft * target).sum(), features)
    torch.testing.assert_close(ours, expected)


def test_the_kl_is_the_sum_over_all_latents():
    qz = categorical()
    pz = specs.UniformCategories().build(specs.GumbelSoftmax(2, 3).build(6), SMALL)()
    latents = every_latent()
    log_q, log_p = torch.stack([qz.log_prob(z) for z in latents]), pz.log_prob(latents)
    torch.testing.assert_close(log_p.exp().sum(), torch.tensor(1.0))
    torch.testing.assert_close(analytic_kl(qz, pz), (log_q.exp() * (log_q - log_p[:, None])).sum(0))
    assert pz.log_prob(0.5 * latents[:1] + 0.5 * latents[-1:]) == -math.inf
    drawn = pz.sample((9000,))
    assert ((drawn.mean(0) - 1 / 3).abs() < 5 * math.sqrt(2 / 9 / 9000)).all()


def tiny_categorical() -> VAE:
    torch.manual_seed(0)
    model = VAE(specs.MLPEncoder((8,)), specs.GumbelSoftmax(2, 3), specs.UniformCategories(), specs.MLPDecoder(()),
                specs.Bernoulli(), SMALL)  # fmt: skip
    with torch.no_grad():
        model.posterior_head.logits.weight.mul_(4)
        model.decoder.layers[0].weight.mul_(2)
    return model.eval()


def test_bounds_of_a_categorical_model_are_ordered_below_its_exact_likelihood():
    """With 9 latents p(x) is a sum; E log mean w over K draws is one over 9^K."""
    model, x = tiny_categorical(), torch.rand(20, *SMALL, generator=torch.Generator().manual_seed(3)).round()
    latents = every_latent()
    with torch.no_grad():
        qz, pz = model.posterior(x), model.prior()
        log_q = torch.stack([qz.log_prob(z) for z in latents]).double()
        log_joint = (model.likelihood(latents[:, None]).log_prob(x) + pz.log_prob(latents)[:, None]).double()
        exact = log_joint.logsumexp(0)
        log_w = log_joint - log_q
        elbo = (log_q.exp() * log_w).sum(0)
        pairs = log_mean_exp(torch.stack([log_w[:, None].expand(9, 9, 20), log_w[None].expand(9, 9, 20)]))
        iwae = ((log_q[:, None] + log_q[None]).exp() * pairs).sum((0, 1))
        assert (elbo < iwae).all()
        assert (iwae < exact).all()
        distortion, rate = elbo_terms(model, [(Batch(x), RowNoise(0))], num_samples=4000)
        drawn = model.draw(x, num_samples=8000, noise=StepNoise(2, 0)).log_w.double()
    spread = (log_q.exp() * (log_w - elbo).square()).sum(0).sqrt()
    assert ((torch.from_numpy(-distortion - rate) - elbo).abs() < 5 * spread / 4000**0.5 + 1e-3).all()
    bounds = log_mean_exp(drawn.unflatten(0, (2, 4000)))
    assert ((bounds.mean(0) - iwae).abs() < 5 * bounds.std(0) / 4000**0.5 + 1e-3).all()


def test_center_is_the_mode():
    qz = categorical()
    best = every_latent()[torch.stack([qz.log_prob(z) for z in every_latent()]).argmax(0)]
    assert torch.equal(qz.center, best)


# --- no distribution ------------------------------------------------------------------------------------------------


def deterministic(decoder: specs.MLPDecoder = specs.MLPDecoder(()), likelihood=specs.Gaussian(0.5)) -> VAE:
    torch.manual_seed(0)
    return VAE(specs.MLPEncoder((8,)), specs.Deterministic(3), specs.StandardNormal(), decoder, likelihood, SMALL)


def test_a_deterministic_latent_is_its_mean_and_has_no_density():
    model, x = deterministic(), torch.rand(4, *SMALL)
    draw = model.draw(x, num_samples=2, noise=StepNoise(0, 0))
    assert torch.equal(draw.z[0], model.posterior(x).mean.expand(2, 4, 3))
    assert torch.equal(model.center(x), draw.z[0][0])
    for ask in (lambda: draw.kl, lambda: draw.log_w):
        with pytest.raises(TypeError, match="PointPosterior has no density"):
            ask()
    with pytest.raises(TypeError, match="rate is undefined"):
        elbo_terms(model, [(Batch(x), RowNoise(0))])


def test_the_parts_of_a_regularised_autoencoder():
    """Distortion, half of |z|^2, the sum of squares of the decoder alone; all weights 0 leave an autoencoder."""
    model, x = deterministic(), torch.rand(4, *SMALL)
    z = model.center(x)
    objective = RAE(latent_weight=0.3, l2=0.2)
    means = {
        k: p.mean(0) for k, p in objective.parts(model, objective.networks(model), Batch(x), StepNoise(0, 0)).items()
    }
    distortion = -model.likelihood(z).log_prob(x).mean()
    squares = sum(p.square().sum() for p in model.decoder.parameters())
    torch.testing.assert_close(means["norm"], 0.5 * z.square().sum(1).mean())
    torch.testing.assert_close(means["weights"], squares)
    torch.testing.assert_close(objective.loss(means), distortion + 0.3 * means["norm"] + 0.2 * squares)
    plain = RAE(latent_weight=0.0, l2=0.0)
    torch.testing.assert_close(plain.loss(means), distortion)


def test_the_probed_gradient_penalty_is_the_squared_jacobian_on_average():
    """Of a decoder with one linear layer and a sigmoid, against automatic differentiation of every pixel."""
    model, count = deterministic(), 4000
    x = torch.rand(1, *SMALL)
    z = model.center(x)[0].detach()
    jacobian = jacrev(lambda z: model.likelihood(z[None]).mean.flatten())(z)
    exact = jacobian.square().sum()
    objective = RAE(gradient_penalty=1.0)
    with torch.no_grad():
        parts = objective.parts(model, objective.networks(model), Batch(x.expand(count, -1, -1, -1)), StepNoise(0, 0))
    found = parts["jacobian"]
    assert not found.requires_grad
    assert (found.mean() - exact).abs() < 4 * found.std() / count**0.5
    assert 4 * found.std() / count**0.5 < 0.1 * exact, "the test can tell"


def test_the_gradient_penalty_smooths_the_decoder_alone():
    model, x = deterministic(specs.MLPDecoder((8,), "tanh")), torch.rand(4, *SMALL)
    objective = RAE(gradient_penalty=1.0)
    part = objective.parts(model, objective.networks(model), Batch(x), StepNoise(0, 0))["jacobian"]
    found = torch.autograd.grad(part.sum(), list(model.parameters()), allow_unused=True)
    reached = {
        name.split(".")[0] for (name, _), g in zip(model.named_parameters(), found, strict=True) if g is not None
    }
    assert reached == {"decoder"}


# --- training, measuring --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", RUNS)
def test_five_steps_and_five_resumed_are_ten_to_the_last_bit(kind, digits):
    run = override(run_of(kind), compile="off")
    whole, first, then = (Trainer(run, digits, CPU) for _ in range(3))
    start = {name: value.clone() for name, value in whole.model.state_dict().items()}
    for _ in range(10):
        whole.train_step()
    for _ in range(5):
        first.train_step()
    then.load_state(first.state(), None)
    for _ in range(5):
        then.train_step()
    assert same_bits(whole.model.state_dict(), then.model.state_dict())
    if kind == "vq":
        assert not torch.equal(whole.model.posterior_head.codebook, start["posterior_head.codebook"])


@pytest.mark.parametrize("kind", RUNS)
def test_traced_steps_take_the_same_way(kind, digits, uncompiled):
    """What the compiler is given; itself it takes a minute."""
    plain, compiled = (Trainer(override(run_of(kind), compile=way), digits, CPU) for way in ("off", "on"))
    for trainer in (plain, compiled):
        for _ in range(4):
            trainer.train_step()
    assert isinstance(compiled._take_step, CompiledStep)
    assert not compiled._take_step._failed
    torch.testing.assert_close(compiled.terms[:4], plain.terms[:4], rtol=1e-4, atol=1e-3)
    for (name, a), b in zip(plain.model.state_dict().items(), compiled.model.state_dict().values(), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-4, msg=name)


def test_perplexity_of_uniform_codes_is_their_number_and_of_one_code_one():
    uniform = Usage(torch.arange(12).reshape(4, 3).repeat(5, 1).numpy(), 12).perplexity("")
    assert uniform.value == pytest.approx(12)
    assert uniform.stderr == pytest.approx(0, abs=1e-9)
    lone = Usage(torch.zeros(4, 3, dtype=torch.long).numpy(), 12)
    assert (lone.perplexity("").value, lone.used("").value) == (1.0, 1.0)
    assert lone.counts.tolist() == [12] + [0] * 11


def test_the_perplexitys_standard_error_is_its_spread_over_data_sets():
    rng = torch.Generator().manual_seed(0)
    p = torch.tensor([0.5, 0.2, 0.1, 0.1, 0.05, 0.05])
    found = [Usage(torch.multinomial(p, 4 * 400, True, generator=rng).reshape(400, 4).numpy(), 6) for _ in range(200)]
    estimates = [usage.perplexity("") for usage in found]
    spread = torch.tensor([e.value for e in estimates]).std()
    stated = torch.tensor([e.stderr for e in estimates]).mean()
    assert abs(stated / spread - 1) < 5 / math.sqrt(2 * 200)


def test_a_model_with_a_codebook_is_measured_by_its_use(digits):
    trainer = Trainer(override(run_of("vq"), compile="off"), digits, CPU)
    model = trainer.model.eval()
    usage = codebook_usage(model, digits, "test")
    with torch.no_grad():
        codes = model.posterior(digits.test.rows(slice(None)).x).codes
    assert torch.equal(torch.from_numpy(usage.codes), codes)
    found = overview(model, digits, "test", 100)
    assert found["metrics"].keys() == {"perplexity", "codes_used"}
    assert sum(found["per_dimension"]["code_counts"]) == codes.numel()
    assert 1 <= found["metrics"]["perplexity"].value <= found["metrics"]["codes_used"].value <= 8
    assert "no active units" in found["about"]["left_out"][0]
    rate = evaluate(model, trainer.run, digits)["rate"]
    assert (rate.value, rate.stderr) == (pytest.approx(9 * math.log(8)), pytest.approx(0, abs=1e-6))
    assert "chosen, not drawn" in why_no_bound(model)
    assert "lie in a codebook's vectors" in why_no_annealing(model)
    with pytest.raises(TypeError, match="no bound holds the penalty"):
        IWAE(2).parts(model, None, Batch(torch.rand(2, *model.shape)), StepNoise(0, 0))
    with pytest.raises(TypeError, match="has none"):
        codebook_usage(Trainer(override(run_of("rae"), compile="off"), digits, CPU).model, digits, "test")


def test_codes_are_counted_in_the_split_that_is_asked_for(digits):
    data = replace(digits, train=digits.train.first(30), validation=digits.validation.first(20))
    model = Trainer(override(run_of("vq"), compile="off"), digits, CPU).model.eval()
    for split, images in (("train", 30), ("validation", 20), ("test", 180)):
        with torch.no_grad():
            codes = model.posterior(data.split(split).rows(slice(None)).x).codes
        found = overview(model, data, split, 10)
        assert found["per_dimension"]["code_counts"] == torch.bincount(codes.flatten(), minlength=8).tolist()
        assert found["metrics"]["perplexity"].n == found["metrics"]["codes_used"].n == images
        assert found["metrics"]["codes_used"].protocol.startswith(f"digits {split}, ")


def test_what_a_model_without_a_density_has_is_measured_and_the_rest_named(digits):
    small = replace(digits, train=digits.train.first(200))
    model = Trainer(override(run_of("rae"), compile="off"), digits, CPU).model.eval()
    found = overview(model, small, "test", 100)
    assert {"active_units", "two_sample_accuracy", "linear_probe", "knn_probe"} == found["metrics"].keys()
    assert len(found["about"]["left_out"]) == 1
    assert "mutual information, aggregate KL" in found["about"]["left_out"][0]
    assert evaluate(model, run_of("rae"), digits).keys() == {"distortion"}
    assert "no density" in why_no_bound(model)


def test_codes_restart_at_all_places_of_the_grid():
    head = specs.VectorQuantized((7, 7), num_codes=512, code_dim=1).build(49)
    with torch.no_grad():
        head.to_code.weight.fill_(1.0)
        head.to_code.bias.zero_()
    head.train()(torch.arange(49.0).expand(128, 49))
    assert head.seen[:, 2].unique().tolist() == list(map(float, range(49)))

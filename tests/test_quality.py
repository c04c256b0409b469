"""Distances between sets of images against closed forms and definitions; mutants of the code that the tests must kill."""

import inspect
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from scipy.spatial.distance import cdist
from torch import nn
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from vaelab.config import override
from vaelab.data import load
from vaelab.data.datasets import Dataset, Split, unit
from vaelab.errors import FailureError, UsageError
from vaelab.evaluate import quality
from vaelab.evaluate.features import EXTRACTOR_SEEDS, Extractor, features, train_extractor, weights_hash
from vaelab.evaluate.quality import frechet, precision_recall, reconstruction, sample_quality, why_no_comparison
from vaelab.recipes import recipe
from vaelab.training.trainer import build_model

EPOCHS = 12  # on digits: 132 steps


def mutant(name, old, new):
    """The function of this name, one piece of its source replaced."""
    source = inspect.getsource(getattr(quality, name))
    assert source.count(old) == 1, f"{name} no longer contains {old!r}"
    namespace = dict(vars(quality))
    exec(source.replace(old, new), namespace)
    return namespace[name]


def dataset(x, y=None, name="made", protocol="grey", binary=False):
    """A data set whose three splits are the same images."""
    part = Split(x, y, torch.arange(len(x)))
    return Dataset(name, protocol, part, part, part, binary, None)


class Stub(nn.Module):
    """A model that reconstructs ``restore(x)``, from a posterior over images; with ``pictures``, they are its samples."""

    device = torch.device("cpu")

    def __init__(self, restore=None, pictures=None, prior=None):
        super().__init__()
        self.restore, self.pictures = restore, pictures
        self.pz = prior or Independent(Normal(torch.zeros(2), 1.0), 1)

    def posterior(self, x):
        return Independent(Normal(x, 1.0), 3)

    def center(self, x):
        return self.posterior(x).mean

    def prior(self):
        return self.pz

    def likelihood(self, z):
        if self.pictures is None:
            return Independent(Normal(self.restore(z), 1.0), 3)
        handed_out, self.pictures = self.pictures[: len(z)], self.pictures.roll(-len(z), 0)
        return Independent(Normal(handed_out, 1.0), 3)


@pytest.fixture(scope="module")
def extractors(digits):
    return [train_extractor(digits, seed, epochs=EPOCHS) for seed in EXTRACTOR_SEEDS]


@pytest.fixture(scope="module")
def model(digits):
    return build_model(override(recipe("mlp"), encoder_hidden_dims=(64,), decoder_hidden_dims=(64,)), digits.shape)


# --- the Fréchet distance -------------------------------------------------------------------------------------------


def closed_form(mean_a, cov_a, mean_b, cov_b):
    return ((mean_a - mean_b) ** 2).sum() + np.trace(cov_a + cov_b - 2 * sqrtm(cov_a @ cov_b).real)


def two_normals(dims=5):
    rng = np.random.default_rng(3)
    roots = rng.normal(size=(2, dims, dims))
    means = rng.normal(size=(2, dims))
    return [(mean, root @ root.T) for mean, root in zip(means, roots, strict=True)]


def with_moments(mean, cov, count, seed):
    """A set whose mean and covariance are these exactly, not on average."""
    x = np.random.default_rng(seed).normal(size=(count, len(mean)))
    x -= x.mean(0)
    x = np.linalg.solve(np.linalg.cholesky(np.cov(x.T)), x.T).T
    return x @ np.linalg.cholesky(cov).T + mean


def check_closed_form(distance):
    (mean_a, cov_a), (mean_b, cov_b) = two_normals()
    a, b = with_moments(mean_a, cov_a, 40, 0), with_moments(mean_b, cov_b, 70, 1)
    assert distance(a, b) == pytest.approx(closed_form(mean_a, cov_a, mean_b, cov_b), rel=1e-6)


def test_sets_of_known_moments_have_the_distance_of_the_closed_form():
    check_closed_form(frechet)


def test_samples_of_two_known_normals_come_near_their_distance():
    (mean_a, cov_a), (mean_b, cov_b) = two_normals()
    rng = np.random.default_rng(0)
    a, b = rng.multivariate_normal(mean_a, cov_a, 50_000), rng.multivariate_normal(mean_b, cov_b, 50_000)
    assert frechet(a, b) == pytest.approx(closed_form(mean_a, cov_a, mean_b, cov_b), rel=0.02)


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("frechet", "2 * overlap", "overlap"),
        ("frechet", "means + ", ""),
        ("frechet", "+ (root_b**2).sum()", "+ (root_a**2).sum()"),
        ("frechet", "root_a @ root_b.T", "root_a @ root_b"),
        ("frechet", ".sum()\n    means", ".max()\n    means"),
        ("_root_of_covariance", "x - x.mean(0)", "x"),
        ("_root_of_covariance", "np.sqrt(len(x) - 1)", "np.sqrt(len(x))"),
    ],
)
def test_the_closed_form_notices_mistakes(name, old, new, monkeypatch):
    wrong = mutant(name, old, new)
    monkeypatch.setattr(quality, name, wrong)
    with pytest.raises(AssertionError):
        check_closed_form(quality.frechet)


def test_singular_covariances_cost_no_accuracy():
    rng = np.random.default_rng(0)
    axes, _ = np.linalg.qr(rng.normal(size=(64, 64)))
    few = rng.normal(size=(20, 64))
    assert frechet(few, few) < 1e-8
    a, b = rng.normal(size=(300, 30)) @ axes[:30], rng.normal(size=(300, 30)) @ axes[30:60]
    apart = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(np.cov(a.T)) + np.trace(np.cov(b.T))
    assert frechet(a, b) == pytest.approx(apart, abs=1e-10)  # orthogonal planes: no overlap at all
    dead = np.zeros((300, 3))
    assert frechet(np.hstack([a, dead]), np.hstack([b, dead])) == pytest.approx(frechet(a, b), abs=1e-10)


def test_identical_sets_are_at_zero_in_any_order():
    rng = np.random.default_rng(0)
    a, b = rng.gamma(2.0, size=(200, 64)), rng.gamma(3.0, size=(300, 64))
    assert frechet(a, a) < 1e-8
    assert frechet(a, a[rng.permutation(200)]) < 1e-8
    assert frechet(a, b[rng.permutation(300)]) == pytest.approx(frechet(a, b), rel=1e-10)
    assert frechet(a, b) == pytest.approx(frechet(b, a), rel=1e-10)
    assert frechet(a, b) > 1


def test_what_has_no_distance_is_refused():
    x = np.zeros((5, 2))
    with pytest.raises(UsageError, match="1 images are too few"):
        frechet(x, x[:1])
    with pytest.raises(UsageError, match="3 images are too few to compare: give 4"):
        precision_recall(x[:3], x)
    with pytest.raises(UsageError, match="k = 0"):
        precision_recall(x, x, k=0)
    with pytest.raises(FailureError, match="not finite"):
        frechet(x, np.full((5, 2), np.nan))


# --- precision and recall -------------------------------------------------------------------------------------------


def by_definition(real, generated, k):
    """Kynkäänniemi et al., eqs. 1 and 2, one point and one ball at a time."""

    def share(points, members):
        within = cdist(members, members)
        radii = [np.sort(np.delete(row, i))[k - 1] for i, row in enumerate(within)]
        to = cdist(points, members)
        return np.mean([any(to[i, j] <= radii[j] for j in range(len(members))) for i in range(len(points))])

    return share(generated, real), share(real, generated)


def check_definition(measure):
    rng = np.random.default_rng(0)
    for k in (1, 3, 6):
        real, generated = rng.normal(size=(90, 4)), 0.6 * rng.normal(size=(50, 4)) + 0.5
        assert measure(real, generated, k) == pytest.approx(by_definition(real, generated, k), abs=1e-12)


@pytest.mark.parametrize("block", [1, 400, 2**23])
def test_precision_and_recall_follow_their_definition_in_blocks_of_any_size(block, monkeypatch):
    monkeypatch.setattr(quality, "_BLOCK", block)
    check_definition(precision_recall)


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        (
            "precision_recall",
            "(torch.cat(precise).double().mean()), float(recalled.double().mean())",
            "(recalled.double().mean()), float(torch.cat(precise).double().mean())",
        ),
        ("precision_recall", "radius[:, None]", "radii"),
        ("_radii", "[:, k]", "[:, k - 1]"),  # the member counted as its own neighbour
    ],
)
def test_the_definition_notices_mistakes(name, old, new, monkeypatch):
    wrong = mutant(name, old, new)
    monkeypatch.setattr(quality, name, wrong)
    with pytest.raises(AssertionError):
        check_definition(quality.precision_recall)


def test_precision_and_recall_in_the_limits():
    rng = np.random.default_rng(0)
    real = rng.normal(size=(400, 8))
    assert precision_recall(real, real) == (1.0, 1.0)
    assert precision_recall(real, real[rng.permutation(400)]) == (1.0, 1.0)
    assert precision_recall(real, real + 1000) == (0.0, 0.0)
    two_modes = np.concatenate([real, real + 50])
    precision, recall = precision_recall(two_modes, rng.normal(size=(800, 8)))
    assert precision > 0.8
    assert recall < 0.5, "the second mode was never generated"
    one_image = np.repeat(real[:1], 800, 0)
    assert precision_recall(two_modes, one_image) == (1.0, 1 / 800), "copies of one image cover that image alone"


# --- the feature space ----------------------------------------------------------------------------------------------


def accuracy(extractor, split):
    return float((extractor(unit(split.x)).argmax(1) == split.y).float().mean())


def test_an_extractor_learns_its_classes_the_same_way_each_time(digits, extractors):
    state, calls = torch.get_rng_state(), []
    again = train_extractor(digits, 0, epochs=EPOCHS, on_step=lambda step, total: calls.append((step, total)))
    assert torch.equal(torch.get_rng_state(), state), "torch's global generator is left alone"
    assert calls == [(step, EPOCHS * 11) for step in range(1, EPOCHS * 11 + 1)]
    assert weights_hash(again) == weights_hash(extractors[0])
    assert len({weights_hash(extractor) for extractor in extractors}) == 3
    for extractor in extractors:
        assert not extractor.training
        assert accuracy(extractor, digits.test) > 0.95
        live = features(extractor, digits.test.x).std(0) > 0
        assert live.all(), f"{(~live).sum()} features are dead"


@pytest.mark.mnist
def test_an_epoch_of_mnist_is_learned(mnist):
    assert accuracy(train_extractor(mnist, 0, epochs=1), mnist.test) > 0.97


def test_the_hash_is_of_the_weights_and_of_nothing_else(extractors):
    first = extractors[0]
    twin = Extractor(first.shape, 10).eval()
    assert weights_hash(twin) != weights_hash(first)
    twin.load_state_dict(first.state_dict())
    twin.to(memory_format=torch.channels_last)
    assert weights_hash(twin) == weights_hash(first)
    with torch.no_grad():
        weight = twin.embed[0].weight
        weight[0, 0, 0, 0] = torch.nextafter(weight[0, 0, 0, 0], torch.tensor(1.0))
    assert weights_hash(twin) != weights_hash(first)


def test_features_depend_on_neither_batch_nor_order_nor_pixel_type(digits, extractors):
    x = digits.test.x
    whole = features(extractors[0], x)
    assert (whole.shape, whole.dtype) == ((180, 64), np.float64)
    order = np.random.default_rng(0).permutation(180)
    for other in (features(extractors[0], x, batch=7), features(extractors[0], unit(x))):
        np.testing.assert_allclose(other, whole, atol=1e-5)
    np.testing.assert_allclose(features(extractors[0], x[order], batch=50), whole[order], atol=1e-6)
    with pytest.raises(UsageError, match="images of 1x8x8 and an extractor for 1x28x28"):
        features(extractors[0], torch.zeros(3, 1, 8, 8))


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 28, 20), (2, 9, 13)])
def test_any_image_size_and_an_epoch_that_would_end_in_one_image(shape):
    x = torch.rand(129, *shape)
    y = torch.arange(129) % 3
    extractor = train_extractor(dataset(x, y), 0, epochs=1)
    assert features(extractor, x).shape == (129, 64)


def test_data_that_no_extractor_can_be_trained_on_is_refused(digits):
    x, y = digits.train.x[:50], digits.train.y[:50]
    with pytest.raises(UsageError, match="made has no labels: Fréchet distances are undefined for data without labels"):
        train_extractor(dataset(x), 0)
    with pytest.raises(UsageError, match="all of one class"):
        train_extractor(dataset(x, torch.zeros_like(y)), 0)
    with pytest.raises(UsageError, match="load it with protocol='grey'"):
        train_extractor(load("digits", protocol="static"), 0)
    with pytest.raises(UsageError, match="0 epochs"):
        train_extractor(dataset(x, y), 0, epochs=0)


def test_one_extractor_serves_every_protocol(digits):
    grey, dynamic = (train_extractor(load("digits", protocol=p), 0, epochs=1) for p in ("grey", "dynamic"))
    assert weights_hash(grey) == weights_hash(dynamic), "dynamic binarization keeps the training split grey"


# --- reconstructions ------------------------------------------------------------------------------------------------


def test_psnr_and_ssim_known_by_hand():
    """A constant error of 0.1 is 20 dB; of two constant images SSIM is its luminance term alone."""
    data = dataset(torch.full((6, 1, 16, 16), 0.3))
    result = reconstruction(Stub(lambda x: x + 0.1), data, "test")
    assert result["psnr"].value == pytest.approx(20.0, abs=1e-4)
    luminance = (2 * 0.3 * 0.4 + 0.01**2) / (0.3**2 + 0.4**2 + 0.01**2)
    assert result["ssim"].value == pytest.approx(luminance, abs=1e-6)
    assert (result["psnr"].unit, result["psnr"].n) == ("dB", 6)
    assert result["mse"].value == pytest.approx(10 ** (-result["psnr"].value / 10), rel=1e-4), (
        "all errors are equal here"
    )
    assert "made test, grey pixels, mean of p(x|z) at the center of q(z|x)" in str(result["ssim"])


def test_psnr_is_the_mean_over_images_not_that_of_the_mean_error():
    error = torch.tensor([0.1, 0.01]).reshape(2, 1, 1, 1)
    result = reconstruction(Stub(lambda x: x + error), dataset(torch.full((2, 1, 8, 8), 0.5)))
    assert result["psnr"].value == pytest.approx(30.0, abs=1e-3)


def test_exact_reconstructions_count_for_a_stated_number(digits):
    exact = reconstruction(Stub(lambda x: x), digits)
    assert exact["ssim"].value == 1.0
    assert exact["psnr"].value == 100.0
    assert "180 images at or above 100 dB counted as 100 dB" in exact["psnr"].protocol
    assert "counted" not in reconstruction(Stub(lambda x: 0.9 * x), digits)["psnr"].protocol


@pytest.mark.parametrize("shape", [(1, 28, 28), (1, 11, 14), (3, 16, 12), (1, 8, 8), (3, 9, 10)])
def test_ssim_is_that_of_scikit_image_with_the_papers_settings(shape):
    from skimage.metrics import structural_similarity

    x = torch.rand(4, *shape)
    x_hat = (x + 0.2 * torch.randn(x.shape)).clamp(0, 1)
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 1}
    if min(shape[1:]) < 11:  # scikit-image has no default for these
        options["win_size"] = {8: 7, 9: 9}[min(shape[1:])]
    expected = [
        np.mean([structural_similarity(a, b, **options) for a, b in zip(*pair, strict=True)])
        for pair in zip(x.double().numpy(), x_hat.double().numpy(), strict=True)
    ]
    result = reconstruction(Stub(lambda _: x_hat), dataset(x))
    assert result["ssim"].value == pytest.approx(np.mean(expected), abs=1e-9)
    assert result["ssim"].value < 0.95


def test_reconstructions_depend_on_neither_batch_nor_order_and_the_mode_is_restored(model, digits, monkeypatch):
    model.train()
    whole = reconstruction(model, digits, "test")
    assert model.training
    order = torch.randperm(180, generator=torch.Generator().manual_seed(0))
    test = digits.test
    shuffled = replace(digits, test=Split(test.x[order], None, test.index[order]))
    monkeypatch.setattr(quality, "BATCH", 7)
    for other in (reconstruction(model, digits, "test"), reconstruction(model, shuffled, "test")):
        for name, estimate in whole.items():
            assert other[name].value == pytest.approx(estimate.value, abs=1e-6)
            assert other[name].stderr == pytest.approx(estimate.stderr, abs=1e-6)


# --- samples --------------------------------------------------------------------------------------------------------


def test_sample_quality_is_the_mean_and_spread_of_the_single_extractors(model, digits, extractors):
    state = torch.get_rng_state()
    result = sample_quality(model, digits, extractors)
    assert torch.equal(torch.get_rng_state(), state), "torch's global generator is left alone"
    assert set(result) == {"frechet", "frechet_floor", "precision", "recall"}
    samples, real, rest = (quality._embed(extractors, x) for x in (
        quality._samples(model, 180, 0), *(quality._chosen(digits, split, 180, 0) for split in ("test", "train"))
    ))  # fmt: skip
    precision, recall = zip(*map(precision_recall, real, samples), strict=True)
    singles = {"frechet": [*map(frechet, real, samples)], "frechet_floor": [*map(frechet, real, rest)],
               "precision": precision, "recall": recall}  # fmt: skip
    assert len(set(singles["frechet"])) == 3
    for name, values in singles.items():
        assert result[name].value == pytest.approx(np.mean(values))
        assert result[name].stderr == pytest.approx(np.std(values, ddof=1))
    assert result["frechet"].unit == "Fréchet distance (64 features)"
    assert all(estimate.n == 180 for estimate in result.values())
    protocol = result["frechet"].protocol
    assert "180 means of p(x|z), z ~ p(z), against 180 images of digits test, grey pixels" in protocol
    assert "180 images of digits train against 180 images of digits test" in result["frechet_floor"].protocol
    for estimate in result.values():
        assert all(weights_hash(extractor)[:12] in estimate.protocol for extractor in extractors)
    assert sample_quality(model, digits, extractors, seed=1)["frechet"].value != result["frechet"].value
    assert sample_quality(model, digits, extractors) == result


def test_a_model_that_hands_out_real_images_reaches_the_floor_and_an_untrained_one_does_not(model, digits, extractors):
    rest = unit(digits.train.x[:180])
    scores = sample_quality(Stub(pictures=rest), digits, extractors)
    untrained = sample_quality(model, digits, extractors)
    floor = scores["frechet_floor"].value
    assert untrained["frechet_floor"].value == pytest.approx(floor)
    assert scores["frechet"].value == pytest.approx(floor, rel=0.35)
    assert untrained["frechet"].value > 5 * floor
    assert scores["precision"].value > 0.5 > untrained["precision"].value
    itself = sample_quality(Stub(pictures=unit(digits.test.x)), digits, extractors)
    assert itself["frechet"].value < 1e-6
    assert itself["precision"].value == itself["recall"].value == 1.0


def test_samples_of_one_class_are_precise_and_recall_little(digits, extractors):
    zeros = unit(digits.train.x[digits.train.y == 0])
    scores = sample_quality(Stub(pictures=zeros), digits, extractors, num=120)
    assert scores["precision"].n == 120
    assert scores["precision"].value > 0.6
    assert scores["recall"].value < 0.3


def test_sets_are_of_one_size_whatever_the_split(model, digits, extractors):
    train = sample_quality(model, digits, extractors, split="train")
    assert train["frechet"].n == train["frechet_floor"].n == 180
    assert "180 images of digits test against 180 images of digits train" in train["frechet_floor"].protocol
    assert sample_quality(model, digits, extractors, split="validation", num=50)["recall"].n == 50


@pytest.mark.parametrize("protocol", ["dynamic", "static"])
def test_binarized_images_are_compared_as_they_are_scored_and_it_is_said(protocol, extractors, monkeypatch):
    data = load("digits", protocol=protocol)
    seen = []
    original = quality._embed
    monkeypatch.setattr(quality, "_embed", lambda e, x: (seen.append(x), original(e, x))[1])
    result = sample_quality(Stub(pictures=unit(data.test.x)), data, extractors)
    assert all(set(x.unique().tolist()) <= {0.0, 1.0} for x in seen)
    assert all(f"{protocol} binarization" in estimate.protocol for estimate in result.values())


def test_latents_come_from_the_models_own_prior_whatever_its_kind():
    """Not N(0, I) by habit; and a prior that is no unit normal is drawn without touching the global generator either."""
    parts = Independent(Normal(torch.tensor([[-9.0, 4.0], [7.0, 4.0]]), 0.1), 1)
    prior = MixtureSameFamily(Categorical(torch.tensor([0.25, 0.75])), parts)
    model = Stub(restore=lambda z: z[:, :, None, None].expand(-1, -1, 8, 8), prior=prior)
    state = torch.get_rng_state()
    x = quality._samples(model, 1200, seed=0)
    assert torch.equal(torch.get_rng_state(), state)
    assert x.shape == (1200, 2, 8, 8)
    assert float((x[:, 0] > 0).float().mean()) == pytest.approx(0.75, abs=0.04)
    assert float(x[:, 1].mean()) == pytest.approx(4.0, abs=0.02)
    assert len(x[:, 0, 0, 0].unique()) > 1150, "no block repeats another"
    assert torch.equal(quality._samples(model, 1200, seed=0), x)


def test_a_comparison_that_says_nothing_is_refused(model, digits, extractors):
    with pytest.raises(UsageError, match="two extractors"):
        sample_quality(model, digits, extractors[:1])
    with pytest.raises(UsageError, match="each of another seed"):
        sample_quality(model, digits, [extractors[0], extractors[0]])
    with pytest.raises(UsageError, match="3 images of digits are too few"):
        sample_quality(model, digits, extractors, num=3)
    with pytest.raises(UsageError, match="no split 'tset'"):
        sample_quality(model, digits, extractors, split="tset")
    few = replace(digits, test=digits.test.first(3))
    for split in ("test", "train"):
        assert why_no_comparison(few, split) == "3 images are too few to compare: 4 are the least"
    assert why_no_comparison(few, "validation") is None

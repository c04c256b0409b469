"""Sprites are what their factors say, and the measures of factors know codes that are the factors from codes that are not."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from vaelab import specs
from vaelab.data import load, sprites
from vaelab.data.datasets import SPLITS, Split
from vaelab.errors import UsageError
from vaelab.evaluate import factors, latents
from vaelab.evaluate.overview import overview
from vaelab.models import VAE
from vaelab.posteriors import NormalPosterior


@pytest.fixture(scope="module")
def images():
    return sprites.images()


@pytest.fixture(scope="module")
def masks(images):
    return images.x[:, 0] > 0


@pytest.fixture(scope="module")
def values():
    return sprites.factors(np.arange(sprites.COUNT))


# --- the images -----------------------------------------------------------------------------------------------------


def test_every_combination_of_factors_is_there_once_and_no_two_images_are_alike(images, values):
    assert images.x.shape == (14_400, 1, 32, 32)
    assert images.x.dtype == np.uint8
    assert set(np.unique(images.x)) == {0, 255}
    assert images.binary
    assert len(np.unique(values, axis=0)) == math.prod(sprites.SIZES) == 14_400
    assert len(np.unique(np.packbits(images.x > 0, axis=None).reshape(14_400, -1), axis=0)) == 14_400


def test_drawing_is_deterministic(images):
    assert np.array_equal(sprites.images().x, images.x)


def test_a_position_moves_the_same_pixels_and_cuts_none_off(masks):
    """A step in x or y is a shift by 2 pixels, and every shape keeps clear of the border."""
    x = masks.reshape(*sprites.SIZES, 32, 32)
    assert np.array_equal(np.roll(x[:, :, :, 3], 2, -1), x[:, :, :, 4])
    assert np.array_equal(np.roll(x[:, :, :, :, 3], -2, -2), x[:, :, :, :, 4]), "y grows upwards, rows downwards"
    frame = np.ones((32, 32), bool)
    frame[1:-1, 1:-1] = False
    assert not (masks & frame).any()


def test_an_orientation_turns_and_a_scale_grows(masks):
    """Three orientations on is a quarter turn of the pixels; areas are those of the outlines, to a pixelation's error."""
    x = masks.reshape(*sprites.SIZES, 32, 32)
    quarter = np.rot90(x[:, :, 0, 4, 4], 1, (-2, -1))  # about the middle: the centre, left of and below it, goes right
    assert np.array_equal(quarter, np.roll(x[:, :, 3, 4, 4], 2, -1))
    area = x.sum((-2, -1)).mean((2, 3, 4))
    assert (np.diff(area, axis=1) > 0).all()
    of_outlines = {"triangle": 1.2 * 1.8 / 2, "corner": 0.5 * 1.6 + 1.2 * 0.5 - 0.5 * 0.5}  # in radii squared
    for name, exact in of_outlines.items():
        assert area[sprites.SHAPES.index(name), -1] == pytest.approx(exact * sprites.RADII[-1] ** 2, rel=0.1)


def test_factors_follow_a_row_into_any_split_and_labels_are_shapes(masks):
    data = load("sprites")
    assert [len(data.split(name)) for name in SPLITS] == [11_520, 1440, 1440]
    assert data.binary
    assert data.classes == sprites.SHAPES
    for name in SPLITS:
        batch = data.split(name).rows(slice(50))
        found = sprites.factors(batch.index.numpy())
        assert np.array_equal(found[:, 0], batch.y.numpy())
        rows = np.ravel_multi_index(tuple(found.T), sprites.SIZES)
        assert np.array_equal(batch.x[:, 0].numpy() > 0, masks[rows])
    together = np.concatenate([data.split(name).index.numpy() for name in SPLITS])
    assert np.array_equal(np.sort(together), np.arange(sprites.COUNT)), "each row is in one split"


def test_rows_that_are_not_there_have_no_factors():
    with pytest.raises(IndexError, match="0 to 14399"):
        sprites.factors(np.array([14_400]))


def test_sprites_describe_themselves():
    with pytest.raises(UsageError, match="sprites"):
        load("sprites", channels=1)


# --- the measures ---------------------------------------------------------------------------------------------------


def codes_of(loc: np.ndarray, scale: float = 0.02, seed: int = 0) -> latents.Codes:
    """Codes whose posteriors are N(loc, scale^2), as ``latents.encode`` makes them."""
    mean = torch.from_numpy(loc).double()
    qz = NormalPosterior(mean, torch.full_like(mean, math.log(scale)))
    z = mean + scale * torch.randn(mean.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    log_qz = qz.log_prob(z)
    batch = latents.Encoded(qz, z, log_qz, log_qz, None, None)
    return latents.Codes(z.numpy(), z.numpy(), log_qz.numpy(), log_qz.numpy(), None, None, (batch,))


@pytest.fixture(scope="module")
def some(values):
    """Factors of 1500 sprites."""
    return values[np.random.default_rng(0).permutation(len(values))[:1500]]


def standardised(factors_: np.ndarray) -> np.ndarray:
    return (factors_ - factors_.mean(0)) / factors_.std(0)


def test_a_code_that_is_the_factors_has_a_gap_of_one_and_full_scores(some):
    codes = codes_of(standardised(some))
    information = factors._pointwise_information(codes, some).mean(0)
    entropy = np.log(np.array(sprites.SIZES))
    np.testing.assert_allclose(np.diag(information), entropy, rtol=0.01)
    gap = factors.mutual_information_gap(codes, some, "here")
    # What is left of the gap is the share that N examples seem to know by chance of a factor that they do not know.
    assert 0.9 < gap.value <= 1
    assert gap.protocol.startswith("here, mutual information gap, 5 factors")
    scores = factors.disentanglement(codes, some, "here")
    assert all(0.97 < score.value <= 1 for score in scores.values())


def test_a_rotated_code_knows_as_much_and_has_no_gap(some):
    some = some[:, 1:]
    rotation = np.array([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]) / 2  # every factor everywhere
    straight, rotated = (codes_of(loc, 0.1) for loc in (standardised(some), standardised(some) @ rotation))
    assert factors.mutual_information_gap(straight, some, "").value > 0.8
    assert factors.mutual_information_gap(rotated, some, "").value < 0.05
    scores, before = (factors.disentanglement(c, some, "") for c in (rotated, straight))
    assert scores["disentanglement"].value < before["disentanglement"].value - 0.4
    assert scores["completeness"].value < before["completeness"].value - 0.4
    np.testing.assert_allclose(
        factors.total_correlation(rotated, "").value, factors.total_correlation(straight, "").value, atol=0.02
    )


def test_two_dimensions_that_both_have_a_factor_close_its_gap(some):
    loc = standardised(some)
    twice = codes_of(np.concatenate([loc, loc], 1))
    assert factors.mutual_information_gap(twice, some, "").value == pytest.approx(0, abs=0.02)
    scores = factors.disentanglement(twice, some, "")
    assert scores["disentanglement"].value > 0.95, "each dimension is still of one factor"
    two_of_ten = 1 - math.log(2) / math.log(10)
    assert scores["completeness"].value == pytest.approx(two_of_ten, abs=0.02), "the two share the importance"


def test_dimensions_weigh_by_their_importance(some):
    """As many dimensions that tell next to nothing of any factor are no entanglement."""
    noise = np.random.default_rng(3).normal(size=(len(some), 5))
    scores = factors.disentanglement(codes_of(np.concatenate([standardised(some), noise], 1)), some, "")
    assert scores["disentanglement"].value > 0.93
    assert scores["completeness"].value > 0.93


def test_purity_is_one_for_one_and_zero_for_all():
    found = factors._purity(np.array([[3.0, 0, 0, 0], [2, 2, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]]))
    np.testing.assert_allclose(found, [1, 0.5, 0, 0], atol=1e-12)
    np.testing.assert_allclose(factors._purity(np.array([[1.0, 1], [0, 5], [0, 2]])), [0, 1, 1], atol=1e-12)


def test_codes_that_know_nothing_have_no_information(some):
    """Posteriors that are all the same have exactly none, and a gap of exactly 0."""
    collapsed = codes_of(np.zeros((len(some), 4)), scale=1.0)
    np.testing.assert_allclose(factors._pointwise_information(collapsed, some).mean(0), 0, atol=1e-9)
    assert factors.mutual_information_gap(collapsed, some, "").value == pytest.approx(0, abs=1e-9)
    assert factors.disentanglement(collapsed, some, "")["informativeness"].value < 0.25


def test_information_is_that_of_a_mixture_integrated_by_hand():
    """One binary factor, z ~ N(v, 0.5^2): the mean over draws agrees with a numerical integral, within its error."""
    v = np.random.default_rng(1).integers(0, 2, 2000)
    codes = codes_of(v[:, None].astype(float), scale=0.5)
    grid = np.linspace(-5, 6, 20_001)
    p = np.stack([np.exp(-((grid - mean) ** 2) / 0.5) / math.sqrt(0.5 * math.pi) for mean in (0, 1)])
    share = np.array([(v == 0).mean(), (v == 1).mean()])
    mixed = share @ p
    exact = float((share[:, None] * p * np.log(p / mixed)).sum() * (grid[1] - grid[0]))
    pointwise = factors._pointwise_information(codes, v[:, None])[:, 0, 0]
    assert abs(pointwise.mean() - exact) < 3 * pointwise.std() / math.sqrt(len(v))


def test_total_correlation_is_that_of_the_normal_with_a_known_covariance():
    rng = np.random.default_rng(0)
    root = np.linalg.cholesky(np.array([[1.0, 0.6, 0.0], [0.6, 2.0, -0.5], [0.0, -0.5, 1.0]]))
    covariance = root @ root.T
    exact = 0.5 * (np.log(np.diag(covariance)).sum() - np.linalg.slogdet(covariance)[1])
    codes = codes_of(rng.normal(size=(4000, 3)) @ root.T, scale=1e-4)
    found = factors.total_correlation(codes, "here")
    assert abs(found.value - exact) < 3 * found.stderr
    assert 0 < found.stderr < 0.05
    stretched = factors.total_correlation(codes_of(codes.loc * [1, 50, 0.1], 1e-6), "")
    assert stretched.value == pytest.approx(found.value, abs=1e-3), "no scale of a dimension matters"


def test_a_dimension_that_is_a_sum_of_others_has_no_total_correlation():
    """Also in fp32, whose rounding makes of the determinant a small number of any sign."""
    for seed in range(6):
        z = np.random.default_rng(seed).normal(size=(1000, 2)).astype(np.float32)
        codes = dataclasses.replace(codes_of(np.zeros((1000, 3))), z=np.column_stack([z, z.sum(1)]).astype(float))
        with pytest.raises(UsageError, match="has no inverse"):
            factors.total_correlation(codes, "")


def test_too_few_codes_are_refused_and_not_scored_as_nan(values):
    rng = np.random.default_rng(0)
    with pytest.raises(UsageError, match="12 codes of 10 dimensions are too few"):
        factors.total_correlation(codes_of(rng.normal(size=(12, 10))), "")
    few = values[rng.permutation(len(values))[:90]] % 2  # two values of each factor, so that no half lacks one
    with pytest.raises(UsageError, match="9 codes to fit on are too few"):
        factors.disentanglement(codes_of(rng.normal(size=(90, 5))), few, "")


def test_the_standard_errors_are_those_of_repetition():
    """The spread of the estimates over fresh codes is what one estimate says of itself, within a factor."""
    rng = np.random.default_rng(5)
    mixing = np.array([[1.0, 0.7], [0.0, 0.7]])
    found = [factors.total_correlation(codes_of(rng.normal(size=(300, 2)) @ mixing, 1e-3), "") for _ in range(40)]
    ratio = np.std([f.value for f in found], ddof=1) / np.mean([f.stderr for f in found])
    assert 0.7 < ratio < 1.4  # a standard deviation of 40 has an error of 11 %


# --- of a model -----------------------------------------------------------------------------------------------------


def model_of(posterior, prior) -> VAE:
    torch.manual_seed(0)
    return VAE(specs.MLPEncoder((8,)), posterior, prior, specs.MLPDecoder((8,)), specs.Bernoulli(), (1, 32, 32)).eval()


@pytest.fixture(scope="module")
def few():
    data = load("sprites")
    return dataclasses.replace(data, train=data.train.first(900), **{s: data.split(s).first(60) for s in SPLITS[1:]})


def test_codes_of_all_splits_are_scored_against_the_factors_of_their_own_images(few):
    model = model_of(specs.DiagonalNormal(3), specs.StandardNormal())
    with torch.no_grad():
        model.posterior_head.loc_and_log_scale.bias[3:] -= (
            4  # codes that are sure of where they lie, and so know something
        )
    found = overview(model, few, "test", 100)
    names = {"total_correlation", "mutual_information_gap", "disentanglement", "completeness", "informativeness"}
    assert names <= found["metrics"].keys()
    assert {found["metrics"][name].n for name in names} == {1020}
    assert "sprites, all 1,020 images" in found["metrics"]["disentanglement"].protocol
    # The same images in their own order and in the splits': a score that mixed up rows would see nothing of them.
    index = np.sort(np.concatenate([few.split(s).index.numpy() for s in SPLITS]))
    x = torch.from_numpy(sprites.images().x[index])
    ordered = Split(x, None, torch.from_numpy(index))
    codes = latents.encode(model, dataclasses.replace(few, test=ordered), "test")
    gap = factors.mutual_information_gap(codes, sprites.factors(index), "")
    assert found["metrics"]["mutual_information_gap"].value == pytest.approx(gap.value, rel=1e-6)
    mixed_up = np.random.default_rng(0).permutation(sprites.factors(index))
    known, by_chance = (
        factors._pointwise_information(codes, rows).mean(0).max() for rows in (sprites.factors(index), mixed_up)
    )
    assert known > 3 * by_chance


def test_scores_that_a_model_cannot_have_are_said_to_be_left_out(few, digits):
    sphere = model_of(specs.VonMisesFisher(3), specs.UniformSphere())
    scores, left_out = factors.known_factors(sphere, few, images=500)
    assert scores.keys() == {"total_correlation", "disentanglement", "completeness", "informativeness"}
    assert len(left_out) == 1
    assert left_out[0].startswith("No mutual information gap: ")
    with pytest.raises(UsageError, match="what made the images of digits"):
        factors.known_factors(sphere, digits)


def test_what_cannot_be_scored_is_refused(some):
    codes = codes_of(standardised(some))
    with pytest.raises(UsageError, match="the same for all examples"):
        factors.mutual_information_gap(codes, np.zeros_like(some), "")
    with pytest.raises(UsageError, match="a row for each code"):
        factors.disentanglement(codes, some[:10], "")
    with pytest.raises(UsageError, match="has no inverse"):
        factors.total_correlation(codes_of(np.ones((50, 2)) * np.arange(50)[:, None], 1e-300), "")
    with pytest.raises(UsageError, match="this model has one"):
        factors.mutual_information_gap(codes_of(standardised(some)[:, :1]), some, "")
    unknown = codes.batches[0]._replace(qz=torch.distributions.Laplace(0, 1))
    with pytest.raises(TypeError, match="Laplace has no density of each dimension"):
        factors.mutual_information_gap(dataclasses.replace(codes, batches=(unknown,)), some, "")

"""A recipe as scikit-learn has estimators: cloned, searched, pickled, in pipelines; its numbers are vaelab's own."""

import pickle

import numpy as np
import pytest
import torch
from scipy.sparse import csr_matrix
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline

import vaelab as v
from vaelab.evaluate import nll
from vaelab.recipes import recipe

DIGITS = load_digits()
IMAGES = DIGITS.images[:300] / 16


@pytest.fixture(scope="module")
def fitted():
    return v.Estimator("mlp", latent_dim=3, epochs=2, seed=1).fit(IMAGES)


def test_is_what_vaelab_trains_and_measures(fitted):
    assert isinstance(fitted.model_, v.VAE)
    assert (fitted.run_.training.seed, fitted.run_.posterior.latent_dim, fitted.n_features_in_) == (1, 3, 64)
    data = v.load(IMAGES.astype(np.float32))
    x = torch.from_numpy(IMAGES.astype(np.float32))[:, None]
    codes = fitted.transform(IMAGES)
    np.testing.assert_array_equal(codes, fitted.model_.center(x).detach())
    with torch.no_grad():
        decoded = fitted.model_.likelihood(torch.from_numpy(codes)).mean
    np.testing.assert_array_equal(fitted.inverse_transform(codes), decoded[:, 0])
    of_test = fitted.score(IMAGES[data.test.index])
    assert of_test == pytest.approx(-float(nll(fitted.model_, data, num_samples=100)["nll_100"].value), rel=1e-6)
    assert of_test == fitted.score_samples(IMAGES[data.test.index]).mean()


def test_learns_from_nine_images_in_ten_and_chooses_weights_by_the_tenth(monkeypatch):
    from vaelab import estimator

    given = []
    monkeypatch.setattr(estimator, "fit", lambda run, data: (given.append(data), v.fit(run, data))[1])
    v.Estimator("mlp", epochs=1).fit(np.broadcast_to(np.arange(41)[:, None, None] / 41, (41, 8, 8)))
    train, held = (
        {round(41 * float(x)) for x in split.x[:, 0, 0, 0]} for split in (given[0].train, given[0].validation)
    )
    assert (len(train), len(held)) == (36, 5)
    assert train | held == set(range(41))
    assert held != set(range(5))  # images may be sorted


def test_samples_are_those_of_a_seed(fitted):
    first, again, other = fitted.sample(5, 1), fitted.sample(5, 1), fitted.sample(5, 2)
    assert first.shape == (5, 8, 8)
    assert (first == again).all()
    assert (first != other).any()


@pytest.mark.parametrize("shape", [(64,), (8, 8), (1, 8, 8), (8, 8, 1)])
def test_images_come_back_in_the_layout_they_had(shape):
    x = IMAGES[:20].reshape(20, *shape)
    vae = v.Estimator("mlp", epochs=1).fit(x)
    assert vae.inverse_transform(vae.transform(x)).shape == vae.sample(20).shape == x.shape


def test_rows_of_pixels_may_be_of_images_that_are_no_squares():
    x = np.concatenate([IMAGES, IMAGES], axis=2)[:20].reshape(20, 128)
    vae = v.Estimator("mlp", epochs=1, image_size=(8, 16)).fit(x)
    assert vae.model_.shape == (1, 8, 16)
    assert vae.sample(3).shape == (3, 128)
    with pytest.raises(ValueError, match="128 numbers an image, which is not 1x11x11"):
        v.Estimator("mlp").fit(x)


def test_colour_with_channels_last_is_put_back():
    x = np.zeros((40, 12, 12, 3), np.uint8)
    x[..., 0] = 255  # red
    x[::2, 0, 0, 1] = 9  # not all pixels are 0 or 255
    vae = v.Estimator("mlp", epochs=30, likelihood="gaussian", lr=0.01).fit(x)
    back = vae.inverse_transform(vae.transform(x))
    assert back.shape == x.shape
    assert back[..., 0].min() > 0.8
    assert back[..., 2].max() < 0.2


@pytest.mark.parametrize("protocol", ["threshold", "static", "dynamic"])
def test_pixels_are_put_under_the_protocol(protocol):
    vae = v.Estimator("mlp", epochs=1, protocol=protocol).fit(IMAGES)
    binary = v.Estimator("mlp", epochs=1).fit((IMAGES > 0.5).astype(int))
    if protocol == "threshold":
        np.testing.assert_array_equal(vae.transform(IMAGES), binary.transform((IMAGES > 0.5).astype(int)))
    assert (vae.transform(IMAGES) == vae.transform(IMAGES)).all()
    assert (vae.transform(IMAGES) != v.Estimator("mlp", epochs=1).fit(IMAGES).transform(IMAGES)).any()


def test_what_pixels_mean_is_that_of_the_images_of_fit():
    x = np.random.default_rng(0).integers(0, 256, (30, 8, 8))
    x[:29] //= 255  # of one image alone it could be thought that 1 is white
    vae = v.Estimator("mlp", epochs=1).fit(x)
    assert (vae.run_.data.value_range, vae.run_.data.protocol) == ("byte", "grey")
    np.testing.assert_allclose(vae.transform(x)[:3], vae.transform(x[:3]), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(vae.score_samples(x)[0], vae.score_samples(x[:1])[0], rtol=1e-5)
    learned = v.Estimator("mlp", epochs=1, likelihood="gaussian").fit(x)  # though most that it sees is black or white
    assert np.isfinite(learned.score(x[:1]))


def test_floats_up_to_one_are_no_bytes():
    whole = (IMAGES * 255).astype(np.uint8)
    vae = v.Estimator("mlp", epochs=1).fit(whole)
    np.testing.assert_array_equal(vae.transform(whole[:3].astype(np.float64)), vae.transform(whole[:3]))
    with pytest.raises(v.UsageError, match="X holds floats up to 1, and fit's images were integers"):
        vae.transform(IMAGES[:3])


def test_of_few_wide_images_the_first_axis_is_their_number_too():
    wide = np.random.default_rng(0).random((30, 8, 40))
    vae = v.Estimator("mlp", epochs=1).fit(wide)
    np.testing.assert_allclose(vae.transform(wide[:8]), vae.transform(wide)[:8], rtol=1e-5, atol=1e-6)


def test_what_values_mean_goes_by_both_of_its_names():
    bytes_in_floats = np.round(IMAGES[:20] * 255)
    with pytest.raises(v.UsageError, match=r"value_range in Python"):
        v.Estimator("mlp", epochs=1).fit(bytes_in_floats)
    assert v.Estimator("mlp", epochs=1, value_range="byte").fit(bytes_in_floats).run_.data.value_range == "byte"


def test_takes_the_protocol_of_its_recipe_and_settings_of_its_objective():
    vae = v.Estimator(
        "burda-vae", epochs=1, objective="iwae", num_samples=7, encoder_hidden_dims=(8,), decoder_hidden_dims=(8,)
    ).fit(IMAGES)
    assert (vae.run_.data.protocol, vae.run_.objective.num_samples) == ("dynamic", 7)


@pytest.mark.usefixtures("nothing_registered")
def test_a_recipe_of_ones_own_goes_to_other_processes_as_its_run():
    @v.register("recipe")
    def lab():
        """An MLP VAE."""
        return v.override(recipe("mlp-2d"), epochs=1)

    sent = pickle.loads(pickle.dumps(v.Estimator("lab", beta=2.0)))
    assert sent.recipe == recipe("lab")
    assert sent.settings == {"beta": 2.0}


def test_is_cloned_searched_and_printed():
    vae = v.Estimator("mlp", epochs=1, bound_samples=10)
    assert clone(vae).get_params() == vae.get_params()
    assert str(vae) == "Estimator(bound_samples=10, epochs=1)"
    assert vae.set_params(beta=2.0, bound_samples=5).get_params()["beta"] == 2
    assert clone(vae).settings == {"epochs": 1, "beta": 2.0}
    assert vae.bound_samples == 5
    found = GridSearchCV(vae, {"latent_dim": [1, 3], "lr": [1e-3, 1e-2]}, cv=2).fit(IMAGES)
    assert found.best_estimator_.transform(IMAGES).shape == (300, found.best_params_["latent_dim"])
    assert found.best_score_ == found.cv_results_["mean_test_score"].max()


def test_is_a_step_of_a_pipeline():
    x, y = DIGITS.data / 16, DIGITS.target
    pipe = make_pipeline(v.Estimator("mlp", epochs=15), LogisticRegression(max_iter=1000)).fit(x[:1200], y[:1200])
    assert pipe.score(x[1200:], y[1200:]) > 0.75  # of 10 classes


def test_is_pickled(fitted):
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(fitted)).transform(IMAGES), fitted.transform(IMAGES))


def test_names_its_features(fitted):
    assert list(fitted.get_feature_names_out()) == ["estimator0", "estimator1", "estimator2"]


def test_takes_a_run_of_ones_own():
    vae = v.Estimator(v.override(recipe("mlp-2d"), beta=3.0), epochs=1).fit(IMAGES)
    assert (vae.run_.recipe, vae.run_.objective.beta, vae.run_.training.epochs) == ("mlp-2d", 3.0, 1)


def test_may_be_fitted_anew_to_other_images(fitted):
    vae = clone(fitted).fit(IMAGES)
    assert vae.fit(np.pad(IMAGES, ((0, 0), (1, 1), (1, 1)))).transform(np.zeros((2, 10, 10))).shape == (2, 3)


@pytest.mark.parametrize(
    ("do", "kind", "message"),
    [
        (lambda fitted: v.Estimator("mlp").transform(IMAGES), NotFittedError, "not fitted yet"),
        (lambda fitted: v.Estimator("mpl-2d").fit(IMAGES), ValueError, "did you mean 'mlp-2d'"),
        (lambda fitted: v.Estimator("mlp", latent_dims=3).fit(IMAGES), ValueError, "did you mean 'latent_dim'"),
        (lambda fitted: v.Estimator("mlp", z_dim=3, latent_dim=3).fit(IMAGES), ValueError, "'latent_dim' is another name of a setting that is given too"),
        (lambda fitted: v.Estimator("mlp", protocol="bin").fit(IMAGES), ValueError, "bin"),
        (lambda fitted: v.Estimator("mlp", data="digits").fit(IMAGES), ValueError, "'data' is no setting here: X is the data"),
        (lambda fitted: v.Estimator("mlp", test_size=9).fit(IMAGES), ValueError, "'test_size' is no setting here"),
        (lambda fitted: v.Estimator(v.recipes.mlp).fit(IMAGES), ValueError, "recipe is function: give a recipe's name, or a run"),
        (lambda fitted: v.Estimator("mlp").set_params(vae__beta=1), ValueError, "'vae__beta' is no setting"),
        (lambda fitted: v.Estimator("mlp").fit(IMAGES[:1]), ValueError, "1 of 1 images are held out"),
        (lambda fitted: v.Estimator("mlp", validation_size=0.0).fit(IMAGES), ValueError, "must be greater than 0"),
        (lambda fitted: v.Estimator("mlp").fit(np.full((9, 8, 8), np.nan)), ValueError, "NaN"),
        (lambda fitted: v.Estimator("mlp").fit([]), ValueError, "minimum of 1 is required"),
        (lambda fitted: v.Estimator("mlp").fit(csr_matrix(np.eye(64))), TypeError, "[Ss]parse"),
        (lambda fitted: fitted.inverse_transform(np.zeros((2, 4))), ValueError, "X holds codes of 4 numbers, the model's have 3"),
        (lambda fitted: v.Estimator("mlp", epochs=1).fit(IMAGES > 0.5).transform(IMAGES), ValueError, "trained on binary ones"),
        (lambda fitted: v.Estimator("mlp").fit(IMAGES * 16), ValueError, r"X holds values from 0 to 16, outside 0\.\.1"),
        (lambda fitted: fitted.transform(np.zeros((2, 9, 9))), ValueError, r"X holds images of \(1, 9, 9\) .* trained on \(1, 8, 8\)"),
        (lambda fitted: v.Estimator("ae-2d", epochs=1).fit(IMAGES).score(IMAGES), TypeError, "densit"),
    ],
)  # fmt: skip
def test_what_cannot_be_meant_is_refused(do, kind, message, fitted):
    with pytest.raises(kind, match=message):
        do(fitted)

"""Figures show what they say: right pixels in the right place, upright, labelled; animations loop."""

import contextlib
import io
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from vaelab import figures
from vaelab.config import override
from vaelab.drawing import media, pictures
from vaelab.errors import UsageError
from vaelab.figures import decoding
from vaelab.recipes import recipe
from vaelab.train import fit


@pytest.fixture(scope="module")
def model(digits):
    return fit(override(recipe("mlp-2d"), epochs=2, encoder_hidden_dims=(32,), decoder_hidden_dims=(32,)), digits)


@pytest.fixture(scope="module")
def wide(digits):
    return fit(override(recipe("mlp"), epochs=15, batch_size=32), digits)


def test_tiles_keep_pixels_upright_and_in_order():
    images = torch.zeros(3, 1, 4, 5)
    images[0, 0, 0, 0] = 1  # top left of the first
    images[2, 0, 3, 4] = 1  # bottom right of the third
    canvas = figures.tile(images, columns=2, gap=1)
    assert canvas.shape == (9, 11, 1)
    assert canvas[0, 0, 0] == 1
    assert canvas[8, 4, 0] == 1
    assert canvas[4].max() == 0.5, "the gap is grey"
    assert (canvas[5:, 6:] == 0.5).all(), "an empty place is grey"


def shown(figure):
    return np.asarray(figure.axes[0].images[0].get_array())


def test_reconstructions_stand_below_their_images(wide, digits):
    x = digits.test.rows(slice(0, 7)).x
    canvas = shown(figures.reconstructions(wide, x, columns=7))
    top, bottom = canvas[:28, :28], canvas[30:58, :28]
    np.testing.assert_allclose(top, x[0, 0].numpy(), atol=1e-6)
    with torch.no_grad():
        expected = wide.likelihood(wide.posterior(x).mean).mean[0, 0].numpy()
    np.testing.assert_allclose(bottom, expected, atol=1e-5)
    assert np.corrcoef(top.ravel(), bottom.ravel())[0, 1] > 0.6, "the reconstruction is of this image"


def test_an_unfinished_row_of_reconstructions_stands_below_its_images(wide, digits):
    x = digits.test.rows(slice(0, 4)).x
    whole, ragged = figures.reconstructions(wide, x), figures.reconstructions(wide, x, columns=3)
    assert shown(whole).shape == (2 * 30 - 2, 4 * 30 - 2), "no wider than there are images"
    np.testing.assert_array_equal(shown(whole), shown(figures.reconstructions(wide, x, columns=4)))
    np.testing.assert_array_equal(shown(ragged)[60:, :28], shown(whole)[:, 90:])
    assert (shown(ragged)[60:, 30:] == 0.5).all()
    assert whole.axes[0].get_yticks().tolist() == [14, 44], "the middles of the rows"


def test_the_manifold_is_a_grid_of_equal_prior_probability(model):
    figure = figures.manifold(model, side=5)
    canvas = shown(figure)
    assert canvas.shape == (5 * 28, 5 * 28)
    centre, corner = torch.zeros(1, 2), torch.special.ndtri(torch.tensor([[0.9, 0.9]]))
    np.testing.assert_allclose(canvas[56:84, 56:84], figures.decode(model, centre)[0, 0].numpy(), atol=1e-5)
    np.testing.assert_allclose(canvas[:28, 112:], figures.decode(model, corner)[0, 0].numpy(), atol=1e-5)
    assert figure.axes[0].get_xlabel() == "$z_1$"


def test_a_manifold_of_more_dimensions_is_refused(wide):
    with pytest.raises(UsageError, match="needs 2 latent dimensions: this model has 20"):
        figures.manifold(wide)


def test_codes_of_one_dimension_lie_in_a_row_for_each_class():
    codes = np.arange(12, dtype=np.float32)[:, None]
    labels = np.repeat([4, 7, 9], 4)
    axes = figures.latent_map(codes, labels).axes[0]
    drawn = [np.asarray(points.get_offsets()) for points in axes.collections]
    np.testing.assert_array_equal(np.concatenate([points[:, 0] for points in drawn]), codes[:, 0])
    for row, points in enumerate(drawn):
        assert (np.abs(points[:, 1] - row) < 0.5).all()
    heights = [float(text.get_position()[1]) for text in axes.texts]
    assert [text.get_text() for text in axes.texts] == ["4", "7", "9"]
    assert (np.diff(heights) > 0.3).all(), "names lie over each other"
    assert len(axes.get_yticks()) == 0
    [alone] = figures.latent_map(codes).axes[0].collections
    assert (np.abs(np.asarray(alone.get_offsets())[:, 1]) < 0.5).all()


def test_latent_maps_use_pca_beyond_two_dimensions():
    rng = np.random.default_rng(0)
    codes = rng.normal(size=(500, 6)).astype(np.float32)
    codes[:, 3] *= 10
    figure = figures.latent_map(codes, rng.integers(0, 3, 500), ["a", "b", "c"])
    axes = figure.axes[0]
    assert "principal component 1 (9" in axes.get_xlabel()
    points = np.concatenate([c.get_offsets() for c in axes.collections])
    assert abs(points[:, 0].std() - codes[:, 3].std()) < 0.5
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["a", "b", "c"]
    plain = figures.latent_map(codes[:, :2])
    assert np.allclose(plain.axes[0].collections[0].get_offsets(), codes[:, :2])
    assert plain.axes[0].get_xlabel() == "$z_1$"


def test_samples_depend_on_their_seed_alone(model):
    torch.manual_seed(1)
    a = figures.sample_prior(model, 4, seed=0)
    torch.manual_seed(2)
    assert torch.equal(a, figures.sample_prior(model, 4, seed=0))
    assert not torch.equal(a, figures.sample_prior(model, 4, seed=1))
    assert shown(figures.samples(model, 9)).shape == (3 * 30 - 2, 3 * 30 - 2)


def test_what_a_model_on_a_gpu_decodes_comes_to_the_cpu():
    """The images of this model can do nothing else: a real device is not to be had everywhere."""
    images = torch.rand(600, 1, 4, 4)
    there = SimpleNamespace(
        device=torch.device("cpu"),
        likelihood=lambda z: SimpleNamespace(mean=SimpleNamespace(cpu=lambda: images[z[:, 0].long()])),
    )
    assert torch.equal(figures.decode(there, torch.arange(600.0)[:, None]), images)


def test_samples_are_seeded_on_the_device_that_draws_them(monkeypatch):
    asked = []
    monkeypatch.setattr(decoding, "seeded", lambda *given: asked.append(given) or contextlib.nullcontext())
    there = torch.device("meta")
    model = SimpleNamespace(device=there, prior=lambda: torch.distributions.Normal(0, 1))
    figures.sample_prior(model, 4, seed=3)
    assert asked == [(3, there)]


def test_a_walk_passes_through_its_codes_smoothly_and_ends_where_it_began(wide, digits):
    codes = torch.from_numpy(figures.encode(wide, digits.test.rows(slice(0, 3)).x))
    frames = figures.walk(wide, codes, frames=12, hold=4)
    assert len(frames) == 3 * (12 + 4)
    for i in range(3):
        torch.testing.assert_close(frames[i * 16], figures.decode(wide, codes[i : i + 1])[0])
    jumps = (frames - frames.roll(-1, 0)).abs().amax((1, 2, 3))
    assert jumps.max() < 0.5, "no step is a jump, the one from the last frame to the first included"


def test_history_panels_show_both_curves_with_axes():
    history = [
        {"epoch": e, "loss": 100 / e, "distortion": 80 / e, "rate": 20.0, "validation_loss": 101 / e,
         "validation_distortion": 81 / e, "validation_rate": 20.5, "learning_rate": 1e-3, "beta": 0.1 * e}
        for e in range(1, 6)
    ]  # fmt: skip
    figure = figures.training_history(history)
    titles = [axes.get_title() for axes in figure.axes[:4]]
    assert titles == ["Total loss", "Reconstruction", "KL divergence", "Learning rate and weight on the KL"]
    total = figure.axes[0].get_lines()
    assert list(total[0].get_ydata()) == [100 / e for e in range(1, 6)]
    assert list(total[1].get_ydata()) == [101 / e for e in range(1, 6)]
    assert all(axes.get_xlabel() == "epoch" for axes in figure.axes[:4])
    assert figures.loss_curve(history[:1]).axes[0].get_ylabel() == "nats per image"
    for draw in (figures.loss_curve, figures.training_history):
        lines = [line for axes in draw(history[:1]).axes for line in axes.get_lines()]
        assert {line.get_marker() for line in lines} == {"o"}, "one epoch is a dot in every panel"


class TestAnimation:
    def frames(self, content):
        pictures_ = []
        with Image.open(io.BytesIO(content)) as gif:
            assert gif.info["loop"] == 0, "it loops forever"
            for i in range(gif.n_frames):
                gif.seek(i)
                pictures_.append(np.asarray(gif.convert("L")))
        return pictures_

    def test_it_goes_through_the_classes_asked_for(self, wide, digits):
        frames = self.frames(media.gif(pictures.digits(wide, digits, "19", frames=6, hold=2)))
        assert frames[0].shape == (140, 140)
        assert len(frames) >= 12
        codes = figures.encode(wide, digits.validation.rows(slice(None)).x)
        ones = codes[digits.validation.y.numpy() == 1]
        typical = ones[((ones - ones.mean(0)) ** 2).sum(1).argmin()]
        expected = figures.decode(wide, torch.from_numpy(typical[None]))[0, 0].numpy()
        small = np.asarray(Image.fromarray(frames[0]).resize((28, 28), Image.Resampling.BOX)) / 255
        assert np.abs(small - expected).mean() < 0.05

    def test_a_digit_that_comes_again_is_another_image(self, wide, digits):
        frames = self.frames(media.gif(pictures.digits(wide, digits, "11", frames=3, hold=1)))
        assert any(np.abs(frames[0].astype(int) - frame).max() > 10 for frame in frames[1:])

    @pytest.mark.parametrize(("names", "message"), [("1x", "no class 'x'"), ("3", "too short"), ("", "too short")])
    def test_what_it_cannot_pass_through(self, wide, digits, names, message):
        with pytest.raises(UsageError, match=message):
            pictures.digits(wide, digits, names)

    def test_images_without_classes(self, wide, tmp_path):
        import vaelab

        np.save(tmp_path / "a.npy", np.random.default_rng(0).random((40, 28, 28)))
        with pytest.raises(UsageError, match="has no classes"):
            pictures.digits(wide, vaelab.load(str(tmp_path / "a.npy")), "19")


def test_points_of_few_images_are_large_enough_to_see():
    sizes = []
    for count in (60, 1000, 5000):
        [points] = figures.latent_map(np.zeros((count, 2), np.float32)).axes[0].collections
        sizes += points.get_sizes().tolist()
    assert sizes == [40, 20, 4]


def test_long_names_of_classes_are_cut_and_many_have_no_legend():
    codes, long = np.zeros((6, 2), np.float32), "a very long name of a class"
    axes = figures.latent_map(codes, np.array([0, 0, 0, 1, 1, 1]), [long, "tea"]).axes[0]
    assert [text.get_text() for text in axes.texts] == ["a very long nam…", "tea"]
    assert [text.get_text() for text in axes.get_legend().texts] == ["a very long name of a c…", "tea"]
    assert figures.latent_map(np.zeros((30, 2), np.float32), np.arange(30)).axes[0].get_legend() is None


def test_letters_that_no_font_has_are_one_line(recwarn, caplog):
    caplog.set_level("INFO", "vaelab")
    content = media.png(
        figures.latent_map(np.zeros((2, 2), np.float32), np.array([0, 1]), ["\U00012000", "\U00012001"])
    )
    assert content.startswith(b"\x89PNG")
    assert [record.message[:30] for record in caplog.records] == ["no font here has all letters o"]
    assert not recwarn.list


def test_other_warnings_of_a_figure_are_passed_on(monkeypatch):
    figure = figures.latent_map(np.zeros((2, 2), np.float32))
    monkeypatch.setattr(figure, "savefig", lambda *args, **options: warnings.warn("strange", stacklevel=1))
    with pytest.warns(UserWarning, match="strange"):
        media.png(figure)


HISTORY = [
    {"epoch": epoch, "loss": 90.0, "validation_loss": 91.0, "rate": 10.0, "validation_rate": 10.0 + epoch,
     "distortion": 80.0, "validation_distortion": 82.0 - epoch, "learning_rate": 1e-3, "beta": 1.0}
    for epoch in (1, 2, 3)
]  # fmt: skip


def test_epochs_are_whole_numbers():
    figure = figures.loss_curve(HISTORY[:1])
    figure.canvas.draw()
    assert all(text.get_text().isdecimal() for text in figure.axes[0].get_xticklabels())


def test_the_ends_of_a_way_through_rate_and_distortion_are_named_where_they_are():
    axes = figures.rate_distortion({"": HISTORY}).axes[0]
    ends = {text.get_text(): text.xy for text in axes.texts if "epoch" in text.get_text()}
    assert ends == {"epoch 1": (11.0, 81.0), "epoch 3": (13.0, 79.0)}
    assert axes.get_legend() is None
    named = figures.rate_distortion({"one": HISTORY, "two": HISTORY}).axes[0].get_legend()
    assert [text.get_text() for text in named.texts] == ["one", "two"]

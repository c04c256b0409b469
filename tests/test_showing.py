"""What shows a latent space: codes on the way between others, maps, closest images, themes, films, the commands."""

import io
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import vaelab
from vaelab import figures, report
from vaelab.cli import main, showing
from vaelab.data import load
from vaelab.drawing import media, pictures
from vaelab.drawing.scene import closest, first_of_each_class, scene_of, sums, weighed
from vaelab.errors import UsageError
from vaelab.evaluate.neighbours import nearest_images
from vaelab.objectives import elbo_terms
from vaelab.runtime import RowNoise


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "mlp"
    assert main(["train", "mlp", "--data", "digits", "--epochs", "6", "--batch-size", "32", "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def scene(run):
    return scene_of(run)


def shown(figure):
    return np.asarray(figure.axes[0].images[0].get_array())


def cell(figure, row, column, height=28, width=28, gap=2):
    top, left = row * (height + gap), column * (width + gap)
    return shown(figure)[top : top + height, left : left + width]


# --- ways through latent space --------------------------------------------------------------------------------------


def test_a_straight_way_is_a_weighted_mean():
    a, b = torch.randn(3, 5), torch.randn(3, 5)
    codes = figures.between(a, b, torch.tensor([0.0, 0.25, 1.0]))
    torch.testing.assert_close(codes[:, 1], 0.75 * a + 0.25 * b)
    torch.testing.assert_close(codes[:, [0, 2]], torch.stack([a, b], 1))


def test_a_great_circle_keeps_length_and_pace():
    a, b = torch.randn(4, 20, dtype=torch.float64), torch.randn(4, 20, dtype=torch.float64)
    b = b / b.norm(dim=1, keepdim=True) * a.norm(dim=1, keepdim=True)
    codes = figures.between(a, b, torch.linspace(0, 1, 9), "spherical")
    torch.testing.assert_close(codes.norm(dim=2), a.norm(dim=1)[:, None].expand(-1, 9))
    turns = torch.nn.functional.cosine_similarity(codes[:, 1:], codes[:, :-1], dim=2)
    torch.testing.assert_close(turns, turns[:, :1].expand(-1, 8), msg="equal angles")
    torch.testing.assert_close(codes[:, [0, 8]], torch.stack([a, b], 1))


@pytest.mark.parametrize("factor", [1.0, 2.5, -1.0, 0.0])
def test_a_great_circle_between_codes_of_one_direction_is_a_line(factor):
    a = torch.randn(6)
    codes = figures.between(a, factor * a, torch.linspace(0, 1, 5), "spherical")
    assert codes.isfinite().all()
    torch.testing.assert_close(codes[[0, 4]], torch.stack([a, factor * a]))


def test_a_traversal_changes_one_dimension_alone(scene):
    code, values = scene.typical(1)[0], torch.tensor([-2.0, 0.0, 2.0])
    codes = figures.traverse(code, [3, 0], values)
    assert codes.shape == (2, 3, 20)
    changed = (codes != code).any(1)
    assert changed[0].nonzero().flatten().tolist() == [3]
    assert changed[1].nonzero().flatten().tolist() == [0]
    torch.testing.assert_close(codes[1, :, 0], values)
    torch.testing.assert_close(code, scene.typical(1)[0], msg="the code itself is left alone")


def test_traversals_are_ordered_by_rate_and_say_it(scene):
    rate = scene.rate
    assert scene.order == sorted(range(20), key=lambda d: -rate[d])
    figure = figures.traversals(scene.model, scene.typical(1)[0], scene.order[:4], rate, steps=5, span=2.0)
    labels = [text.get_text() for text in figure.axes[0].get_yticklabels()]
    assert labels == [f"$z_{{{d + 1}}}$  {rate[d]:.2f} nats" for d in scene.order[:4]]
    code = scene.typical(1)[0].clone()
    code[scene.order[2]] = 2.0
    np.testing.assert_allclose(cell(figure, 2, 4), figures.decode(scene.model, code[None])[0, 0], atol=1e-5)
    assert [text.get_text() for text in figure.axes[0].get_xticklabels()] == ["-2.0", "0", "+2.0"]


def test_an_interpolation_begins_and_ends_at_its_codes(scene):
    codes = scene.typical(4)
    figure = figures.interpolation(scene.model, codes[:2], codes[2:], steps=6)
    ends = figures.decode(scene.model, codes)[:, 0]
    for row, (start, end) in enumerate([(0, 2), (0, 2), (1, 3), (1, 3)]):
        np.testing.assert_allclose(cell(figure, row, 0), ends[start], atol=1e-5)
        np.testing.assert_allclose(cell(figure, row, 5), ends[end], atol=1e-4)
    middle = figures.decode(scene.model, ((codes[0] + codes[2]) * 0.6)[None] / 1.2)[0, 0]
    halfway = figures.interpolation(scene.model, codes[:1], codes[2:3], steps=3)
    np.testing.assert_allclose(cell(halfway, 0, 1), middle, atol=1e-4)


def images_of(split, label):
    return split.rows(slice(None)).x[split.y == label]


def typical(model, split, label, rank=0):
    """The code of a class's image that is the closest to the mean of its codes, or the next."""
    with torch.no_grad():
        codes = model.center(images_of(split, label))
    return codes[(codes - codes.mean(0)).square().sum(1).argsort()[rank]]


def test_ways_start_from_validation_images(scene):
    """The typical ones of each class; those of films and pictures, and those that are asked for by their number."""
    model, split = scene.model, scene.data.validation
    codes = torch.stack([typical(model, split, label) for label in range(10)])
    torch.testing.assert_close(scene.typical(10), codes)
    torch.testing.assert_close(torch.cat(scene.pairs()), codes[:8])
    film = pictures.wandering(scene, frames=1, hold=1)
    torch.testing.assert_close(film[::2], figures.decode(model, codes))
    film = pictures.digits(model, scene.data, "3855", frames=1, hold=1)
    path = torch.stack([codes[3], codes[8], codes[5], typical(model, split, 5, rank=1)])
    torch.testing.assert_close(film[::2], figures.decode(model, path))
    with torch.no_grad():
        chosen = model.center(split.rows(slice(None)).x[[3, 177]])
    torch.testing.assert_close(showing._codes(scene, [3, 177], "--images"), chosen)


def test_images_to_judge_by_are_the_first_of_each_class_for_validation(scene):
    split = scene.data.validation
    expected = torch.stack([images_of(split, label)[round_] for round_ in range(2) for label in range(10)])
    assert torch.equal(first_of_each_class(scene.data, 20), expected)
    np.testing.assert_allclose(pictures.progress(scene)[:28, 29:57, 0], expected[1, 0], atol=1e-6)


def test_maps_and_bars_are_of_validation_images(scene):
    with torch.no_grad():
        means = scene.model.center(scene.data.validation.rows(slice(None)).x)
    np.testing.assert_allclose(scene.means, means, atol=1e-5)
    names, (a, b, c) = sums(scene)
    for codes, part in ((a, 0), (b, 1), (c, 2)):
        y = scene.data.validation.y == int(names[0][part])
        torch.testing.assert_close(codes[0], means[y].mean(0))


def test_importance_weights_are_of_validation_images_made_binary(scene, monkeypatch):
    monkeypatch.setattr("vaelab.drawing.scene.WEIGHED", (12, 10))
    bounds, ess, words = weighed(scene)
    assert words == "dynamic binarization (fixed draw)"
    assert len(ess) == 12
    binary = load("digits", protocol="dynamic")
    batches = [(batch, RowNoise(1)) for batch, _ in [next(binary.batches("validation", 12))]]
    distortion, rate = elbo_terms(scene.model, batches, num_samples=200)
    assert abs((bounds[1] + distortion + rate).mean()) < 6, "an ELBO of other draws"
    assert np.corrcoef(bounds[1], -distortion - rate)[0, 1] > 0.95


def test_samples_are_compared_with_training_images_and_with_validation_images_reconstructed(scene):
    found = closest(scene)
    every = scene.data.train.rows(slice(None)).x.flatten(1)
    assert found.searched == len(every)
    assert (found.nearest.flatten(0, 1).flatten(1)[:, None] == every).all(2).any(1).all()
    with torch.no_grad():
        smooth = figures.decode(scene.model, scene.model.center(scene.data.validation.rows(slice(None)).x)).flatten(1)
    distances = torch.cdist(smooth, every).amin(1)
    assert found.of_held_out == pytest.approx(float(distances.quantile(0.5)), rel=1e-3)


def test_arithmetic_decodes_the_sum(scene):
    codes = scene.typical(6)
    figure = figures.arithmetic(scene.model, (codes[:2], codes[2:4], codes[4:]), [("0", "2", "4"), ("1", "3", "5")])
    expected = figures.decode(scene.model, (codes[1] - codes[3] + codes[5])[None])[0, 0]
    np.testing.assert_allclose(cell(figure, 1, 3), expected, atol=1e-5)
    names = [text.get_text() for text in figure.axes[0].get_yticklabels()]
    assert names == ["0 \u2212 2 + 4", "1 \u2212 3 + 5"]


# --- closest images -------------------------------------------------------------------------------------------------


def test_closest_images_are_those_of_a_plain_search(digits):
    images = digits.test.rows(slice(0, 12)).x
    rows, distances = nearest_images(images, digits.train, 3)
    every = torch.cat(list(digits.train.pieces())).flatten(1)
    of_all = (images.flatten(1)[:, None] - every[None]).square().sum(2).sqrt()
    expected, expected_rows = of_all.sort(dim=1, stable=True)
    np.testing.assert_allclose(distances, expected[:, :3], atol=1e-3)
    assert (rows == expected_rows[:, :3].numpy()).mean() > 0.95, "but for ties"


def test_a_copy_of_a_training_image_is_found(digits):
    copied = torch.tensor([3, 700, 1400])  # in the first, the second and the third piece
    rows, distances = nearest_images(digits.train.rows(copied).x, digits.train, 2)
    assert rows[:, 0].tolist() == copied.tolist()
    assert distances[:, 0].max() == 0
    assert distances[:, 1].min() > 0.1


def test_no_more_neighbours_than_there_are(digits):
    rows, _ = nearest_images(digits.test.rows(slice(0, 2)).x, digits.train.first(3), 5)
    assert rows.shape == (2, 3)


def test_of_one_training_image_there_is_no_second_neighbour_to_report(scene):
    alone = replace(scene.data, train=scene.data.train.first(1))
    strips = report._neighbours(replace(scene, data=alone)).strips
    assert [strip.label for strip in strips] == ["sample", "closest"]


# --- maps -----------------------------------------------------------------------------------------------------------


def clouds(count=30, size=12):
    centres = np.random.default_rng(0).normal(size=(3, size)) * 8
    labels = np.arange(3 * count) % 3
    return centres[labels] + np.random.default_rng(1).normal(size=(3 * count, size)), labels


def test_a_point_of_a_pca_map_stands_for_a_code():
    codes, _ = clouds()
    flat = codes @ np.linalg.qr(np.random.default_rng(2).normal(size=(12, 2)))[0] @ np.eye(2, 12)  # of two dimensions
    found = figures.project(flat)
    assert found.how == "pca"
    np.testing.assert_allclose(found.origin + found.points @ found.directions, flat, atol=1e-3)
    own = figures.project(codes[:, :2])
    np.testing.assert_allclose(own.origin + own.points @ own.directions, codes[:, :2], atol=1e-5)
    assert own.how == "own"


@pytest.mark.parametrize("how", ["tsne", "umap"])
def test_maps_of_neighbours_keep_clouds_apart_and_stand_for_no_code(how):
    if how == "umap":
        pytest.importorskip("umap", reason="umap-learn is not installed")
    codes, labels = clouds()
    before = torch.get_num_threads()
    found = figures.project(codes, how)
    assert torch.get_num_threads() == before, "results depend on it"
    centres = np.stack([found.points[labels == k].mean(0) for k in range(3)])
    nearest = ((found.points[:, None] - centres) ** 2).sum(2).argmin(1)
    assert (nearest == labels).all()
    assert found.origin is None
    assert found.directions is None
    np.testing.assert_array_equal(found.points, figures.project(codes, how).points)


def test_one_dimension_has_maps_too():
    codes = np.r_[np.random.default_rng(0).normal(-9, 1, (20, 1)), np.random.default_rng(1).normal(9, 1, (20, 1))]
    assert figures.project(codes).how == "own"
    points = figures.project(codes, "tsne").points
    centres = np.stack([points[:20].mean(0), points[20:].mean(0)])
    assert (((points[:, None] - centres) ** 2).sum(2).argmin(1) == np.repeat([0, 1], 20)).all()


def test_umap_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "umap", None)
    with pytest.raises(UsageError, match="pip install umap-learn"):
        figures.project(np.zeros((10, 5)), "umap")


@pytest.mark.parametrize(("how", "shape", "message"), [
    ("own", (9, 3), "at most 2 of them: there are 3"),
    ("pca", (1, 3), "at least 2 images: there are 1"),
    ("pca", (9, 1), "at least 2 latent dimensions"),
    ("tsne", (2, 3), "t-SNE needs at least 3 images"),
    ("own", (9, 7), "there are 7"),
])  # fmt: skip
def test_maps_that_cannot_be_drawn(how, shape, message):
    with pytest.raises(UsageError, match=message):
        figures.project(np.random.default_rng(0).normal(size=shape), how)


# --- numbers --------------------------------------------------------------------------------------------------------


def test_bars_fall_and_name_their_dimension():
    figure = figures.kl_bars(np.array([0.5, 2.0, 0.01]))
    axes = figure.axes[0]
    assert [bar.get_height() for bar in axes.patches] == [2.0, 0.5, 0.01]
    assert [text.get_text() for text in axes.get_xticklabels()] == ["2", "1", "3"]
    assert axes.get_title().startswith("2 of 3 dimensions carry 0.1 nats or more; 2.51 in all")


def history(count=6):
    return [{"epoch": e + 1, "validation_rate": 5.0 + e, "validation_distortion": 100 / (e + 1)} for e in range(count)]


def test_the_way_through_the_plane_of_rate_and_distortion():
    figure = figures.rate_distortion({"a": history()})
    x, y = figure.axes[0].get_lines()[0].get_data()
    total = np.add(x, y)
    assert total[0] <= 1.25 * total[-1], "the first epochs, far up, are left out"
    assert (x[-1], y[-1]) == (10.0, pytest.approx(100 / 6))
    assert figure.axes[0].get_legend().get_texts()[0].get_text() == "a"
    assert len(figures.rate_distortion({"": history(1)}).axes) == 1, "one epoch is a point"


def test_importance_weights_show_their_bounds_and_sizes():
    rng = np.random.default_rng(0)
    bounds = {1: rng.normal(-90, 1, 50), 10: rng.normal(-88, 1, 50), 100: rng.normal(-87, 1, 50)}
    ess = np.r_[np.full(20, 5.0), np.full(30, 50.0)]
    left, right = figures.importance_weights(bounds, ess).axes
    np.testing.assert_allclose(left.get_lines()[0].get_ydata(), [-bounds[k].mean() for k in (1, 10, 100)])
    assert right.get_title() == "median 50; below 10 for 40% of the images"
    assert sum(bar.get_height() for bar in right.patches) == 50
    assert "±" in left.get_title()
    left, _ = figures.importance_weights({1: bounds[1][:1]}, ess[:1]).axes
    assert left.get_title() == f"{-bounds[1][0]:.2f} nats at $k$ = 1, 1 image", "of one image no error is known"


# --- files ----------------------------------------------------------------------------------------------------------


def test_titles_say_run_protocol_and_numbers(run, scene):
    title = pictures.FIGURES["reconstructions"](scene).axes[0].get_title()
    record = scene.history[scene.epoch - 1]
    assert title == (
        f"Validation images, reconstructed: distortion {record['validation_distortion']:.2f}, rate "
        f"{record['validation_rate']:.2f} nats\nmlp on digits, grey pixels, epoch {scene.epoch}"
    )


def test_the_dark_theme_is_dark_and_ends_with_its_block(scene):
    def corner():
        content = media.encode(pictures.FIGURES["kl_bars"](scene), ".png")
        return np.asarray(Image.open(io.BytesIO(content)).convert("L"))[2, 2]

    with figures.theme("dark"):
        dark = corner()
    assert dark < 40
    assert corner() > 250


def test_vector_figures_have_letters_and_no_date(scene):
    one, other = (media.encode(pictures.FIGURES["rate_distortion"](scene), ".svg") for _ in range(2))
    assert one == other
    assert b"nats per image</text>" in one
    assert media.encode(pictures.FIGURES["kl_bars"](scene), ".pdf").startswith(b"%PDF")


@pytest.mark.parametrize("suffix", [".jpg", "", ".gif"])
def test_a_format_that_is_not_known(scene, suffix):
    with pytest.raises(UsageError, match=re.escape(".png or .svg or .pdf")):
        media.encode(pictures.FIGURES["kl_bars"](scene), suffix)


def test_an_mp4_plays_the_frames():
    av = pytest.importorskip("av", reason="av is not installed")
    frames = torch.linspace(0, 1, 12)[:, None, None, None].expand(12, 1, 27, 31)
    with av.open(io.BytesIO(media.encode(frames, ".mp4"))) as film:
        decoded = [frame.to_ndarray(format="gray") for frame in film.decode(video=0)]
    assert len(decoded) == 12
    np.testing.assert_allclose([frame.mean() / 255 for frame in decoded], torch.linspace(0, 1, 12), atol=0.06)


def test_an_mp4_without_its_package_is_refused(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    with pytest.raises(UsageError, match=r"pip install av, or write a \.gif"):
        media.encode(torch.zeros(2, 1, 8, 8), ".mp4")


def test_swinging_dimensions_come_back(scene):
    frames = pictures.swinging(scene, frames=3)
    assert frames.shape == (12, 1, 2 * 29 - 1, 5 * 29 - 1)
    zero = scene.typical(1)[0].clone()
    zero[scene.order[0]] = 0
    np.testing.assert_allclose(frames[0, 0, :28, :28], figures.decode(scene.model, zero[None])[0, 0], atol=1e-5)
    torch.testing.assert_close(frames[0], frames[6], atol=1e-4, rtol=0)
    assert (frames[0] - frames[3]).abs().max() > 0.05


def test_the_film_of_a_training_has_a_picture_for_each_epoch(run):
    files = sorted(path.name for path in (run / "progress").iterdir())
    assert files == [f"epoch_{e:04d}.png" for e in range(1, 7)]
    with Image.open(io.BytesIO(pictures.training_film(run))) as film:
        durations = []
        for i in range(film.n_frames):
            film.seek(i)
            durations.append(film.info["duration"])
        assert film.n_frames >= 6
    assert sum(durations[5:]) > 1800, "the last picture rests"


def test_the_film_of_a_training_as_mp4(run):
    av = pytest.importorskip("av", reason="av is not installed")
    with av.open(io.BytesIO(pictures.training_film(run, ".mp4"))) as film:
        assert len(list(film.decode(video=0))) == 6 + 2 * pictures.TRAINING_FPS


def test_pictures_of_progress_show_one_set_of_images(run, scene):
    first, last = (np.asarray(Image.open(run / "progress" / f"epoch_000{e}.png")) for e in (1, 6))
    assert first.shape == (5 * 29 - 1, 10 * 29 - 1)
    np.testing.assert_array_equal(first[:28], last[:28], err_msg="the same validation images")
    assert np.abs(first[29:].astype(int) - last[29:]).max() > 50, "what the model makes of them changes"


# --- commands -------------------------------------------------------------------------------------------------------


def test_draw_draws_all_that_fits(run, tmp_path, capsys):
    assert main(["draw", str(run), "--out", str(tmp_path / "f")]) == 0
    said = capsys.readouterr().out
    assert "manifold is left out: a manifold needs 2 latent dimensions: this model has 20" in said
    drawn = {path.stem for path in (tmp_path / "f").iterdir()}
    assert drawn == set(pictures.FIGURES) - {"manifold"}
    for path in (tmp_path / "f").iterdir():
        with Image.open(path) as picture:
            assert min(picture.size) > 60, path
            assert len(np.unique(np.asarray(picture.convert("L")))) > 8, f"{path} is empty"


def test_draw_named_figures_in_other_formats(run, tmp_path):
    out = tmp_path / "f"
    assert main(["draw", str(run), "latent", "kl_bars", "--map", "tsne", "--format", "svg", "--out", str(out)]) == 0
    assert {path.name for path in out.iterdir()} == {"latent.svg", "kl_bars.svg"}
    assert "by t-SNE" in (out / "latent.svg").read_text()


def test_traverse_and_interpolate_write_what_is_asked_for(run, tmp_path):
    assert main(["traverse", str(run), "--image", "3", "--rows", "2", "--out", str(tmp_path / "t.svg")]) == 0
    assert "Traversals of validation image 3" in (tmp_path / "t.svg").read_text()
    assert main(["interpolate", str(run), "--images", "0", "1", "--steps", "5", "--out", str(tmp_path / "i.gif")]) == 0
    with Image.open(tmp_path / "i.gif") as film:
        assert film.n_frames >= 10
    assert main(["interpolate", str(run), "--theme", "dark"]) == 0
    assert (run / "interpolate.png").exists()


@pytest.mark.parametrize("split", [None, "train", "validation", "test"])
def test_reconstructions_are_of_the_first_images_of_the_split_that_is_asked_for(run, scene, split, tmp_path):
    """Of the test images, if of none."""
    out, name = tmp_path / "r.png", split or "test"
    assert main(["reconstruct", str(run), "--num", "3", "--out", str(out), *(["--split", split] if split else [])]) == 0
    x = scene.data.split(name).rows(slice(3)).x
    expected = figures.reconstructions(scene.model, x, title=f"mlp: images ({name}) and their reconstructions")
    assert out.read_bytes() == media.encode(expected, ".png")


def test_commands_move_from_the_validation_images_that_are_named(run, scene, tmp_path):
    with torch.no_grad():
        codes = scene.model.center(scene.data.validation.rows(slice(None)).x)
    traverse, interpolate = tmp_path / "t.png", tmp_path / "i.gif"
    assert main(["traverse", str(run), "--image", "7", "--rows", "2", "--steps", "3", "--out", str(traverse)]) == 0
    title = scene.title("Traversals of validation image 7, by rate")
    expected = figures.traversals(scene.model, codes[7], scene.order[:2], scene.rate, steps=3, title=title)
    assert traverse.read_bytes() == media.encode(expected, ".png")
    assert main(["interpolate", str(run), "--images", "9", "4", "--steps", "2", "--out", str(interpolate)]) == 0
    assert interpolate.read_bytes() == media.encode(figures.walk(scene.model, codes[[9, 4]], frames=2), ".gif")


def test_images_beyond_the_map_can_be_moved_from(run, tmp_path, monkeypatch):
    monkeypatch.setattr("vaelab.drawing.scene.MAPPED", 50)
    assert main(["traverse", str(run), "--image", "179", "--rows", "2", "--out", str(tmp_path / "t.png")]) == 0


@pytest.mark.parametrize("of", ["images", "traversal", "training"])
def test_animations_of_all_kinds(run, of):
    assert main(["animate", str(run), "--of", of, "--frames", "4"]) == 0
    with Image.open(run / f"animate-{of}.gif") as film:
        assert film.n_frames >= 6


@pytest.mark.parametrize(("arguments", "message"), [
    (["draw", "sampels"], "no figure 'sampels'; did you mean 'samples'?"),
    (["draw", "manifold"], "a manifold needs 2 latent dimensions"),
    (["traverse", "--rows", "0"], "--rows 0: must be at least 1"),
    (["traverse", "--span", "0"], "--span 0: must be greater than 0"),
    (["traverse", "--image", "180"], "--image 180: there are validation images 0 to 179"),
    (["traverse", "--out", "t.gif"], "a file .gif cannot be written: take .png or .svg or .pdf"),
    (["interpolate", "--images", "1"], "--images 1: give two for each pair"),
    (["interpolate", "--images", "1", "-2"], "--images -2: there are validation images 0 to 179"),
    (["interpolate", "--steps", "1"], "--steps 1: must be at least 2"),
    (["reconstruct", "--images", "mine", "--split", "train"], "--split train takes the run's own images"),
    (["animate", "--of", "images", "--digits", "12"], "--digits 12 names classes"),
    (["animate", "--out", "a.png"], "--out a.png: a film is a .gif or a .mp4"),
])  # fmt: skip
def test_wrong_values_are_one_line(run, arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main([arguments[0], str(run), *arguments[1:]]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert len(error.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_dollars_in_names_are_no_mathematics(tmp_path):
    for label in ("cost $5 & $6", "$x^$"):
        (tmp_path / "m$x^$" / label).mkdir(parents=True)
        for i in range(20):
            pixels = np.random.default_rng(i).integers(0, 256, (12, 12), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "m$x^$" / label / f"{i}.png")
    out = tmp_path / "run $y^$"
    assert main(["train", "mlp-2d", "--data", str(tmp_path / "m$x^$"), "--epochs", "1", "--out", str(out)]) == 0
    assert main(["sample", str(out)]) == 0
    assert main(["reconstruct", str(out)]) == 0
    assert main(["draw", str(out), "--format", "svg"]) == 0
    text = (out / "figures" / "latent.svg").read_text()
    assert ">$x^$<" in text
    assert "cost $5 &amp; $6" in text
    assert "mlp-2d on m$x^$, grey pixels, epoch 1" in text


def test_data_without_classes(tmp_path, capsys):
    np.save(tmp_path / "a.npy", np.random.default_rng(0).random((60, 12, 9)).astype(np.float32))
    out = tmp_path / "run"
    assert main(["train", "mlp", "--data", str(tmp_path / "a.npy"), "--epochs", "1", "--out", str(out)]) == 0
    assert main(["draw", str(out)]) == 0
    assert "there are no three among the validation images of a" in capsys.readouterr().out
    assert main(["animate", str(out), "--of", "images", "--frames", "2"]) == 0
    assert vaelab.load(str(tmp_path / "a.npy")).classes is None


@pytest.mark.parametrize(("command", "seed"), [("sample", "-1"), ("sample", str(2**63)), ("refit", str(2**32))])
def test_seeds_that_a_generator_does_not_take_are_one_line(run, command, seed, capsys):
    assert main([command, str(run), "--seed", seed]) == 2
    assert f"--seed {seed}: must be from 0 to" in capsys.readouterr().err.splitlines()[-1]


def test_images_that_are_not_there_are_named_by_their_flag(run, capsys):
    assert main(["reconstruct", str(run), "--images", "no-such"]) == 2
    assert "--images 'no-such': neither a path nor a data set" in capsys.readouterr().err
    assert main(["reconstruct", str(run), "--images", ""]) == 2
    assert "--images '': neither a path nor a data set" in capsys.readouterr().err

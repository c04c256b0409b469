"""Sources, splits and protocols: what is held out stays held out, and everyone scores the same pixels."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import vaelab
from test_readers import idx_bytes
from vaelab.cli import main
from vaelab.config import Augment, Data, override
from vaelab.data import load
from vaelab.data.augment import augment, move
from vaelab.data.datasets import Dataset, Split, binarize, binarize_batch
from vaelab.data.sources import IN_MEMORY, MADE
from vaelab.errors import FailureError, UsageError
from vaelab.models import Batch
from vaelab.recipes import recipe
from vaelab.runtime import StepNoise
from vaelab.train import fit


def test_splits_never_overlap_and_are_recorded(digits: Dataset):
    rows = torch.cat([digits.train.index, digits.validation.index, digits.test.index])
    assert sorted(rows.tolist()) == list(range(1797))
    record = digits.record()
    assert (record["train"], record["validation"], record["test"]) == (1437, 180, 180)
    assert record["test_sha256"] == hashlib.sha256(digits.test.x.numpy().tobytes()).hexdigest()


def test_digits_are_upright_and_not_inverted(digits: Dataset):
    """White ink on black: a zero has a dark centre, a one a bright one, and more ink lies in the middle than at the edge."""
    mean = digits.train.x.float().mean((0, 1))
    assert mean[:, 10:18].mean() > 2 * mean[:, :2].mean()
    zeros = digits.train.x[digits.train.y == 0].float().mean(0)[0]
    sevens = digits.train.x[digits.train.y == 7].float().mean(0)[0]
    assert zeros[12:16, 12:16].mean() < zeros[12:16, 5:8].mean()
    assert sevens[2:6].mean() > sevens[22:26].mean(), "a seven has its bar on top"


def test_split_sizes_are_numbers_or_fractions():
    assert len(load("digits", validation_size=100, test_size=0.5).test) == 898
    for wrong in (0, -5, 1.5):
        with pytest.raises(UsageError, match="--validation-size"):
            load("digits", validation_size=wrong)
    with pytest.raises(UsageError, match="none is left to train on"):
        load("digits", validation_size=0.6, test_size=0.5)


def test_mnist_is_split_as_is_customary(mnist: Dataset):
    assert [len(mnist.split(name)) for name in ("train", "validation", "test")] == [55_000, 5_000, 10_000]
    assert mnist.validation.index.tolist() == list(range(55_000, 60_000))
    assert mnist.test.y[:5].tolist() == [7, 2, 1, 0, 4]
    with pytest.raises(UsageError, match="a test set of its own"):
        load("mnist", test_size=0.1)


def test_grey_cross_entropy_of_mnist_has_its_known_floor(mnist: Dataset):
    from vaelab.evaluate import grey_floor

    assert abs(grey_floor(mnist.test) - 45.53) < 0.01


@pytest.mark.parametrize("protocol", ["static", "dynamic", "threshold"])
def test_binary_protocols(protocol, digits: Dataset):
    data = load("digits", protocol=protocol)
    again = load("digits", protocol=protocol)
    assert data.binary
    for name in ("validation", "test"):
        pixels = data.split(name).x
        assert set(pixels.unique().tolist()) == {0, 255}
        assert torch.equal(pixels, again.split(name).x), "one fixed draw, whatever the run"
    assert (set(data.train.x.unique().tolist()) == {0, 255}) == (protocol != "dynamic")
    assert data.record()["test_sha256"] != digits.record()["test_sha256"]


def test_fixed_draws_are_the_published_constants():
    """If this hash changes, every binarized number ever published with vaelab changes."""
    grey = np.arange(256, dtype=np.uint8).repeat(4).reshape(1, 1, 32, 32)
    digest = hashlib.sha256(binarize(grey, "static", 2).tobytes()).hexdigest()
    assert digest[:16] == "2c718996107a6842"


def test_binarization_has_the_pixel_as_its_mean():
    grey = np.array([0, 1, 64, 128, 254, 255], np.uint8).repeat(20_000)
    ones = (binarize(grey, "static", 0) == 255).reshape(6, -1).mean(1)
    assert ones[0] == 0
    assert ones[-1] == 1
    np.testing.assert_allclose(ones, np.array([0, 1, 64, 128, 254, 255]) / 255, atol=0.012)
    x = torch.full((1, 1, 300, 300), 0.3)
    drawn = [binarize_batch(Batch(x), StepNoise(0, step)).x for step in range(2)]
    assert not torch.equal(*drawn), "dynamic: anew each time"
    assert abs(float(drawn[0].mean()) - 0.3) < 0.01


def test_idx_folders_with_and_without_a_test_set(tmp_path):
    x = np.random.default_rng(0).integers(0, 256, (30, 10, 9)).astype(np.uint8)
    (tmp_path / "train-images-idx3-ubyte").write_bytes(idx_bytes(x))
    assert len(load(str(tmp_path)).test) == 3
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes(idx_bytes(x[:7]))
    assert len(load(str(tmp_path)).test) == 7


def test_idx_folders_say_themselves_what_they_hold(tmp_path):
    x = np.random.default_rng(0).integers(0, 256, (30, 10, 9)).astype(np.uint8)
    (tmp_path / "train-images-idx3-ubyte").write_bytes(idx_bytes(x))
    with pytest.raises(UsageError, match="leave out --image-size"):
        load(str(tmp_path), image_size=(32, 32))
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes(idx_bytes(x[:, 1:]))
    with pytest.raises(FailureError, match="the training images are"):
        load(str(tmp_path))


def test_a_path_is_a_place_also_if_a_data_set_is_called_so(tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO", "vaelab")
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    (tmp_path / "digits").mkdir()
    for i in range(12):
        Image.fromarray(rng.integers(0, 256, (9, 10), np.uint8)).save(tmp_path / "digits" / f"{i}.png")
    assert load(Path("digits")).shape == load("./digits").shape == (1, 9, 10)
    assert "data set of that name" not in caplog.text
    assert load("digits").shape == (1, 28, 28)
    assert "digits is the data set of that name; the folder here is --data ./digits" in caplog.text
    fit(override(recipe("mlp"), epochs=1), Path("digits"), out=tmp_path / "run")
    assert json.loads((tmp_path / "run" / "config.json").read_text())["run"]["data"]["source"] == str(
        tmp_path / "digits"
    )


def test_arrays_with_labels_and_ready_made_test_sets(tmp_path, caplog):
    caplog.set_level("INFO", "vaelab")
    x, y = np.random.default_rng(0).random((40, 9, 10)), np.arange(40) % 3
    np.savez(tmp_path / "a.npz", x=x, y=y)
    data = load(str(tmp_path / "a.npz"))
    assert data.classes == ("0", "1", "2")
    assert data.train.x.dtype == torch.float32
    assert torch.equal(data.train.y, data.train.index % 3)
    np.savez(tmp_path / "b.npz", x_train=x, x_test=x[:5])
    assert len(load(str(tmp_path / "b.npz")).test) == 5
    np.savez(tmp_path / "more.npz", x=x, labels=y, weights=y)
    load(str(tmp_path / "more.npz"))
    assert "not used: labels, weights" in caplog.text
    np.savez(tmp_path / "c.npz", first=x, second=x)
    with pytest.raises(UsageError, match="first, second: name the images x"):
        load(str(tmp_path / "c.npz"))
    np.savez(tmp_path / "d.npz", x=x, y=y[:5])
    with pytest.raises(FailureError, match="40 whole numbers"):
        load(str(tmp_path / "d.npz"))


def test_unknown_data_are_named(tmp_path):
    with pytest.raises(UsageError, match="did you mean 'mnist'"):
        load("mnits")
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(UsageError, match="give a folder of images"):
        load(str(tmp_path / "a.txt"))
    with pytest.raises(UsageError, match="describe your own files"):
        load("digits", channels=3)


def test_settings_that_are_unknown_or_wrong_are_named():
    with pytest.raises(UsageError, match="no protocol 'Dynamic'; did you mean 'dynamic'"):
        load("digits", protocol="Dynamic")
    with pytest.raises(UsageError, match="no value_range 'bytes'; did you mean 'byte'"):
        load("digits", value_range="bytes")
    with pytest.raises(TypeError, match="range"):
        load("digits", range="byte")


def test_data_of_a_run_are_loaded_as_it_says():
    settings = {"protocol": "static", "validation_size": 100.0}
    asked = Data("digits", **settings)
    data = load(asked)
    assert (data.asked, data.record()) == (asked, load("digits", **settings).record())
    with pytest.raises(UsageError, match="holds its settings itself"):
        load(asked, protocol="grey", test_size=0.2)


@pytest.mark.parametrize("label", [-1, 10**9])
def test_labels_that_cannot_be_class_numbers_are_named(tmp_path, label):
    x, y = np.random.default_rng(0).random((40, 9, 10)), np.arange(40) % 3
    y[7] = label
    np.savez(tmp_path / "a.npz", x=x, y=y)
    with pytest.raises(FailureError, match=rf"a.npz\[y\] holds labels from .*{label}.*from 0"):
        load(str(tmp_path / "a.npz"))


def test_images_of_black_and_white_bytes_are_binary_whatever_they_are_kept_in(tmp_path):
    """So a Bernoulli of them is a likelihood, and no protocol changes them."""
    x = np.random.default_rng(0).integers(0, 2, (30, 10, 9)).astype(np.uint8) * np.uint8(255)
    (tmp_path / "idx").mkdir()
    (tmp_path / "idx" / "train-images-idx3-ubyte").write_bytes(idx_bytes(x))
    np.save(tmp_path / "array.npy", x)
    np.save(tmp_path / "numbers.npy", x.astype(np.int64))
    for i, image in enumerate(x):
        (tmp_path / "folder").mkdir(exist_ok=True)
        Image.fromarray(image).save(tmp_path / "folder" / f"{i:02}.png")
    for name in ("idx", "array.npy", "numbers.npy", "folder"):
        data = load(str(tmp_path / name))
        assert data.binary, name
        assert data.pixels == "binary pixels"
        assert torch.equal(data.train.x[:, 0], torch.from_numpy(x)[data.train.index])
        drawn = load(str(tmp_path / name), protocol="static")
        assert all(torch.equal(drawn.split(part).x, data.split(part).x) for part in ("train", "validation", "test"))
    x[3, 2, 1] = 254
    np.save(tmp_path / "array.npy", x)
    assert not load(str(tmp_path / "array.npy")).binary


def test_frey_face_says_where_it_was_looked_for(tmp_path, monkeypatch):
    monkeypatch.setenv("VAELAB_DATA", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(FailureError, match=r"freyfaces\.npy \(not there\).*--data digits"):
        load("freyfaces")
    (tmp_path / "freyfaces").mkdir()
    np.save(tmp_path / "freyfaces" / "freyfaces.npy", np.random.default_rng(0).integers(0, 256, (50, 28, 20), np.uint8))
    assert load("freyfaces").shape == (1, 28, 20)


class TestAugment:
    def test_no_motion_is_the_identity(self):
        x = torch.rand(3, 2, 11, 17)
        still = torch.zeros(3)
        torch.testing.assert_close(move(x, still, still, still), x, atol=1e-5, rtol=0)

    @pytest.mark.parametrize("shape", [(9, 9), (8, 15)])
    def test_whole_pixels_move_exactly(self, shape):
        x = torch.zeros(1, 1, *shape)
        x[0, 0, 3, 4] = 1
        moved = move(x, torch.zeros(1), torch.tensor([2.0]), torch.tensor([1.0]))
        assert moved[0, 0, 4, 6] > 0.999
        assert abs(float(moved.sum()) - 1) < 1e-4

    @pytest.mark.parametrize(("height", "width"), [(21, 21), (21, 41)])
    def test_rotation_is_counter_clockwise_and_keeps_shapes(self, height, width):
        """A quarter turn takes the point right of the centre to above it, at the same distance in pixels."""
        x = torch.zeros(1, 1, height, width)
        x[0, 0, height // 2, width // 2 + 6] = 1
        turned = move(x, torch.tensor([90.0]), torch.zeros(1), torch.zeros(1))
        assert turned[0, 0, height // 2 - 6, width // 2] > 0.99

    @pytest.mark.parametrize(("height", "width"), [(21, 21), (21, 41)])
    def test_an_image_is_turned_about_its_centre_and_then_shifted(self, height, width):
        """Right of the centre by 6 pixels, then above it, then 3 further to the right and 2 down."""
        x = torch.zeros(1, 1, height, width)
        x[0, 0, height // 2, width // 2 + 6] = 1
        moved = move(x, torch.tensor([90.0]), torch.tensor([3.0]), torch.tensor([2.0]))
        assert moved[0, 0, height // 2 - 6 + 2, width // 2 + 3] > 0.99

    def test_the_edge_is_repeated_beyond_the_border(self):
        """Neither black nor a mirror image comes in."""
        columns = torch.arange(1.0, 10).expand(1, 1, 7, 9)
        still, far = torch.zeros(1), torch.tensor([3.0])
        expected = torch.tensor([1.0, 1, 1, 1, 2, 3, 4, 5, 6])
        torch.testing.assert_close(move(columns, still, far, still), expected.expand(1, 1, 7, 9))
        torch.testing.assert_close(move(columns.mT, still, still, far), expected[:, None].expand(1, 1, 9, 7))
        expected = torch.tensor([4.0, 5, 6, 7, 8, 9, 9, 9, 9])
        torch.testing.assert_close(move(columns, still, -far, still), expected.expand(1, 1, 7, 9))

    def test_shifts_and_angles_reach_as_far_as_they_may(self):
        """A bright pixel in the middle: up to 3 pixels away along each axis; or one right of it turned by up to 90, though
        not all are."""
        x = torch.zeros(2000, 1, 15, 15)
        x[:, :, 7, 7] = 1
        moved = augment(Batch(x), Augment(rotate=0.0, shift=3.0, augment_prob=1.0), StepNoise(0, 0)).x
        at = torch.arange(15.0) - 7
        for axis in (2, 3):
            distance = (moved.sum((1, axis)) * at).sum(-1)
            assert (distance.min(), distance.max()) == (pytest.approx(-3, abs=0.02), pytest.approx(3, abs=0.02))
        x = torch.zeros(2000, 1, 15, 15)
        x[:, :, 7, 12] = 1
        moved = augment(Batch(x), Augment(rotate=90.0, shift=0.0, augment_prob=0.3), StepNoise(0, 0)).x
        right, down = ((moved.sum((1, axis)) * at).sum(-1) for axis in (2, 3))
        degrees = torch.rad2deg(torch.atan2(-down, right))
        assert (degrees.min(), degrees.max()) == (pytest.approx(-90, abs=1), pytest.approx(90, abs=1))

    def test_share_and_strength(self):
        x = torch.rand(400, 1, 12, 12)
        batch = Batch(x)
        assert augment(batch, Augment(5, 1, 0.0), StepNoise(0, 0)) is batch
        some = augment(batch, Augment(5, 1, 0.3), StepNoise(0, 0)).x
        changed = (some != x).flatten(1).any(1)
        assert 0.2 < changed.float().mean() < 0.4
        assert torch.equal(some[~changed], x[~changed]), "the others stay exact"
        assert torch.equal(some, augment(batch, Augment(5, 1, 0.3), StepNoise(0, 0)).x)
        assert not torch.equal(some, augment(batch, Augment(5, 1, 0.3), StepNoise(0, 1)).x)
        assert (augment(batch, Augment(5, 1, 1.0), StepNoise(0, 0)).x != x).flatten(1).any(1).all()
        assert torch.equal(augment(batch, Augment(5, 1, 1e-9), StepNoise(0, 0)).x, x), "a step may choose no image"


def test_a_threshold_is_at_one_half():
    grey = np.array([0, 127, 128, 255], np.uint8)
    for x in (grey, (grey / 255).astype(np.float32)):
        assert binarize(x, "threshold", 0).tolist() == [0, 0, 255, 255]


def test_sorted_images_are_shuffled_before_they_are_split(tmp_path):
    np.save(tmp_path / "x.npy", np.repeat(np.arange(100, dtype=np.uint8), 16).reshape(100, 4, 4) + 50)
    data = load(tmp_path / "x.npy", validation_size=0.2, test_size=0.2)
    for part in (data.train, data.validation, data.test):
        values = part.x[:, 0, 0, 0].int()
        assert (values.diff() < 0).any()
        assert values.min() < 80 < 120 < values.max()


def test_angle_and_shifts_are_independent():
    x = torch.zeros(400, 1, 15, 15)
    x[:, :, 7, 7] = 1
    moved = augment(Batch(x), Augment(rotate=0.0, shift=3.0, augment_prob=1.0), StepNoise(0, 0)).x
    at = torch.arange(15.0)
    down, right = ((moved.sum((1, axis)) * at).sum(-1) - 7 for axis in (3, 2))
    assert abs(torch.corrcoef(torch.stack([down, right]))[0, 1]) < 0.2


def test_arrays_are_a_data_set_like_a_file_of_them(tmp_path):
    x, y = np.random.default_rng(0).integers(0, 256, (60, 9, 11), np.uint8), np.arange(60) % 3
    np.savez(tmp_path / "a.npz", x=x, y=y)
    of_file = load(tmp_path / "a.npz")
    for images, labels in ((x, y), (torch.from_numpy(x), torch.from_numpy(y))):
        found = load(images, labels=labels, protocol="grey")
        for name in ("train", "validation", "test"):
            assert found.sha256(name) == of_file.sha256(name)
            assert torch.equal(found.split(name).y, of_file.split(name).y)
    assert found.classes == ("0", "1", "2")
    assert load(x / 127.5 - 1, value_range="symmetric").train.x.max() <= 1
    with pytest.raises(UsageError, match="labels are of images that are given as an array"):
        load("digits", labels=y)


def test_a_run_on_arrays_says_where_its_data_are_not(tmp_path, capsys):
    x = np.random.default_rng(0).integers(0, 256, (60, 9, 11), np.uint8)
    run, out = override(recipe("mlp"), epochs=1), tmp_path / "run"
    fit(run, load(x), out=out)
    assert json.loads((out / "config.json").read_text())["run"]["data"]["source"] == IN_MEMORY
    assert main(["evaluate", str(out), "--only", "elbo"]) == 2
    assert (
        f"the data of the run in {out} are in no file: save them as .npy or .npz, and name" in capsys.readouterr().err
    )
    with pytest.raises(UsageError, match="was trained on data in memory: give fit the same data"):
        fit(override(run, epochs=2), out=out, resume=True)
    fit(override(run, epochs=2), load(x), out=out, resume=True)
    np.save(tmp_path / "x.npy", x)
    assert main(["train", "mlp", "--out", str(out), "--resume", "--data", str(tmp_path / "x.npy")]) == 0
    assert main(["evaluate", str(out), "--only", "elbo"]) == 0
    fit(override(run, epochs=3), load(x), out=out, resume=True)  # the same images in memory are at no other place
    assert json.loads((out / "config.json").read_text())["run"]["data"]["source"] == str(tmp_path / "x.npy")


@pytest.mark.parametrize(("x", "message"), [
    (torch.zeros(9, 9, 9), "images are uint8 or float32"),
    (torch.zeros(9, 1, 9, 9, dtype=torch.float64), "images are uint8 or float32"),
    (torch.linspace(-1, 4, 9 * 81).reshape(9, 1, 9, 9), "values from -1 to 4"),
    (torch.full((9, 1, 9, 9), float("nan")), "values from nan to nan"),
    (torch.zeros(8, 1, 9, 9), "8 images, 9 row numbers: give as many of each"),
    (np.zeros((9, 1, 9, 9), np.float32), "no tensor but ndarray: torch.from_numpy"),
])  # fmt: skip
def test_what_is_put_together_as_a_data_set_is_looked_at(x, message):
    good = Split(torch.zeros(9, 1, 9, 9), None, torch.arange(9))
    mine = Dataset("mine", "grey", good, Split(x, None, torch.arange(9)), good, binary=False, classes=None)
    with pytest.raises(UsageError, match=rf"the validation split holds .*{message}"):
        fit(recipe("mlp"), mine)


def test_a_data_set_that_was_put_together_is_recorded_as_such(tmp_path, capsys):
    split = Split(torch.rand(40, 1, 9, 9), None, torch.arange(40))
    mine = Dataset("mine", "grey", split, split, split, binary=False, classes=None)
    fit(override(recipe("mlp"), epochs=1), mine, out=tmp_path / "run")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["run"]["data"]["source"] == MADE
    assert main(["evaluate", str(tmp_path / "run")]) == 2
    assert "was trained on a data set made in Python" in capsys.readouterr().err
    config["run"]["data"]["source"] = "mnist"  # as it was recorded once
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    fit(override(recipe("mlp"), epochs=2), mine, out=tmp_path / "run", resume=True)
    with pytest.raises(UsageError, match=r"data: Tensor is none; give a name, a path, or what vaelab\.load makes of"):
        fit(recipe("mlp"), torch.rand(40, 1, 9, 9))
    model = fit(override(recipe("mlp"), epochs=1), mine)
    with pytest.raises(UsageError, match=r"images of digits are \(1, 28, 28\), the model's \(1, 9, 9\)"):
        vaelab.evaluate.evaluate(model, recipe("mlp"), load("digits"))


@pytest.mark.parametrize(("source", "settings", "message"), [
    ([np.zeros((9, 9))], {}, "list is no source of data: give a name, a path, or one array"),
    (None, {}, "NoneType is no source of data"),
    ("digits", {"protocol": None}, "no protocol None"),
    ("digits", {"value_range": "bytes"}, "no value_range 'bytes'; did you mean 'byte'"),
    ("digits", {"validation_size": "many"}, "validation_size = 'many': expected"),
    (np.linspace(-1, 4, 810).reshape(10, 9, 9), {}, r"--range \(value_range in Python\) unit"),
    (Data("digits"), {"protocol": "dynamic"}, "a Data holds its settings itself"),
    (Data("digits", protocol="gray"), {}, "no protocol 'gray'; did you mean 'grey'"),
    (Data("digits", value_range="bytes"), {}, "no value_range 'bytes'; did you mean 'byte'"),
    (Data("digits", validation_size="a"), {}, "validation_size = 'a': expected"),
    (np.zeros((9, 9, 9)), {"labels": [[1], [1, 2]]}, "labels: "),
])  # fmt: skip
def test_wrong_data_in_python_are_one_line(source, settings, message):
    with pytest.raises((UsageError, FailureError), match=message):
        load(source, **settings)


def test_settings_of_data_are_brought_to_their_types(tmp_path):
    x = np.random.default_rng(0).integers(0, 256, (60, 9, 11), np.uint8)
    found = load(x, labels=[i % 3 for i in range(60)], validation_size=np.int64(7), image_size=[9, 11])
    assert len(found.validation) == 7
    assert found.train.y is not None
    assert found.asked == Data(IN_MEMORY, validation_size=7.0, image_size=(9, 11))
    json.dumps(vars(found.asked))
    assert load(torch.rand(40, 9, 9).bfloat16()).train.x.dtype == torch.float32


@pytest.mark.parametrize(("change", "message"), [
    ({"y": np.arange(9)}, "the train split's labels are no tensor"),
    ({"y": torch.rand(9)}, "the train split's labels are no tensor"),
    ({"y": torch.zeros(9, 2, dtype=torch.int64)}, "the train split's labels are no tensor"),
    ({"index": None}, "the train split's row numbers are no tensor"),
    ({"index": list(range(9))}, "the train split's row numbers are no tensor"),
])  # fmt: skip
def test_labels_and_row_numbers_of_a_split_are_looked_at(change, message):
    good = Split(torch.zeros(9, 1, 9, 9), torch.arange(9), torch.arange(9))
    mine = Dataset("mine", "grey", replace(good, **change), good, good, binary=False, classes=None)
    with pytest.raises(UsageError, match=message):
        fit(recipe("mlp"), mine)

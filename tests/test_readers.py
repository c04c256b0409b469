"""Every file is read strictly: what is wrong is named, with the remedy, and nothing is guessed."""

import gzip
import struct

import numpy as np
import pytest
from PIL import Image

from vaelab.data import readers
from vaelab.data.readers import as_images, read_array_file, read_folder, read_idx, read_idx_pair, read_image
from vaelab.errors import FailureError, UsageError


def idx_bytes(array: np.ndarray) -> bytes:
    return struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


@pytest.fixture
def pixels():
    return np.arange(3 * 9 * 8, dtype=np.uint8).reshape(3, 9, 8)


class TestIdx:
    @pytest.mark.parametrize("compress", [False, True])
    def test_reads_plain_and_gzip(self, tmp_path, pixels, compress):
        raw = idx_bytes(pixels)
        path = tmp_path / "images"
        path.write_bytes(gzip.compress(raw) if compress else raw)
        assert np.array_equal(read_idx(path), pixels)

    def test_reads_big_endian_numbers(self, tmp_path):
        values = np.array([1, -2, 70_000], np.int32)
        path = tmp_path / "numbers"
        path.write_bytes(struct.pack(">HBBI", 0, 0x0C, 1, 3) + values.astype(">i4").tobytes())
        assert read_idx(path).tolist() == [1, -2, 70_000]

    @pytest.mark.parametrize(
        ("damage", "message"),
        [
            (lambda raw: raw[:-1], "cut short"),
            (lambda raw: raw + b"\0", "too long"),
            (lambda raw: b"\x89PNG" + raw[4:], "magic number is 0x89504e47"),
            (lambda raw: raw[:9], "cut short"),
            (lambda raw: b"", "not an idx file"),
            (lambda raw: gzip.compress(raw)[:-20], "damaged or cut short"),
        ],
    )
    def test_damage_is_named(self, tmp_path, pixels, damage, message):
        path = tmp_path / "images"
        path.write_bytes(damage(idx_bytes(pixels)))
        with pytest.raises(FailureError, match=message) as error:
            read_idx(path)
        assert str(path) in str(error.value)

    def test_counts_must_agree(self, tmp_path, pixels):
        (tmp_path / "x").write_bytes(idx_bytes(pixels))
        (tmp_path / "y").write_bytes(idx_bytes(np.zeros(2, np.uint8)))
        with pytest.raises(FailureError, match="labels for the 3 images"):
            read_idx_pair(tmp_path / "x", tmp_path / "y")

    @pytest.mark.parametrize(
        "labels", [np.array([0, -1, 1], ">i1"), np.array([0, 1, 1.5], ">f4"), np.array([0, 1, 10**9], ">i4")]
    )
    def test_labels_are_class_numbers(self, tmp_path, pixels, labels):
        code = {"i1": 0x09, "f4": 0x0D, "i4": 0x0C}[labels.dtype.str[1:]]
        (tmp_path / "x").write_bytes(idx_bytes(pixels))
        (tmp_path / "y").write_bytes(struct.pack(">HBBI", 0, code, 1, 3) + labels.tobytes())
        with pytest.raises(FailureError, match=r"y holds .*from 0"):
            read_idx_pair(tmp_path / "x", tmp_path / "y")


def save(path, array, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)


class TestFolder:
    def test_class_folders_become_labels(self, tmp_path):
        for name, value in (("cat", 10), ("dog", 200)):
            for i in range(2):
                save(tmp_path / name / f"{i}.png", np.full((9, 12), value, np.uint8))
        images = read_folder(tmp_path, None, None)
        assert images.x.shape == (4, 1, 9, 12)
        assert images.y.tolist() == [0, 0, 1, 1]
        assert images.classes == ("cat", "dog")
        assert set(images.x[2:].ravel()) == {200}

    def test_colour_is_kept_and_grey_is_found(self, tmp_path):
        colour = np.zeros((9, 9, 3), np.uint8)
        colour[..., 0] = 255
        save(tmp_path / "a.png", colour)
        assert read_folder(tmp_path, None, None).x.shape == (1, 3, 9, 9)
        assert set(read_folder(tmp_path, None, 1).x.ravel()) == {76}, "ITU-R 601 luma of pure red"
        save(tmp_path / "a.png", np.repeat(colour[..., :1], 3, 2))
        assert read_folder(tmp_path, None, None).x.shape == (1, 1, 9, 9)
        assert read_folder(tmp_path, None, 3).x.shape == (1, 3, 9, 9)

    @pytest.mark.parametrize("coloured", range(5))
    def test_one_image_in_colour_makes_all_of_them(self, tmp_path, coloured, monkeypatch):
        """Wherever it is, also among images that are read at another time; in its last channel alone."""
        monkeypatch.setattr(readers, "PIECE", 2)
        for i in range(5):
            pixels = np.full((4, 4, 3), 50, np.uint8)
            pixels[2, 3, 2] += i == coloured
            save(tmp_path / f"{i}.png", pixels)
        images = read_folder(tmp_path, None, None)
        assert images.x.shape == (5, 3, 4, 4)
        assert images.x[:, 2, 2, 3].tolist() == [50 + (i == coloured) for i in range(5)]

    def test_exif_rotation_is_applied(self, tmp_path):
        picture = np.zeros((10, 20), np.uint8)
        picture[:, :10] = 255  # the left half is white
        exif = Image.Exif()
        exif[0x0112] = 6  # show rotated by 90 degrees clockwise: the left becomes the top
        save(tmp_path / "a.jpg", picture, exif=exif, quality=95)
        x = read_folder(tmp_path, None, 1).x[0, 0]
        assert x.shape == (20, 10)
        assert x[:9].mean() > 240
        assert x[11:].mean() < 15

    def test_alpha_is_laid_on_white(self, tmp_path):
        rgba = np.zeros((8, 8, 4), np.uint8)
        rgba[:, :4, 3] = 255  # opaque black on the left, transparent on the right
        save(tmp_path / "a.png", rgba)
        x = read_folder(tmp_path, None, None).x[0, 0]
        assert (x[:, :4] == 0).all()
        assert (x[:, 4:] == 255).all()

    def test_palette_and_transparent_palette(self, tmp_path):
        picture = Image.fromarray(np.array([[0, 1]] * 8, np.uint8).repeat(4, 1), "P")
        picture.putpalette([255, 0, 0, 0, 255, 0])
        picture.save(tmp_path / "a.png", transparency=1)
        x = read_folder(tmp_path, None, None).x[0]
        assert x[:, 0, 0].tolist() == [255, 0, 0]
        assert x[:, 0, 7].tolist() == [255, 255, 255]

    def test_sixteen_bits_are_scaled_not_clipped(self, tmp_path):
        Image.fromarray(np.array([[0, 257 * 100, 65535]] * 9, np.uint16).repeat(3, 1)).save(tmp_path / "a.png")
        assert sorted(set(read_folder(tmp_path, None, None).x.ravel().tolist())) == [0, 100, 255]

    @pytest.mark.parametrize("dtype", [np.uint16, np.int32])
    def test_bytes_that_are_kept_in_sixteen_bits_do_not_become_black(self, tmp_path, dtype):
        Image.fromarray(np.full((9, 9), 255, dtype)).save(tmp_path / "a.tiff")
        with pytest.raises(FailureError, match=r"16-bit images of .* are all black in 8 bits: .*; rescale them"):
            read_folder(tmp_path, None, None)
        Image.fromarray(np.full((9, 9), 60_000, np.uint16)).save(tmp_path / "b.tiff")
        assert read_folder(tmp_path, None, None).x.max() == 233, "beside others it is a dark one"

    def test_an_orientation_beside_damaged_tags_is_told_in_one_line(self, tmp_path):
        exif = Image.Exif()
        exif[0x0112], exif[0x9003] = 6, "2020"
        save(tmp_path / "a.jpg", np.zeros((9, 9), np.uint8), exif=exif)
        raw = (tmp_path / "a.jpg").read_bytes()
        broken = raw.replace(b"\x90\x03\0\2", b"\x02\x03\0\2")
        assert broken != raw
        (tmp_path / "a.jpg").write_bytes(broken)
        with pytest.raises(FailureError, match=r"a\.jpg is not an image that can be read"):
            read_folder(tmp_path, None, None)

    def test_a_link_to_nothing_is_no_smaller_class(self, tmp_path):
        save(tmp_path / "cats" / "0.png", np.zeros((9, 9), np.uint8))
        (tmp_path / "dogs").mkdir()
        (tmp_path / "dogs" / "0.png").symlink_to(tmp_path / "nowhere.png")
        with pytest.raises(FailureError, match=r"dogs.0\.png is a link to a file that is not there"):
            read_folder(tmp_path, None, None)

    def test_a_training_folder_alone_is_no_class(self, tmp_path):
        save(tmp_path / "train" / "cats" / "0.png", np.zeros((9, 9), np.uint8))
        with pytest.raises(UsageError, match=r"holds train alone, and the classes are in that: give --data .*train"):
            read_folder(tmp_path, None, None)
        assert read_folder(tmp_path / "train", None, None).classes == ("cats",)
        save(tmp_path / "other" / "train" / "0.png", np.zeros((9, 9), np.uint8))
        (tmp_path / "other" / "train" / ".thumbs").mkdir()
        assert read_folder(tmp_path / "other", None, None).classes == ("train",)

    def test_what_pillow_has_not_implemented_is_no_image(self, tmp_path):
        header = struct.pack("<4s4I", b"DDS ", 124, 0, 8, 8).ljust(128, b"\0")  # of an unknown kind of pixels
        (tmp_path / "a.dds").write_bytes(header)
        with pytest.raises(FailureError, match=r"a.dds is not an image that can be read \(Unknown pixel format"):
            read_image(tmp_path / "a.dds", None)

    def test_floating_point_pixels_are_refused_not_clipped(self, tmp_path):
        Image.fromarray(np.full((9, 9), 0.5, np.float32)).save(tmp_path / "a.tiff")
        with pytest.raises(
            FailureError, match=r"a.tiff is not an image that can be read \(its pixels are floating-point"
        ):
            read_folder(tmp_path, None, None)

    def test_size_scales_to_cover_and_crops_the_centre(self, tmp_path):
        picture = np.zeros((10, 30), np.uint8)
        picture[:, 10:20] = 255
        save(tmp_path / "a.png", picture)
        x = read_folder(tmp_path, (10, 10), None).x
        assert x.shape == (1, 1, 10, 10)
        assert x.min() > 200, "only the white middle third is left"

    def test_what_is_wrong_is_named(self, tmp_path):
        with pytest.raises(FailureError, match="holds no images"):
            read_folder(tmp_path, None, None)
        save(tmp_path / "a.png", np.zeros((9, 9), np.uint8))
        save(tmp_path / "b.png", np.zeros((9, 8), np.uint8))
        with pytest.raises(FailureError, match=r"a\.png is 9x9.*b\.png is 9x8.*--image-size"):
            read_folder(tmp_path, None, None)
        (tmp_path / "notes.txt").write_text("hello")
        with pytest.raises(FailureError, match=r"notes\.txt is not an image"):
            read_folder(tmp_path, (9, 9), None)
        (tmp_path / "notes.txt").unlink()
        (tmp_path / "b.png").write_bytes((tmp_path / "b.png").read_bytes()[:40])
        with pytest.raises(FailureError, match=r"b\.png is not an image"):
            read_folder(tmp_path, (9, 9), None)
        (tmp_path / "b.png").unlink()
        (tmp_path / ".DS_Store").write_text("hidden files are passed over")
        assert len(read_folder(tmp_path, None, None).x) == 1

    def test_ready_made_splits_are_not_taken_for_classes(self, tmp_path):
        for name in ("train", "test"):
            save(tmp_path / name / "a.png", np.zeros((9, 9), np.uint8))
        with pytest.raises(UsageError, match="split into train and test already"):
            read_folder(tmp_path, None, None)


class TestArrays:
    @pytest.mark.parametrize("shape", [(5, 9, 8), (5, 9, 8, 1), (5, 1, 9, 8), (5, 9, 8, 3), (5, 3, 9, 8), (5, 81)])
    def test_layouts(self, shape):
        array = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
        x = as_images(array, "a").x
        assert x.shape == (5, 3 if 3 in shape else 1, 9, 9 if shape == (5, 81) else 8)
        expected = array.transpose(0, 3, 1, 2) if len(shape) == 4 and shape[-1] < 8 else array
        assert x.ravel().tolist() == expected.ravel().tolist()

    def test_flat_images_of_unequal_sides_and_colours(self):
        array = np.random.default_rng(0).random((4, 3 * 10 * 9))
        assert as_images(array, "a", image_size=(10, 9), channels=3).x.shape == (4, 3, 10, 9)

    @pytest.mark.parametrize("shape", [(4, 3, 9, 3), (4, 1, 9, 3), (4, 9, 9, 2), (4,), (2, 2, 2, 2, 2), (4, 80)])
    def test_ambiguity_is_an_error(self, shape):
        with pytest.raises(UsageError, match=r"a has shape|a holds 80"):
            as_images(np.zeros(shape, np.uint8), "a")

    @pytest.mark.parametrize(("shape", "channels"), [((4, 9, 9), 3), ((4, 9, 9, 3), 1), ((4, 1, 9, 9), 3)])
    def test_channels_that_are_not_there_are_refused(self, shape, channels):
        with pytest.raises(UsageError, match=f"not --channels {channels}"):
            as_images(np.full(shape, 7, np.uint8), "a", channels=channels)

    def test_channels_resolve_it(self):
        assert as_images(np.full((4, 1, 9, 3), 7, np.uint8), "a", channels=1).x.shape == (4, 1, 9, 3)

    @pytest.mark.parametrize("dtype", [np.uint8, np.int64, np.bool_, np.float32])
    def test_only_zeros_and_ones_are_binary(self, dtype):
        images = as_images(np.eye(9)[None].astype(dtype), "a")
        assert images.binary
        assert set(images.x.ravel().tolist()) == {0, 255}

    def test_ranges(self):
        grey = np.array([0, 51, 255])[None, None].repeat(9, 1)
        assert not as_images(grey, "a").binary
        assert as_images(grey.astype(np.uint8), "a").x.dtype == np.uint8
        floats = as_images(grey / 255, "a").x
        assert floats.dtype == np.float32
        np.testing.assert_allclose(as_images(grey.astype(float), "a", value_range="byte").x, floats, atol=1e-6)
        np.testing.assert_allclose(as_images(grey / 127.5 - 1, "a", value_range="symmetric").x, floats, atol=1e-6)

    @pytest.mark.parametrize(
        ("array", "message"),
        [
            (np.full((3, 9, 9), 300), "from 300 to 300, outside 0..255.*--range"),
            (np.full((3, 9, 9), 1.5), "outside 0..1.*--range"),
            (np.full((3, 9, 9), -0.5), "outside 0..1"),
            (np.full((3, 9, 9), np.nan), "243 values that are NaN"),
            (np.full((3, 9, 9), np.inf), "NaN or infinite"),
            (np.zeros((0, 9, 9)), "is empty"),
            (np.full((3, 9, 9), "x"), "holds <U1"),
            (np.full((3, 9, 9), 1j), "holds complex128"),
        ],
    )
    def test_values_that_cannot_be_pixels(self, array, message):
        with pytest.raises(FailureError, match=message):
            as_images(array, "a")

    def test_objects_are_never_unpickled(self, tmp_path):
        bomb = np.empty(1, object)
        bomb[0] = lambda: None
        path = tmp_path / "a.npy"
        np.save(path, np.array([{"a": 1}], object), allow_pickle=True)
        with pytest.raises(FailureError, match="never unpickled"):
            read_array_file(path)
        np.savez(tmp_path / "b.npz", x=np.array([{"a": 1}], object))
        with pytest.raises(FailureError, match="never unpickled"):
            read_array_file(tmp_path / "b.npz")

    @pytest.mark.parametrize(
        ("name", "save"), [("a.npy", np.save), ("a.npz", np.savez), ("b.npz", np.savez_compressed)]
    )
    def test_damaged_files(self, tmp_path, name, save):
        path = tmp_path / name
        save(path, np.random.default_rng(0).random((3, 9, 9)))
        path.write_bytes(path.read_bytes()[:-300])
        with pytest.raises(FailureError, match="damaged"):
            read_array_file(path)


def test_images_behind_links_count(tmp_path):
    for name in ("cats/2019", "elsewhere"):
        (tmp_path / "all" / name).mkdir(parents=True)
    (tmp_path / "all" / "elsewhere").rename(tmp_path / "elsewhere")
    for i, folder in enumerate(("all/cats/2019", "elsewhere", "elsewhere")):
        Image.new("L", (9, 9), i).save(tmp_path / folder / f"{i}.png")
    (tmp_path / "all" / "cats" / ".hidden").mkdir()
    Image.new("L", (9, 9), 77).save(tmp_path / "all" / "cats" / ".hidden" / "9.png")
    (tmp_path / "all" / "cats" / "2020").symlink_to(tmp_path / "elsewhere")
    read = read_folder(tmp_path / "all", None, None)
    assert sorted(read.x[:, 0, 0, 0].tolist()) == [0, 1, 2]
    assert read.classes == ("cats",)
    (tmp_path / "elsewhere" / "again").symlink_to(tmp_path / "all" / "cats")
    with pytest.raises(FailureError, match=r"is reached twice, by a link"):
        read_folder(tmp_path / "all", None, None)


@pytest.mark.parametrize(
    ("train", "name"),
    [("Train", "test"), ("Train", "val"), ("train", "valid"), ("train", "Validation"), ("Training", "Testing")],
)
def test_a_folder_that_is_split_already_is_refused(tmp_path, train, name):
    for folder in (train, name):
        (tmp_path / folder).mkdir()
        Image.new("L", (9, 9)).save(tmp_path / folder / "0.png")
    with pytest.raises(UsageError, match=rf"is split into {train} and {name} already: .* give --data .*/{train}"):
        read_folder(tmp_path, None, None)


def test_images_along_the_last_axis_are_not_taken_for_long_ones():
    with pytest.raises(
        UsageError, match=r"holds images of 28x30000: their number must be the first axis; np\.moveaxis"
    ):
        as_images(np.zeros((8, 28, 30_000), np.uint8), "a.npy")
    with pytest.raises(UsageError, match="holds images of 28x500: their number must be the first axis"):
        as_images(np.zeros((28, 28, 500), np.uint8), "a.npy")
    assert as_images(np.zeros((28, 10, 1000), np.uint8), "a.npy").x.shape == (28, 1, 10, 1000)
    assert as_images(np.zeros((28, 28, 500), np.uint8), "a.npy", image_size=(28, 500)).x.shape == (28, 1, 28, 500)


def test_a_large_image_is_no_attack(tmp_path, monkeypatch, recwarn):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 80)
    Image.new("L", (10, 9)).save(tmp_path / "0.png")
    read_folder(tmp_path, None, None)
    assert not recwarn.list


def test_a_class_that_is_a_link_to_another_is_refused(tmp_path):
    (tmp_path / "a").mkdir()
    Image.new("L", (9, 9)).save(tmp_path / "a" / "0.png")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    with pytest.raises(FailureError, match=r"b is reached twice, by a link: its images would count twice"):
        read_folder(tmp_path, None, None)

"""Images that stay on disk are the same images, train the same bits, and take no memory."""

import concurrent.futures
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vaelab.cli import main
from vaelab.config import override
from vaelab.data import load, readers, streaming
from vaelab.errors import FailureError, UsageError
from vaelab.recipes import recipe
from vaelab.runs.folder import RunFolder
from vaelab.train import fit

DRAW = np.random.default_rng(0)
COLOUR = DRAW.integers(0, 256, (60, 12, 10, 3), np.uint8)
GREY = DRAW.integers(0, 256, (60, 12, 10), np.uint8)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "vaelab" / "images"


@pytest.fixture
def streamed(monkeypatch):
    """From here on everything is too large for memory."""
    return lambda: monkeypatch.setattr(streaming, "STREAMED", 1)


def folder_of(images: np.ndarray, root: Path, classes: int = 2) -> Path:
    for i, image in enumerate(images):
        place = root / f"class{i % classes}"
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(place / f"{i:03}.png")
    return root


def saved(array: np.ndarray, path: Path) -> Path:
    np.save(path, array)
    return path


def same(a, b) -> None:
    for name in ("train", "validation", "test"):
        one, other = a.split(name), b.split(name)
        assert torch.equal(one.rows(slice(None)).x, other.rows(slice(None)).x)
        assert torch.equal(one.index, other.index)
        assert one.y is None if other.y is None else torch.equal(one.y, other.y)
        assert torch.equal(one.first(3).rows(torch.tensor([2, 0])).x, other.first(3).rows(torch.tensor([2, 0])).x)
        torch.testing.assert_close(one.mean(), other.mean())
    assert a.record() == b.record()
    assert (a.shape, a.classes, a.binary) == (b.shape, b.classes, b.binary)


@pytest.mark.parametrize(
    ("images", "reading"),
    [(COLOUR, {}), (GREY, {}), (COLOUR, {"channels": 1}), (GREY, {"channels": 3}), (COLOUR, {"image_size": (9, 9)})],
)
def test_a_folder_on_disk_is_the_folder_in_memory(images, reading, tmp_path, streamed, cache):
    root = folder_of(images, tmp_path / "pictures")
    whole = load(str(root), **reading)
    assert whole.train.where is None
    assert not cache.exists(), "what fits into memory is not cached"
    streamed()
    mapped = load(str(root), **reading)
    assert mapped.train.where is not None
    same(whole, mapped)
    assert len(list(cache.iterdir())) == 1, "one file, and nothing half-made"


def test_a_folder_is_copied_piece_by_piece_and_once_for_each_way_of_reading(tmp_path, streamed, cache, monkeypatch):
    """One image in colour, at the end, makes all of three channels."""
    mostly = np.repeat(GREY[..., None], 3, 3)
    mostly[-1] = COLOUR[-1]
    for kind, images in (("grey", GREY), ("mostly", mostly)):
        root = folder_of(images, tmp_path / kind, classes=1)
        readings = [{}, {"channels": 1}, {"channels": 3}, {"image_size": (9, 9)}]
        with monkeypatch.context() as memory:
            memory.setattr(streaming, "STREAMED", 2**30)
            whole = [load(str(root), **reading) for reading in readings]
        streamed()
        monkeypatch.setattr(streaming, "PIECE", 7)
        for in_memory, reading in zip(whole, readings, strict=True):
            same(in_memory, load(str(root), **reading))
        assert whole[0].shape[0] == (1 if kind == "grey" else 3)
    assert len(list(cache.iterdir())) == 8


def counted(monkeypatch) -> list[Path]:
    """The files that are read from now on."""
    read, original = [], readers.read_image
    monkeypatch.setattr(readers, "read_image", lambda path, image_size: read.append(path) or original(path, image_size))
    return read


def test_a_folder_is_decoded_once_and_again_when_it_changes(tmp_path, streamed, cache, monkeypatch, caplog):
    root = folder_of(GREY, tmp_path / "pictures")
    streamed()
    read = counted(monkeypatch)
    with caplog.at_level(logging.INFO):
        load(str(root))
    assert len(read) == 1 + len(GREY), "the first tells the size"
    said = [record.getMessage() for record in caplog.records]
    assert any("60 images once" in line and "GB" in line and str(cache) in line for line in said)
    read.clear()
    load(str(root))
    assert len(read) == 1
    Image.fromarray(255 - GREY[7]).save(root / "class1" / "007.png")
    os.utime(root / "class1" / "007.png", ns=(0, 1))
    changed = load(str(root))
    assert len(read) > len(GREY)
    row = int((torch.cat([changed.split(n).index for n in ("train", "validation", "test")]) == 33).nonzero())
    both = torch.cat([changed.split(n).rows(slice(None)).x for n in ("train", "validation", "test")])
    expected = torch.from_numpy(255 - GREY[7]) / 255  # the classes' files one after the other: 30 + 3
    torch.testing.assert_close(both[row, 0], expected)


def test_a_folder_that_two_ask_for_at_once_is_decoded_by_one(tmp_path, streamed, cache, monkeypatch):
    root = folder_of(GREY, tmp_path / "pictures")
    streamed()
    read = counted(monkeypatch)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        first, second = pool.map(load, [str(root)] * 2)
    same(first, second)
    assert len(read) == 2 + len(GREY), "of both the first tells the size"
    assert len(list(cache.iterdir())) == 1


def test_decoding_that_fails_leaves_nothing(tmp_path, streamed, cache, monkeypatch):
    root = folder_of(GREY, tmp_path / "pictures")
    streamed()
    Image.fromarray(GREY[0][:5]).save(root / "class1" / "odd.png")
    with pytest.raises(FailureError, match=r"12x10.*odd.png is 5x10.*--image-size"):
        load(str(root))
    assert list(cache.iterdir()) == []
    (root / "class1" / "odd.png").write_bytes(b"no image")
    with pytest.raises(FailureError, match=r"odd.png is not an image"):
        load(str(root))
    assert list(cache.iterdir()) == []
    (root / "class1" / "odd.png").unlink()
    coloured = 3 * GREY.size
    for free in (100, coloured, coloured + GREY.size - 1):  # at last there are images of three channels and of one
        monkeypatch.setattr(streaming.shutil, "disk_usage", lambda path, free=free: type("Usage", (), {"free": free}))
        with pytest.raises(FailureError, match="GB free"):
            load(str(root))
    monkeypatch.setattr(streaming.shutil, "disk_usage", lambda path: type("Usage", (), {"free": coloured}))
    load(str(root), channels=3)


@pytest.mark.parametrize(
    "array", [GREY, COLOUR, COLOUR.transpose(0, 3, 1, 2), GREY.astype(np.float32) / 255, np.asfortranarray(GREY),
              (GREY > 99) * np.uint8(255)],
)  # fmt: skip
def test_an_array_on_disk_is_the_array_in_memory_and_stays_as_it_is(array, tmp_path, streamed):
    path = saved(array, tmp_path / "images.npy")
    before, whole = path.read_bytes(), load(str(path))
    streamed()
    mapped = load(str(path))
    assert mapped.train.where is not None
    same(whole, mapped)
    mapped.train.x.zero_()
    assert path.read_bytes() == before, "a write to the mapped pixels never reaches the file"


@pytest.mark.parametrize("array", [GREY.astype(np.float64) / 255, (GREY > 99).astype(np.uint8), GREY.astype(np.int64)])
def test_values_that_must_be_converted_are_read_into_memory(array, tmp_path, streamed):
    path = saved(array, tmp_path / "images.npy")
    whole = load(str(path))
    streamed()
    again = load(str(path))
    assert again.train.where is None
    same(whole, again)


def test_bad_values_and_a_protocol_that_needs_memory_are_one_line(tmp_path, streamed, monkeypatch):
    streamed()
    monkeypatch.setattr(streaming, "PIECE", 16)  # what is bad lies in the third
    bad = GREY.astype(np.float32) / 255
    bad[40, 0, 0] = np.nan
    with pytest.raises(FailureError, match="NaN"):
        load(str(saved(bad, tmp_path / "nan.npy")))
    with pytest.raises(FailureError, match=r"outside 0..1"):
        load(str(saved(GREY.astype(np.float32), tmp_path / "bytes.npy")))
    with pytest.raises(UsageError, match=r"--protocol dynamic needs the images in memory"):
        load(str(saved(GREY, tmp_path / "grey.npy")), protocol="dynamic")
    (tmp_path / "text.npy").write_text("no array")
    with pytest.raises(FailureError, match="save a numeric array"):
        load(str(tmp_path / "text.npy"))
    (tmp_path / "cut.npy").write_bytes((tmp_path / "grey.npy").read_bytes()[:-50])
    with pytest.raises(FailureError, match=r"cut.npy is damaged"):
        load(str(tmp_path / "cut.npy"))


SMALL = {"encoder_hidden_dims": (16,), "decoder_hidden_dims": (16,), "latent_dim": 3, "batch_size": 16, "epochs": 3}


def test_training_from_disk_gives_the_bits_of_training_from_memory(tmp_path, streamed):
    path = str(saved(GREY, tmp_path / "images.npy"))
    run = override(recipe("mlp"), data=path, **SMALL)
    whole = fit(run).state_dict()
    streamed()
    for name, value in fit(run).state_dict().items():
        assert torch.equal(value, whole[name]), name


PATCHED = """
import sys
from vaelab.data import streaming
streaming.STREAMED = 1
sys.argv = sys.argv[1:]
exec(compile(open(sys.argv[0]).read(), sys.argv[0], "exec"))
"""


def test_a_run_from_disk_that_is_killed_within_an_epoch_and_resumed_ends_with_the_same_bits(tmp_path, streamed):
    root = folder_of(GREY, tmp_path / "pictures")
    streamed()
    run = override(recipe("mlp"), data=str(root), **SMALL)
    fit(run, out=tmp_path / "whole")
    flags = ["train", "mlp", "--data", str(root), "--encoder-hidden-dims", "16", "--decoder-hidden-dims", "16",
             "--latent-dim", "3", "--batch-size", "16", "--epochs", "3", "--save-every", "1"]  # fmt: skip
    script = Path(__file__).with_name("killed.py")
    killed = subprocess.run([sys.executable, "-c", PATCHED, script, "step:5", *flags, "--out", tmp_path / "parts"],
                            capture_output=True, text=True)  # fmt: skip
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert main(["train", "mlp", "--data", str(root), "--out", str(tmp_path / "parts"), "--resume"]) == 0
    whole, parts = (RunFolder.open(tmp_path / name) for name in ("whole", "parts"))
    for name, value in whole.load_best().items():
        assert torch.equal(parts.load_best()[name], value), name


MEMORY = """
import re, sys
import torch
import vaelab as v
from vaelab.training.trainer import Trainer

def held():
    return int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024

v.fit(v.override(v.recipes.mlp(), epochs=1, compile="off"), v.load("digits"))  # all that torch needs is there
before = held()
data = v.load(sys.argv[1])
assert data.train.where is not None
print(data.sha256("train"))
trainer = Trainer(v.override(v.recipes.mlp(), compile="off", encoder_hidden_dims=(8,), decoder_hidden_dims=(8,)), data,
                  torch.device("cpu"))
for _ in range(20):
    trainer.train_step()
print("MiB", held() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is counted by Linux's /proc")
def test_memory_is_bounded(tmp_path):
    """Of a file of 1.2 GB no more than some batches are held."""
    path = tmp_path / "large.npy"
    array = np.lib.format.open_memmap(path, "w+", np.uint8, (300_000, 64, 64))  # a hole on disk, but for its end
    array[-1] = 255
    array.flush()
    del array
    done = subprocess.run([sys.executable, "-c", MEMORY, str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split("MiB")[1]) < 150


@pytest.mark.parametrize("x", [np.array([0, 255], np.uint8), np.array([0, 1], np.float32)], ids=["bytes", "floats"])
def test_streamed_arrays_of_two_values_are_binary_as_in_memory(x, tmp_path, streamed):
    streamed()
    images = np.random.default_rng(0).choice(x, (60, 8, 8))
    for changed, binary in ((images[0, 0, 0], True), (x[1] / 2, False)):
        images[-1, -1, -1] = changed
        np.save(tmp_path / f"{binary}.npy", images)
        assert load(tmp_path / f"{binary}.npy").binary == binary


def test_the_channels_asked_for_have_a_file_of_their_own(tmp_path, streamed):
    streamed()
    root = folder_of(COLOUR, tmp_path / "x")
    assert [load(root, channels=channels).shape[0] for channels in (3, 1, None)] == [3, 1, 3]


def test_a_streamed_folder_of_two_levels_is_binary_as_in_memory(tmp_path, streamed):
    sketches = folder_of((GREY > 100).astype(np.uint8) * 255, tmp_path / "sketches")
    grey = folder_of(GREY, tmp_path / "grey")
    assert load(str(sketches)).pixels == "binary pixels"
    streamed()
    assert load(str(sketches)).pixels == "binary pixels"
    assert load(str(grey)).pixels == "grey pixels"

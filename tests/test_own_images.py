"""A user's own images: in colour, in folders whose names are not UTF-8, and moved after the training."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import vaelab
from vaelab.cli import main
from vaelab.drawing import pictures
from vaelab.drawing.scene import scene_of, typical_of_each, typical_rows
from vaelab.errors import FailureError
from vaelab.figures.projections import project
from vaelab.labels import images, readable, rows_of

CAFE = os.fsdecode(b"caf\xe9")  # Latin-1, as old archives hold


def album(root: Path, classes: list[str], each: int = 40) -> Path:
    """A folder of colour images of 12 x 10, in classes."""
    for number, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        pixels = np.random.default_rng(number).integers(0, 256, (each, 12, 10, 3), np.uint8)
        for i, image in enumerate(pixels):
            Image.fromarray(image).save(root / name / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("own")
    data = album(root / "my pub", ["café", "red wine", "tea"])
    out = root / "run"
    assert main(["train", "mlp-2d", "--data", str(data), "--epochs", "1", "--threads", "1", "--out", str(out)]) == 0
    return out


def error_of(capsys) -> str:
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error.splitlines()[-1]


def test_names_that_are_no_utf8_are_written_readably(tmp_path):
    """In a process of its own: such names in what is captured here could not be passed on."""
    data = album(tmp_path / f"my {CAFE}", [CAFE, "red wine", "tea"])
    out = tmp_path / CAFE / "run"
    program = """
import sys
from vaelab.cli import main
data, out = sys.argv[1:]
commands = (["train", "mlp-2d", "--data", data, "--epochs", "1", "--threads", "1", "--out", out],
            ["draw", out, "latent", "samples"], ["sample", out], ["report", out])
sys.exit(any(main(command) for command in commands))
"""
    done = subprocess.run([sys.executable, "-c", program, str(data), str(out)], capture_output=True, timeout=200)
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    loaded = vaelab.load(str(data))
    assert (loaded.name, loaded.classes) == (r"my caf\xe9", (r"caf\xe9", "red wine", "tea"))
    assert readable("café ±") == "café ±"
    for page in ("report.html", "MODEL_CARD.md"):
        assert r"my caf\xe9" in (out / page).read_text()


def test_colour_images_are_not_called_grey(run, capsys):
    data = vaelab.load(str(run.parent / "my pub"))
    assert data.pixels == "colour pixels"
    assert main(["evaluate", str(run), "--only", "elbo"]) == 0
    assert "my pub test (12 images), colour pixels" in " ".join(capsys.readouterr().out.split())
    found = json.loads((run / "metrics.json").read_text())["splits"]["test"]["grey"]
    assert found["about"]["pixels"] == "colour pixels"
    assert "colour pixels" in found["metrics"]["negative_elbo"]["protocol"]
    shutil.copytree(run, run.with_name("again"))
    assert main(["compare", str(run), str(run.with_name("again")), "--out", str(run / "c.png")]) == 0
    assert "colour pixels" in capsys.readouterr().out
    assert main(["report", str(run)]) == 0
    text = (run / "report.html").read_text()
    assert "colour images of 12×10, " in text
    assert "grey pixels" not in text


def test_a_film_passes_through_classes_by_their_names(run, capsys):
    assert main(["animate", str(run), "--frames", "1"]) == 0
    assert main(["animate", str(run), "--frames", "1", "--digits", "tea, red wine"]) == 0
    names = [Path(line).name for line in capsys.readouterr().out.splitlines()]
    assert names == ["animate-café-red wine.gif", "animate-tea-red wine.gif"]
    assert main(["animate", str(run), "--digits", "tea"]) == 2
    assert "there is no class 't': an animation passes through two or more of café, red wine, tea (names with " in (
        error_of(capsys)
    )
    assert len(typical_rows(np.zeros((3, 2), np.float32), np.array([0, 0, 1]), 2)) == 0
    digits = vaelab.load("digits")
    assert pictures.classes_to_pass(digits, None) == ["1", "9"]
    assert pictures.classes_to_pass(digits, "314") == ["3", "1", "4"]


def test_data_that_were_moved_can_be_named_anew(run, tmp_path, capsys):
    data = album(tmp_path / "before", ["a", "b"])
    out = tmp_path / "run"
    train = ["train", "mlp", "--epochs", "1", "--threads", "1", "--out", str(out)]
    assert main([*train, "--data", str(data)]) == 0
    data.rename(tmp_path / "after")
    for command in (["doctor", str(out)], ["train", "mlp", "--out", str(out), "--resume"]):
        capsys.readouterr()
        assert main(command) == 2
        assert f"are no longer at {data}: put them, or a link to them, there, or name their new place by" in (
            error_of(capsys)
        )
    resume = ["train", "mlp", "--out", str(out), "--resume", "--data"]
    assert main([*resume, str(album(tmp_path / "others", ["b", "a", "c"]))]) == 1
    assert "the data have changed since" in error_of(capsys)
    assert main([*resume, str(tmp_path / "after")]) == 0
    assert main(["doctor", str(out)]) == 0


def test_a_class_that_was_renamed_changes_the_order(tmp_path, capsys):
    data, out = album(tmp_path / "images", ["a", "b"]), tmp_path / "run"
    assert main(["train", "mlp", "--data", str(data), "--epochs", "1", "--threads", "1", "--out", str(out)]) == 0
    (data / "a").rename(data / "c")
    assert main(["doctor", str(out)]) == 1
    assert "the train images are as many, but of other pixels or in another order (that of their names)" in (
        error_of(capsys)
    )
    (data / "c").rename(data / "a")
    (data / "a" / "0.png").unlink()
    assert main(["doctor", str(out)]) == 1
    assert "train was 64, is 63" in error_of(capsys)


def test_a_link_to_nothing_is_no_place_for_a_run(tmp_path, capsys):
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    assert main(["train", "mlp", "--data", "digits", "--out", str(tmp_path / "link")]) == 2
    assert error_of(capsys).endswith("is a link to a place that does not exist: choose another folder")


def test_figures_of_a_refitted_run_say_so(tmp_path, capsys):
    out, fitted = tmp_path / "run", tmp_path / "fitted"
    assert main(["train", "mlp", "--data", "digits", "--epochs", "1", "--threads", "1", "--out", str(out)]) == 0
    assert main(["refit", str(out), "--prior", "mixture", "--out", str(fitted)]) == 0
    assert scene_of(out).name == "mlp on digits"
    assert scene_of(fitted).name == "mlp on digits, mixture prior fitted after training"


@pytest.mark.parametrize(("shape", "remedy"), [
    ((30,), "number them by y = np.unique(y, return_inverse=True)[1]"),
    ((30, 1), "flatten them by y = y.ravel()"),
    ((30, 4), "of a row of scores for each image take y = y.argmax(1)"),
    ((29,), "whole numbers from 0"),
])  # fmt: skip
def test_labels_of_another_form_come_with_their_remedy(tmp_path, shape, remedy):
    np.savez(tmp_path / "a.npz", x=np.zeros((30, 9, 9), np.uint8), y=np.zeros(shape))
    with pytest.raises(FailureError) as refused:
        vaelab.load(str(tmp_path / "a.npz"))
    assert str(refused.value).endswith(remedy)


def test_pixels_of_16_bits_come_with_their_remedy(tmp_path):
    x = np.random.default_rng(0).integers(0, 65536, (30, 9, 9), np.uint16)
    np.save(tmp_path / "a.npy", x)
    with pytest.raises(FailureError, match=r"rescale them by x = x / np.float32\(65535\)"):
        vaelab.load(str(tmp_path / "a.npy"))
    np.save(tmp_path / "a.npy", x / np.float32(65535))
    assert vaelab.load(str(tmp_path / "a.npy")).train.x.dtype == torch.float32


def test_a_link_to_a_parent_does_not_count_images_twice(tmp_path):
    root = album(tmp_path / "images", ["a", "b"], each=4)
    (root / "c").symlink_to(tmp_path)
    with pytest.raises(FailureError, match=r"c is a link to a folder that .*images is in"):
        vaelab.load(str(root))


def test_a_run_that_has_lost_its_history_is_not_called_healthy(run, tmp_path, capsys):
    history = (run / "history.jsonl").rename(tmp_path / "history.jsonl")
    assert main(["doctor", str(run)]) == 1
    assert "has lost its history.jsonl" in error_of(capsys)
    history.rename(run / "history.jsonl")


@pytest.mark.parametrize("error", [
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes."),
    torch.OutOfMemoryError("CUDA out of memory."),
    MemoryError(),
])  # fmt: skip
def test_too_little_memory_is_one_line(run, error, monkeypatch, capsys):
    def fails(*args, **options):
        raise error

    monkeypatch.setattr("vaelab.figures.samples", fails)
    assert main(["sample", str(run), "--num", "3"]) == 1
    assert error_of(capsys).startswith("vaelab: not enough memory: a smaller network")


def test_other_errors_are_not_taken_for_too_little_memory(run, monkeypatch):
    monkeypatch.setattr("vaelab.figures.samples", lambda *args, **options: torch.ones(2) @ torch.ones(3))
    with pytest.raises(RuntimeError, match="size"):
        main(["sample", str(run)])


def test_one_image_is_one_image():
    assert [images(count) for count in (1, 2, 10_000)] == ["1 image", "2 images", "10,000 images"]


def test_an_empty_name_of_data_is_not_the_current_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(album(tmp_path / "here", ["a", "b"]))
    assert main(["train", "mlp", "--data", "", "--out", str(tmp_path / "run")]) == 2
    assert "--data is empty" in error_of(capsys)


def test_a_comparison_is_a_picture(run, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "other")
    for path in (run, tmp_path / "other"):
        assert main(["evaluate", str(path), "--only", "elbo"]) == 0
    assert main(["compare", str(run), str(tmp_path / "other"), "--out", str(tmp_path / "x.txt")]) == 2
    assert "x.txt: a picture is a .png or .svg or .pdf" in error_of(capsys)
    assert main(["compare", str(run), str(tmp_path / "other"), "--out", str(tmp_path / "x.svg")]) == 0
    assert (tmp_path / "x.svg").read_text().startswith("<?xml")


def test_damaged_metrics_name_the_remedy(run, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "metrics.json").write_text("{")
    assert main(["evaluate", str(tmp_path / "run"), "--only", "elbo"]) == 1
    assert "cannot be read as JSON" in (said := error_of(capsys))
    assert said.endswith("; remove it to measure anew")


def test_names_of_metrics_are_whole_on_a_narrow_terminal(run, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "40")
    assert main(["evaluate", str(run), "--only", "elbo"]) == 0
    out = capsys.readouterr().out
    assert "…" not in out


def test_codes_that_are_all_the_same_have_a_map_without_warnings(recwarn):
    found = project(np.ones((10, 3), np.float32), "pca")
    assert found.axes[0] == "principal component 1 (0% of the variance)"
    assert not recwarn.list


def test_typical_images_are_of_all_classes_in_turn():
    means = np.array([[0.0], [0.4], [5.0], [9.0], [5.5], [6.0]], np.float32)
    y = np.array([0, 0, 1, 0, 1, 1])
    assert typical_of_each(means, y, 3).tolist() == [1, 4, 0], "of each the closest to 3.13 and 5.5, then the next"
    assert typical_of_each(means, y, 9).tolist() == [1, 4, 0, 2, 3, 5]
    assert typical_of_each(means, 0 * y, 4).tolist() == [2, 4, 5, 1], "a single class"
    assert typical_of_each(means, None, 2).tolist() == [0, 1]


def test_an_empty_folder_is_no_class(tmp_path):
    root = album(tmp_path / "images", ["a", "c"], each=10)
    (root / "b").mkdir()
    data = vaelab.load(str(root))
    assert data.classes == ("a", "c")
    assert sorted(torch.cat([split.y for split in (data.train, data.validation, data.test)]).unique().tolist()) == [
        0,
        1,
    ]
    shutil.rmtree(root / "a")
    shutil.rmtree(root / "c")
    with pytest.raises(FailureError, match="holds no images"):
        vaelab.load(str(root))


def test_test_labels_of_classes_that_were_not_trained_on_are_refused(tmp_path):
    x = np.random.default_rng(0).integers(0, 256, (30, 9, 9), np.uint8)
    arrays = {"x_train": x, "x_test": x[:10], "y_train": np.arange(30) % 3}
    np.savez(tmp_path / "a.npz", **arrays, y_test=np.full(10, 3))
    with pytest.raises(FailureError, match="a: the test labels go to 3, those of the training images to 2"):
        vaelab.load(str(tmp_path / "a.npz"))
    np.savez(tmp_path / "a.npz", **arrays, y_test=np.full(10, 2))
    assert vaelab.load(str(tmp_path / "a.npz")).classes == ("0", "1", "2")


def test_sizes_are_given_as_the_flag_wants_them(tmp_path):
    root = album(tmp_path / "images", ["a"], each=3)
    Image.new("RGB", (17, 14)).save(root / "a" / "9.png")
    with pytest.raises(FailureError, match=r"0.png is 12x10, .*9.png is 14x17; give --image-size HEIGHT WIDTH"):
        vaelab.load(str(root))


def test_a_spread_over_extractors_is_not_called_a_standard_error():
    estimate = {"value": 0.5, "stderr": 0.1, "unit": "recall", "n": 100, "protocol": "mean and s.d. over 3 extractors"}
    assert rows_of({"recall": estimate}, 1.0)["recall"].stderr == "0.1000 s.d."
    assert rows_of({"recall": {**estimate, "protocol": "a test"}}, 1.0)["recall"].stderr == "0.1000"

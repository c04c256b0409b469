"""Runs side by side: numbers share a row only under one protocol, a mark means more than noise, and the rest is said."""

import functools
import hashlib
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vaelab import figures
from vaelab.cli import main
from vaelab.config import Run, override
from vaelab.data import load
from vaelab.measuring.measure import Plan, measure
from vaelab.progress import Bar
from vaelab.recipes import recipe
from vaelab.runs.folder import RunFolder
from vaelab.studies import comparison
from vaelab.train import fit

GREY = "digits test, grey pixels, 1 posterior sample, cross-entropy: not a likelihood"
DYNAMIC = "digits test, dynamic binarization (fixed draw), {}"
SMALL = {"data": "digits", "epochs": 1, "encoder_hidden_dims": (8,), "decoder_hidden_dims": (8,)}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A few runs that were trained, and never evaluated."""
    root = tmp_path_factory.mktemp("trained")
    changes = {
        "a": {"latent_dim": 3},
        "b": {"latent_dim": 3, "seed": 1, "beta": 0.5},
        "flat": {"latent_dim": 2},
        "dynamic": {"latent_dim": 3, "protocol": "dynamic"},
        "static": {"latent_dim": 3, "protocol": "static"},
        "density": {"latent_dim": 3, "likelihood": "gaussian"},
        "fewer": {"latent_dim": 3, "validation_size": 400},
        "other-test": {"latent_dim": 3, "test_size": 200},
    }
    for name, change in changes.items():
        fit(override(recipe("mlp"), **SMALL, **change), out=root / name)
    return root


def estimate(value, stderr=0.1, protocol=GREY, unit="nats", n=180):
    return {"value": value, "stderr": stderr, "unit": unit, "n": n, "protocol": protocol}


@functools.cache
def sha256(run: Run, protocol: str) -> dict[str, str]:
    """Of the images of each split, as a run's data are under this protocol."""
    data = load(override(run, protocol=protocol).data)
    return {split: data.sha256(split) for split in ("train", "validation", "test")}


def evaluated(run: Path, folder: Path, **splits) -> Path:
    """A copy of a run with these numbers in its ``metrics.json``: ``test_grey={"rate": estimate(...)}``."""
    copy = folder / run.name
    if not copy.exists():
        shutil.copytree(run, copy)
    config = json.loads((copy / "config.json").read_text())
    content = {"format": 3, "recipe": "mlp", "beta": config["run"]["objective"]["beta"], "data": config["data"],
               "weights_sha256": hashlib.sha256((copy / "best_model.pth").read_bytes()).hexdigest(),
               "splits": {}}  # fmt: skip
    for place, metrics in splits.items():
        split, protocol = place.split("_")
        hashes = sha256(RunFolder.open(copy).run, protocol)
        about = {"images_sha256": hashes[split], "train_sha256": hashes["train"]}
        content["splits"].setdefault(split, {})[protocol] = {"metrics": metrics, "about": about}
    (copy / "metrics.json").write_text(json.dumps(content))
    return copy


@pytest.fixture
def scored(trained, tmp_path):
    """Makes evaluated copies, and compares them."""

    def make(numbers: dict[str, dict]):
        paths = [evaluated(trained / name, tmp_path / "runs", **splits) for name, splits in numbers.items()]
        return comparison.compare(comparison.gather(paths))

    return make


def complaint(capsys) -> str:
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith("vaelab: ")]
    assert len(lines) == 1, error
    assert "Traceback" not in error
    return lines[0]


# --- which numbers share a row --------------------------------------------------------------------------------------

PROTOCOLS = [
    "digits test, grey pixels, IWAE k=100",
    "digits test (first 100 images), grey pixels, IWAE k=100",
    "digits test, grey pixels, IWAE k=100, bf16 products",
    "180 means of p(x|z), mean and s.d. over 3 extractors (38eefe9adb4a, f3091aa76b08, 10dba8dc65b0)",
    "180 means of p(x|z), mean and s.d. over 3 extractors (38eefe9adb4a, f3091aa76b08, 00000000000f)",
]


@pytest.mark.parametrize(("ours", "theirs"), list(itertools.combinations(PROTOCOLS, 2)))
def test_other_protocols_never_share_a_row(scored, ours, theirs):
    metrics = {"psnr": estimate(10.0, protocol="shared"), "frechet": estimate(5.0, protocol=ours)}
    others = {"psnr": estimate(11.0, protocol="shared"), "frechet": estimate(9.0, protocol=theirs)}
    (table,) = scored({"a": {"test_grey": metrics}, "b": {"test_grey": others}}).tables
    rows = {(row.metric, tuple(row.cells)): row for row in table.rows}
    assert set(rows) == {("psnr", ("a", "b")), ("frechet", ("a",)), ("frechet", ("b",))}
    assert rows["frechet", ("a",)].best is None, "a number alone in its row is no winner"
    (note,) = [note for note in table.notes if note.metrics == ["frechet"]]
    for mine, its in ((ours, theirs), (theirs, ours)):
        missing = [word for word in mine.split(", ") if word not in its.split(", ")]
        assert all(word in note.text for word in missing)


def test_every_number_stands_once_and_only_beside_its_like(scored):
    """The rule itself, on a random mix: a row's numbers agree in metric, protocol, unit and n, and none is lost."""
    rng = np.random.default_rng(0)
    numbers = {
        name: {
            f"test_{place}": {
                metric: estimate(float(rng.normal()), protocol=str(rng.choice(PROTOCOLS)),
                                 unit=str(rng.choice(["nats", "dB"])), n=int(rng.choice([180, 100])))
                for metric in ("psnr", "nll_10", "nll_100", "rate", "what_is_this") if rng.random() < 0.8
            }
            for place in ("grey", "dynamic")
        }
        for name in ("a", "b", "flat")
    }  # fmt: skip
    found = scored(numbers)
    seen = []
    for table in found.tables:
        for row in table.rows:
            given = [numbers[name][f"test_{table.protocol}"][row.metric] for name in row.cells]
            assert len({(e["protocol"], e["unit"], e["n"]) for e in given}) == 1
            assert [cell.value for cell in row.cells.values()] == [e["value"] for e in given]
            assert set(row.cells) <= set(table.runs)
            seen += [(name, table.protocol, row.metric) for name in row.cells]
    wanted = [
        (name, place[5:], metric) for name, places in numbers.items() for place, m in places.items() for metric in m
    ]
    assert sorted(seen) == sorted(wanted)


def test_what_a_protocol_says_of_its_run_alone_is_said_below_the_table(scored):
    places = {}
    for name, dim, note, capped in (
        ("a", 3, ": saturated", ", 12 images at or above 100 dB counted as 100 dB"),
        ("flat", 2, "", ""),
    ):
        places[name] = {"test_grey": {
            "active_units": estimate(2.0, protocol=f"{GREY}, of {dim}, Var_x E[z|x] > 0.01", unit="units"),
            "mutual_information": estimate(5.1, protocol=f"{GREY}, at most log N = 5.19{note}"),
            "psnr": estimate(20.0, protocol=f"digits test, grey pixels{capped}", unit="dB"),
        }}  # fmt: skip
    (table,) = scored(places).tables
    assert [list(row.cells) for row in table.rows] == [["a", "flat"]] * 3
    said = {note.metrics[0]: note.text for note in table.notes if note.metrics}
    assert said == {
        "active_units": "a of 3, flat of 2",
        "mutual_information": "a saturated",
        "psnr": "a 12 images at or above 100 dB counted as 100 dB",
    }


def test_objectives_of_other_betas_are_other_quantities(scored):
    """Their protocols are the same to the letter: the weight is the run's."""
    same = {"test_grey": {"negative_elbo": estimate(99.0), "objective": estimate(50.0)}}
    (table,) = scored({"a": same, "b": same}).tables
    assert [(row.metric, row.beta, list(row.cells)) for row in table.rows] == [
        ("negative_elbo", None, ["a", "b"]), ("objective", 1.0, ["a"]), ("objective", 0.5, ["b"])
    ]  # fmt: skip


def test_a_density_is_not_compared_with_a_probability(scored):
    """On the same pixels, under one protocol: their nats differ by the measure."""
    of_pixels = ("negative_elbo", "distortion", "objective", "bits_per_dim", "nll_10", "nll_ais")
    numbers = {name: estimate(99.0, protocol="p") for name in of_pixels}
    numbers |= {"psnr": estimate(15.0, protocol="p", unit="dB"), "rate": estimate(5.0, protocol="p")}
    (table,) = scored({"static": {"test_static": numbers}, "density": {"test_static": numbers}}).tables
    together = {row.metric for row in table.rows if len(row.cells) == 2}
    assert together == {"psnr", "rate"}
    assert {row.metric for row in table.rows if len(row.cells) == 1} == set(of_pixels)


def test_importance_bounds_of_other_k_are_other_bounds(scored):
    def bounds(*counts):
        return {"test_dynamic": {f"nll_{k}": estimate(90.0, protocol=DYNAMIC.format(f"IWAE k={k}")) for k in counts}}

    found = scored({"a": bounds(1, 10, 500), "b": bounds(1, 10, 100, 5000)})
    (table,) = found.tables
    assert [(row.metric, len(row.cells)) for row in table.rows] == [
        ("nll_1", 2), ("nll_10", 2), ("nll_100", 1), ("nll_500", 1), ("nll_5000", 1)
    ]  # fmt: skip
    (note,) = table.notes
    assert "k=500 (a), k=5000 (b)" in note.text


# --- which runs share a table ---------------------------------------------------------------------------------------


def test_grey_and_binary_pixels_have_tables_of_their_own(scored):
    found = scored(
        {
            "a": {"test_grey": {"negative_elbo": estimate(100.0)}},
            "dynamic": {
                "test_dynamic": {"negative_elbo": estimate(90.0, protocol=DYNAMIC.format("1 posterior sample"))}
            },
        }
    )
    assert [(table.runs, table.pixels) for table in found.tables] == [
        (["a"], "grey pixels"), (["dynamic"], "dynamic binarization")
    ]  # fmt: skip
    assert found.apart == [
        "a: digits test, grey pixels; dynamic: digits test, dynamic binarization: "
        "a cross-entropy on pixels that are not binary is no likelihood"
    ]


def test_runs_trained_on_other_pixels_meet_where_both_were_scored(scored, trained):
    """The hashes that the runs recorded are of other pixels, and differ: those of what was scored are compared."""
    numbers = {"test_dynamic": {"nll_10": estimate(90.0, protocol=DYNAMIC.format("IWAE k=10"))}}
    recorded = [json.loads((trained / name / "config.json").read_text())["data"] for name in ("a", "dynamic")]
    assert recorded[0]["test_sha256"] != recorded[1]["test_sha256"]
    (table,) = scored({"a": numbers, "dynamic": numbers}).tables
    assert table.runs == ["a", "dynamic"]
    assert table.sha256 == recorded[1]["test_sha256"]


def test_other_images_other_splits_and_other_data(scored):
    """The first thing that differs is named, against the table that has most in common."""
    numbers = {"negative_elbo": estimate(9.0, protocol="p")}
    found = scored({"a": {"test_grey": numbers, "validation_grey": numbers}, "other-test": {"test_grey": numbers}})
    assert [(table.split, table.runs) for table in found.tables] == [
        ("test", ["a"]), ("test", ["other-test"]), ("validation", ["a"])
    ]  # fmt: skip
    hashes = [table.sha256[:8] for table in found.tables]
    assert found.apart == [
        f"a and other-test: digits test, grey pixels: scored on different images: test_sha256 differ ({hashes[0]}, {hashes[1]})",
        "digits test and digits validation: different images",
    ]
    (trained_on,) = found.training_sets
    assert "Trained on different images of digits: train_sha256 differ (a: " in trained_on


def test_other_data_sets(trained, tmp_path):
    np.save(tmp_path / "mine.npy", np.random.default_rng(0).random((60, 8, 8)))
    fit(override(recipe("mlp"), **{**SMALL, "data": str(tmp_path / "mine.npy")}), out=tmp_path / "trained" / "mine")
    numbers = {"test_grey": {"negative_elbo": estimate(9.0)}}
    mine = evaluated(tmp_path / "trained" / "mine", tmp_path / "runs", **numbers)
    found = comparison.compare(comparison.gather([evaluated(trained / "a", tmp_path / "runs", **numbers), mine]))
    assert found.apart == ["a: digits; mine: mine: different data sets"]


def test_same_test_images_after_other_training_images(scored):
    """The test numbers may be compared, and it is said; a probe, fitted on the training images, may not."""
    numbers = {
        "test_grey": {"negative_elbo": estimate(9.0), "linear_probe": estimate(0.9, protocol="p", unit="accuracy")}
    }
    found = scored({"a": numbers, "fewer": numbers})
    (table,) = found.tables
    assert [(row.metric, list(row.cells)) for row in table.rows] == [
        ("negative_elbo", ["a", "fewer"]), ("linear_probe", ["a"]), ("linear_probe", ["fewer"])
    ]  # fmt: skip
    assert len(found.training_sets) == 1
    (together,) = scored({"a": numbers, "b": numbers}).tables
    assert [len(row.cells) for row in together.rows] == [2, 2]


def test_no_metric_in_common(scored):
    found = scored(
        {"a": {"test_grey": {"rate": estimate(9.0)}}, "b": {"test_grey": {"psnr": estimate(20.0, unit="dB")}}}
    )
    assert [table.runs for table in found.tables] == [["a"], ["b"]]
    assert found.apart == ["a and b: digits test, grey pixels: no number of the same protocol in common"]


# --- which number is the best ---------------------------------------------------------------------------------------


def best(scored, metric, *pairs):
    names = ("a", "b", "flat")
    numbers = {
        n: {"test_grey": {metric: estimate(v, stderr=s, protocol="p")}} for n, (v, s) in zip(names, pairs, strict=False)
    }
    (table,) = scored(numbers).tables
    return table.rows[0].best


@pytest.mark.parametrize(("gap", "winner"), [(0.99, None), (1.0, None), (1.01, "a"), (1.2, "a"), (-1.01, "b")])
def test_a_mark_needs_two_combined_standard_errors(scored, gap, winner):
    """0.3 and 0.4 combine to 0.5. A sum (2 x 0.7) would not mark a gap of 1.2, the larger alone (2 x 0.4) would 0.99."""
    assert best(scored, "negative_elbo", (100.0, 0.3), (100.0 + gap, 0.4)) == winner


def test_the_best_must_beat_every_other(scored):
    """The second is beaten clearly; the third, further off, is so uncertain that it may be as good."""
    assert best(scored, "frechet", (10.0, 0.01), (11.0, 0.01), (12.0, 0.9)) == "a"
    assert best(scored, "frechet", (10.0, 0.01), (11.0, 0.01), (12.0, 1.1)) is None


def test_which_end_is_the_better_one(scored):
    winners = {
        **dict.fromkeys(("negative_elbo", "distortion", "bits_per_dim", "nll_1", "nll_5000", "nll_ais", "frechet"), "a"),
        **dict.fromkeys(("psnr", "ssim", "precision", "recall", "linear_probe", "knn_probe"), "b"),
        **dict.fromkeys(("rate", "active_units", "mutual_information", "aggregate_kl", "two_sample_accuracy", "ess",
                         "frechet_floor", "bdmc_gap", "unheard_of")),
    }  # fmt: skip
    low, high = (
        {"test_grey": {metric: estimate(value, 0.01, protocol="p") for metric in winners}} for value in (1.0, 2.0)
    )
    (table,) = scored({"a": low, "b": high}).tables
    assert {row.metric: row.best for row in table.rows} == winners


def test_without_a_standard_error_nothing_is_marked(scored):
    assert best(scored, "negative_elbo", (1.0, None), (2.0, 0.01)) is None


# --- what is said of the runs ---------------------------------------------------------------------------------------


def test_runs_and_their_differences(scored, trained):
    numbers = {"test_grey": {"rate": estimate(9.0)}}
    found = scored({"a": numbers, "b": numbers, "flat": numbers})
    assert [(run["name"], run["recipe"], run["seed"], run["epochs"]) for run in found.runs] == [
        ("a", "mlp", 0, 1), ("b", "mlp", 1, 1), ("flat", "mlp", 0, 1)
    ]  # fmt: skip
    history = [json.loads(line) for line in (trained / "a" / "history.jsonl").read_text().splitlines()]
    assert found.runs[0]["seconds"] == pytest.approx(sum(record["seconds"] for record in history), abs=0.1)
    assert (
        found.runs[0]["parameters"] == json.loads((trained / "a" / "config.json").read_text())["resolved"]["parameters"]
    )
    assert found.settings == {"latent_dim": {"a": 3, "b": 3, "flat": 2}, "beta": {"a": 1.0, "b": 0.5, "flat": 1.0}}


def test_runs_are_named_by_as_little_of_their_paths_as_tells_them_apart(trained, tmp_path):
    numbers = {"test_grey": {"rate": estimate(9.0)}}
    paths = [evaluated(trained / "a", tmp_path / place, **numbers) for place in ("x", "y")]
    assert [run.name for run in comparison.gather(paths)] == ["x/a", "y/a"]
    assert [run.name for run in comparison.gather([paths[0], evaluated(trained / "b", tmp_path, **numbers)])] == [
        "a",
        "b",
    ]


# --- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture
def two(trained, tmp_path, monkeypatch):
    """Two comparable runs, and a folder to be in; what is printed is not folded to a width that a test runner sets."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("COLUMNS", raising=False)
    for name, value in (("a", 100.0), ("b", 103.0)):
        numbers = {"negative_elbo": estimate(value, 0.3), "rate": estimate(9.0, protocol=GREY)}
        evaluated(trained / name, tmp_path / "runs", test_grey=numbers)
    return "runs/a", "runs/b"


def test_what_is_printed(two, capsys):
    assert main(["compare", *two]) == 0
    out = capsys.readouterr().out
    lines = [line.split() for line in out.splitlines()]
    assert ["-ELBO", "(distortion", "+", "rate)", "nats", "100.00", "±", "0.30*", "103.00", "±", "0.30"] in lines
    assert ["rate,", "KL(q(z|x)", "||", "p(z))", "nats", "9.00", "±", "0.10", "9.00", "±", "0.10"] in lines
    assert ["beta", "1.0", "0.5"] in lines
    assert "digits test (180 images), grey pixels" in out
    assert "more than 2 standard errors of the difference, sqrt(s1^2 + s2^2)" in out
    assert "overstates the noise of the difference" in out
    assert "A cross-entropy on pixels that are not binary is no likelihood." in out
    assert out.splitlines()[-1] == "compare-a-b.png"
    with Image.open("compare-a-b.png") as picture:
        picture.verify()


def test_real_numbers_end_to_end(trained, tmp_path, monkeypatch, capsys):
    """What ``measure`` writes is what is shown."""
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        shutil.copytree(trained / name, tmp_path / name)
        measure(tmp_path / name, Plan(parts=("elbo",)), Bar())
    assert main(["compare", "a", "b", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [table["protocol"] for table in found["tables"]] == ["grey", "dynamic"]
    for name in ("a", "b"):
        written = json.loads((tmp_path / name / "metrics.json").read_text())["splits"]["test"]
        for table in found["tables"]:
            for row in table["rows"]:
                if name in row["cells"]:
                    kept = written[table["protocol"]]["metrics"][row["metric"]]
                    assert row["cells"][name]["value"] == kept["value"]
                    assert row["cells"][name]["stderr"] == kept["stderr"]
    grey = found["tables"][0]
    assert any("cannot go below 223.97 nats here" in note["text"] for note in grey["notes"])
    assert sum(len(row["cells"]) for row in grey["rows"]) == 3 + 4, "with beta 0.5 there is an objective besides"


def test_json_is_plain_and_draws_only_when_asked(two, capsys):
    before = set(os.listdir())

    def refuse(constant):
        raise AssertionError(constant)

    for _ in range(2):
        assert main(["compare", *two, "--json"]) == 0
        found = json.loads(capsys.readouterr().out, parse_constant=refuse)
        assert set(os.listdir()) == before
    assert found["picture"] is None
    assert found["tables"][0]["rows"][0]["best"] == "a"
    assert main(["compare", *two, "--json", "--out", "p.png"]) == 0
    assert json.loads(capsys.readouterr().out)["picture"] == "p.png"
    assert os.path.exists("p.png")


def test_a_number_without_a_standard_error(two, trained, capsys):
    evaluated(trained / "b", Path("runs"), test_grey={"negative_elbo": estimate(90.0, None)})
    assert main(["compare", *two]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("-ELBO"))
    assert line.split()[-4:] == ["100.00", "±", "0.30", "90.00"]
    assert main(["compare", *two, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tables"][0]["rows"][0]["cells"]["b"]["stderr"] is None


def test_an_existing_picture_is_not_overwritten(two, capsys):
    for name, arguments in (("compare-a-b.png", []), ("mine.png", ["--out", "mine.png"])):
        Path(name).write_text("precious")
        assert main(["compare", *two, *arguments]) == 2
        assert f"{name} exists: give another name with --out, or remove it first" in complaint(capsys)
        assert Path(name).read_text() == "precious"


@pytest.mark.parametrize(("width", "blocks"), [(100, 1), (60, 2)])
def test_five_runs_fit_a_terminal(trained, tmp_path, monkeypatch, capsys, width, blocks):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", str(width))
    paths = []
    for name in "vwxyz":
        numbers = {"negative_elbo": estimate(100.0, 0.3), "ssim": estimate(0.9, 0.0006, "p", "SSIM")}
        shutil.copytree(trained / "a", tmp_path / f"run-{name}")
        paths.append(str(evaluated(tmp_path / f"run-{name}", tmp_path, test_grey=numbers)))
    assert main(["compare", *paths, "--out", "p.png"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(len(line) <= width for line in lines)
    headers = [line.split() for line in lines if line.strip().startswith("run-") and "mlp" not in line]
    assert len(headers) >= blocks
    assert (len(headers) == 1) == (blocks == 1)
    assert list(itertools.chain(*headers)) == [f"run-{name}" for name in "vwxyz"]
    assert " ".join(lines).count("0.9000±0.0006") + " ".join(lines).count("0.9000 ± 0.0006") == 5, "no number is cut"


def test_a_very_narrow_terminal_folds_labels_and_no_numbers(two, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "44")
    assert main(["compare", *two, "--out", "p.png"]) == 0
    narrow = capsys.readouterr().out
    Path("p.png").unlink()
    monkeypatch.setenv("COLUMNS", "100")
    assert main(["compare", *two, "--out", "p.png"]) == 0
    numbers = re.compile(r"\d+\.\d+ ?± ?\d+\.\d+")
    wanted = sorted(found.replace(" ", "") for found in numbers.findall(capsys.readouterr().out))
    assert wanted
    assert sorted(found.replace(" ", "") for found in numbers.findall(narrow)) == wanted


def test_in_a_pipe_nothing_is_folded(two, monkeypatch, capsys):
    monkeypatch.delenv("COLUMNS", raising=False)
    assert main(["compare", *two]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert max(map(len, out.splitlines())) > 150, "the rule is one line"


def test_a_pipe_that_ends_early_is_no_error(two):
    command = f"unset PYTHONUNBUFFERED; set -o pipefail; {sys.executable} -m vaelab compare {' '.join(two)} | true"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")


# --- what does not work ---------------------------------------------------------------------------------------------


def damage(change):
    def apply(path: Path):
        file = path / "metrics.json"
        content = json.loads(file.read_text())
        change(content)
        file.write_text(json.dumps(content))

    return apply


def _no_value(content):
    del content["splits"]["test"]["grey"]["metrics"]["rate"]["value"]


def _train_on(path):
    weights = torch.load(path / "best_model.pth")
    torch.save({name: value + 0.01 for name, value in weights.items()}, path / "best_model.pth")


@pytest.mark.parametrize(
    ("harm", "code", "message"),
    [
        (lambda p: (p / "metrics.json").unlink(), 2, "runs/b has no metrics.json: run vaelab evaluate runs/b first"),
        (lambda p: (p / "config.json").unlink(), 2, "runs/b holds no run"),
        (lambda p: (p / "metrics.json").write_text("{"), 1, "runs/b/metrics.json cannot be read as JSON"),
        (lambda p: (p / "metrics.json").write_text("[1]"), 1, "does not hold a JSON object"),
        (damage(lambda c: c.pop("format")), 1, "is without a format"),
        (damage(lambda c: c.update(format=2)), 1, "is of format 2; vaelab"),
        (damage(lambda c: c.update(splits={})), 2, "holds no numbers: run vaelab evaluate runs/b first"),
        (damage(lambda c: c.update(splits=[1])), 1, "metrics.json is damaged"),
        (damage(lambda c: c["splits"]["test"]["grey"].pop("about")), 1, "damaged (KeyError: 'images_sha256')"),
        (damage(_no_value), 1, "metrics.json is damaged (KeyError: 'value')"),
        (
            damage(lambda c: c["splits"]["test"]["grey"]["metrics"]["rate"].update(value=float("nan"))),
            1,
            "a value of nan",
        ),
        (damage(lambda c: c["data"].update(test_sha256="0")), 1, "is of other data than config.json says"),
        (_train_on, 1, "runs/b/best_model.pth has changed since runs/b/metrics.json was written: run vaelab evaluate"),
        (lambda p: (p / "best_model.pth").unlink(), 1, "best_model.pth is missing"),
        (lambda p: (p / "history.jsonl").unlink(), 1, "history.jsonl is missing or incomplete"),
    ],
)
def test_a_run_that_cannot_be_compared_is_named(two, harm, code, message, capsys):
    harm(Path("runs/b"))
    before = set(os.listdir())
    assert main(["compare", *two]) == code
    assert message in complaint(capsys)
    assert capsys.readouterr().out == ""
    assert set(os.listdir()) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "compare takes two runs or more"),
        (["runs/a"], "compare takes two runs or more"),
        (["runs/a", "runs/a"], "runs/a is given twice"),
        (["runs/a", "./runs/../runs/a"], "are the same run"),
        (["runs/a", "nowhere"], "nowhere holds no run"),
        (["runs/a", "runs/b", "--jsno"], "no flag --jsno; did you mean '--json'?"),
    ],
)
def test_wrong_usage(two, arguments, message, capsys):
    assert main(["compare", *arguments]) == 2
    assert message in complaint(capsys)


# --- the picture ----------------------------------------------------------------------------------------------------


def measured(trained, tmp_path, *names):
    numbers = {"test_grey": {"rate": estimate(9.0)}}
    return comparison.gather([evaluated(trained / name, tmp_path, **numbers) for name in names])


def test_curves_share_axes_only_with_their_like(trained, tmp_path):
    from vaelab.cli.comparing import _curves

    runs = measured(trained, tmp_path, "a", "b", "dynamic", "static", "density", "fewer")
    panels = _curves(runs)
    assert [list(histories) for _, histories in panels] == [["a", "b"], ["dynamic"], ["static"], ["density"], ["fewer"]]
    titles = [title for title, _ in panels]
    assert len(set(titles)) == len(titles)
    assert titles[1:4] == [
        "digits, dynamic binarization",
        "digits, static binarization",
        "digits, grey pixels, as densities",
    ]
    assert titles[0].startswith("digits, grey pixels, images ")


def test_the_picture_shows_minus_elbo_and_the_same_latents(trained, tmp_path):
    runs = {run.name: run for run in measured(trained, tmp_path, "a", "b", "flat")}
    models = {name: run.model for name, run in runs.items()}
    figure = figures.comparison([("digits", {name: run.history for name, run in runs.items()})], models, side=3, seed=5)
    curves, *squares = figure.axes
    for line, run in zip(curves.get_lines(), runs.values(), strict=True):
        assert list(line.get_ydata()) == [r["validation_distortion"] + r["validation_rate"] for r in run.history]
        assert list(line.get_xdata()) == [1]
        assert line.get_label() == run.name
    z = figures.sample_prior(models["a"], 9, seed=5)
    for axes, name in zip(squares, ("a", "b"), strict=False):
        shown = np.asarray(axes.images[0].get_array())
        expected = figures.tile(figures.decode(models[name], z), 3)[..., 0]
        np.testing.assert_allclose(shown, expected, atol=1e-6)
    assert [axes.get_title() for axes in squares] == ["a (D = 3)", "b (D = 3)", "flat (D = 2)"]
    titles = [sub.get_suptitle() for sub in figure.subfigs]
    assert titles[1] == "Samples: the same z at the same place, but where the latent size D differs"
    for names, words in (
        (("a", "b"), "the same z at the same place"),
        (("a", "flat"), "each its own z, as the latent size D differs"),
    ):
        other = figures.comparison(
            [("digits", {n: runs[n].history for n in names})], {n: models[n] for n in names}, side=2
        )
        assert other.subfigs[1].get_suptitle() == f"Samples: {words}"


@pytest.mark.parametrize("count", [2, 4, 7])
def test_the_picture_has_room_for_all(trained, tmp_path, count):
    (first, *_) = measured(trained, tmp_path, "a", "b")
    models = {str(i): first.model for i in range(count)}
    figure = figures.comparison([("digits", dict.fromkeys(models, first.history))], models, side=2)
    assert sum(bool(axes.images) for axes in figure.axes) == count
    assert figure.axes[0].get_ylabel() == "-ELBO, nats per image"

"""``vaelab evaluate``: every part, kept as it goes, gone on with, and never printed without its protocol."""

import json
import shutil
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch

from vaelab.cli import main
from vaelab.data import Dataset, load, streaming
from vaelab.evaluate import Annealing, annealed, features, importance
from vaelab.measuring import extractors, measure
from vaelab.progress import Bar
from vaelab.runs.checkpoint import load_tensors
from vaelab.runs.folder import RunFolder

TRAIN = ["train", "mlp", "--data", "digits", "--epochs", "2", "--beta", "0.5", "--threads", "1"]
QUICK = ["--num-samples", "20"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    assert main([*TRAIN, "--out", str(out)]) == 0
    return out


@pytest.fixture
def run(trained, tmp_path):
    """A run of its own."""
    return shutil.copytree(trained, tmp_path / "run")


def kept(run):
    return json.loads((run / "metrics.json").read_text())["splits"]


def test_all_parts_are_there_each_with_its_protocol(run, capsys):
    assert main(["evaluate", str(run), *QUICK, "--ais", "--ais-images", "3", "--ais-steps", "5"]) == 0
    out = capsys.readouterr().out
    for word in ("-ELBO (distortion + rate)", "0.5 rate", "IWAE k=20", "active units", "Fréchet distance", "AIS",
                 "no likelihood, and cannot go below", "at most log N = 5.19", "BDMC gap"):  # fmt: skip
        assert word in out, word
    grey, dynamic = kept(run)["test"]["grey"], kept(run)["test"]["dynamic"]
    codes = {"active_units", "mutual_information", "aggregate_kl", "two_sample_accuracy", "linear_probe", "knn_probe"}
    pictures = {"mse", "psnr", "ssim", "frechet", "frechet_floor", "precision", "recall"}
    assert grey["metrics"].keys() == {"negative_elbo", "distortion", "rate", "objective"} | codes | pictures
    bounds = {"negative_elbo", "distortion", "rate", "objective", "bits_per_dim", "nll_1", "nll_10", "nll_20", "ess"}
    annealed = {"nll_ais", "ais_ess", "ais_acceptance", "ais_gain", "bdmc_lower", "bdmc_upper", "bdmc_gap"}
    assert dynamic["metrics"].keys() == bounds | annealed
    for protocol, found in (("grey pixels", grey), ("dynamic binarization", dynamic)):
        for name, estimate in found["metrics"].items():
            assert estimate["n"] > 0, name
            assert estimate["protocol"], name
            if name in ("negative_elbo", "nll_20", "active_units"):
                assert protocol in estimate["protocol"]
    assert "not a likelihood" in grey["metrics"]["negative_elbo"]["protocol"]
    assert "not a likelihood" not in dynamic["metrics"]["nll_20"]["protocol"]
    assert grey["about"]["cross_entropy_floor"] > 100
    rate = grey["metrics"]["rate"]["value"]
    assert sum(grey["per_dimension"]["rate"]) == pytest.approx(rate, abs=1e-3)
    assert len(grey["per_dimension"]["variance_of_means"]) == 20


def test_what_is_measured_adds_up_over_commands(run, capsys):
    assert main(["evaluate", str(run), "--only", "elbo", "--split", "validation"]) == 0
    assert main(["evaluate", str(run), "--only", "reconstruction"]) == 0
    assert main(["evaluate", str(run), "--only", "elbo", "--protocol", "threshold", "--json"]) == 0
    splits = kept(run)
    assert splits.keys() == {"validation", "test"}
    assert splits["validation"].keys() == {"grey", "dynamic"}
    assert splits["test"].keys() == {"grey", "threshold"}
    assert splits["test"]["grey"]["metrics"].keys() == {"mse", "psnr", "ssim"}
    printed = capsys.readouterr().out
    assert json.loads(printed[printed.index('{\n  "format"') :])["splits"] == splits


def test_a_floor_goes_where_pixels_are_binary_by_now(run):
    """Those of bytes of 0 and 255 were not taken for binary once."""
    command = ["evaluate", str(run), "--only", "elbo", "--protocol", "static"]
    assert main(command) == 0
    content = json.loads((run / "metrics.json").read_text())
    content["splits"]["test"]["static"]["about"]["cross_entropy_floor"] = 0.0
    (run / "metrics.json").write_text(json.dumps(content))
    assert main(command) == 0
    assert (
        "cross_entropy_floor" not in json.loads((run / "metrics.json").read_text())["splits"]["test"]["static"]["about"]
    )


def test_other_weights_are_another_model(run):
    assert main(["evaluate", str(run), "--only", "elbo", "--split", "validation"]) == 0
    weights = torch.load(run / "best_model.pth")
    torch.save({name: value + 1e-3 for name, value in weights.items()}, run / "best_model.pth")
    assert main(["evaluate", str(run), *QUICK, "--only", "nll", "--rows", "3"]) == 0
    assert kept(run).keys() == {"test"}, "numbers of other weights are gone"


def plan(**options):
    return measure.Plan(parts=("nll",), num_samples=10, protocols=("dynamic",), threads=1, **options)


def test_an_interrupted_measurement_goes_on_where_it_was(run, monkeypatch):
    whole = measure.measure(run, plan(rows=12), Bar())["splits"]["test"]["dynamic"]["metrics"]
    (run / "evaluation.pt").unlink()
    monkeypatch.setattr(importance, "_CPU_DECODES", 20)  # two images at a time
    original, scored = Dataset.scored, []

    def score(self, split, rows):
        scored.append(rows.start)
        if scored.count(6) == 1 and rows.start == 6 and len(scored) > 4:
            raise KeyboardInterrupt
        return original(self, split, rows)

    monkeypatch.setattr(Dataset, "scored", score)
    with pytest.raises(KeyboardInterrupt):
        measure.measure(run, plan(rows=12), Bar())
    values = next(iter(load_tensors(run / "evaluation.pt")["values"].values()))
    assert len(values["k=10"]) == 6, "what was scored was kept"
    scored.clear()
    again = measure.measure(run, plan(rows=12), Bar())["splits"]["test"]["dynamic"]["metrics"]
    assert again["nll_10"]["value"] == pytest.approx(whole["nll_10"]["value"], rel=1e-6)
    assert [start for start in scored if start >= 4] == [6, 8, 10], "and was not scored again"
    scored.clear()
    measure.measure(run, plan(rows=12), Bar())
    assert scored == [], "nor was it timed"
    assert threading.active_count() < 10


def test_the_gap_of_annealing_is_kept_too(run, monkeypatch):
    plan = measure.Plan(parts=("ais",), protocols=("dynamic",), ais_images=5, annealing=Annealing(2, 3), threads=1)
    first = measure.measure(run, plan, Bar())["splits"]["test"]["dynamic"]["metrics"]
    for name in ("ais_rows", "bdmc_rows"):
        monkeypatch.setattr(annealed, name, lambda *_, **__: pytest.fail("it is done again"))
    again = measure.measure(run, plan, Bar())["splits"]["test"]["dynamic"]["metrics"]
    assert again == first
    assert first["bdmc_gap"]["n"] == 5


def test_only_long_work_is_compiled_and_only_where_there_is_a_compiler(run, monkeypatch):
    compiled = []
    original = importance.importance_rows

    def importance_rows(*args, compiling=False, **options):  # records, and leaves the compiler alone
        compiled.append(compiling)
        return original(*args, **options)

    monkeypatch.setattr(importance, "importance_rows", importance_rows)
    monkeypatch.setitem(measure.SECONDS, "nll", lambda subject: 0.0)
    monkeypatch.setattr(measure, "can_compile", lambda device: True)
    for rows, worth in ((5, 51), (6, 60), (7, 70)):
        monkeypatch.setattr(measure, "WORTH_COMPILING", worth)
        measure.measure(run, plan(rows=rows), Bar())
    monkeypatch.setattr(measure, "can_compile", lambda device: False)
    measure.measure(run, plan(rows=8), Bar())
    assert compiled == [False, True, True, False]


def test_the_images_that_were_scored_are_on_record(run):
    measure.measure(run, measure.Plan(parts=("elbo",), protocols=("grey", "threshold"), threads=1), Bar())
    for protocol in ("grey", "threshold"):
        data, about = load("digits", protocol=protocol), kept(run)["test"][protocol]["about"]
        assert (about["images_sha256"], about["train_sha256"]) == (data.sha256("test"), data.sha256("train"))


def test_more_rows_extend_what_is_kept(run):
    measure.measure(run, plan(rows=5), Bar())
    few = measure.measure(run, plan(rows=3), Bar())["splits"]["test"]["dynamic"]["metrics"]["nll_10"]
    more = measure.measure(run, plan(rows=9), Bar())["splits"]["test"]["dynamic"]["metrics"]["nll_10"]
    assert (few["n"], more["n"]) == (3, 9)
    assert "first 3 images" in few["protocol"]


def test_how_long_it_takes_is_said_before_it_starts(run, monkeypatch, capsys):
    monkeypatch.setitem(measure.SECONDS, "nll", lambda subject: 900.0)
    assert main(["evaluate", str(run), *QUICK, "--only", "nll"]) == 0
    assert "importance sampling, 180 images x 20 samples (dynamic): about 15 min" in capsys.readouterr().err


@pytest.mark.parametrize("threads", [1, 2])
def test_the_estimate_of_time_is_of_what_is_left_by_all_workers(run, monkeypatch, threads):
    clock = iter(np.arange(0.0, 1000.0, 2.0))
    monkeypatch.setattr(measure.time, "perf_counter", lambda: next(clock))
    original, timed = importance.importance_rows, []

    def importance_rows(*args, **options):
        timed.append((options["workers"], torch.get_num_threads()))
        return original(*args, **options)

    monkeypatch.setattr(importance, "importance_rows", importance_rows)
    estimated, seconds = [], measure._nll_seconds
    monkeypatch.setitem(measure.SECONDS, "nll", lambda subject: estimated.append(seconds(subject)) or 0.0)
    for rows in (100, 110, 110):
        measure.measure(run, replace(plan(rows=rows), threads=threads), Bar())
    assert estimated == [2.0 / 4 * left / threads for left in (100, 10, 0)], "two seconds for four images"
    assert timed == [(1, 1), (threads, threads)] * 2, "one worker is timed, on a thread of its own"


@pytest.mark.parametrize("threads", [1, 2])
def test_the_estimate_of_annealing_counts_what_comes_before_the_first_step_once(run, monkeypatch, threads):
    """Ten seconds to begin and one a step: not the thirty of a short run scaled up."""
    steps, now = [], [0.0]

    def anneal(*_, how, workers, **__):
        assert workers == torch.get_num_threads() == 1
        steps.append(how.num_distributions)
        now[0] += 10.0 + how.num_distributions
        return []

    monkeypatch.setattr(annealed, "ais_rows", anneal)
    monkeypatch.setattr(measure.time, "perf_counter", lambda: now[0])
    estimated = []
    original = measure._ais_seconds
    monkeypatch.setitem(measure.SECONDS, "ais", lambda subject: estimated.append(original(subject)) or 0.0)
    monkeypatch.setitem(measure.MEASURES, "ais", lambda subject: {"metrics": {}})
    plan = measure.Plan(parts=("ais",), protocols=("dynamic",), ais_images=16, annealing=Annealing(2, 100),
                        threads=threads)  # fmt: skip
    measure.measure(run, plan, Bar())
    assert len(set(steps)) == 2
    assert estimated == [pytest.approx((10 + 100) * 3 / threads)], "16 images, and as many simulated, there and back"


def test_a_test_set_of_one_image_and_labels_of_one_class(tmp_path, capsys):
    rng = np.random.default_rng(0)
    x = (rng.random((120, 1, 12, 12)) < 0.3).astype(np.float32)
    np.savez(tmp_path / "few.npz", x=x, y=np.zeros(120, np.int64))
    out = str(tmp_path / "run")
    flags = ["--data", str(tmp_path / "few.npz"), "--test-size", "1", "--epochs", "1", "--threads", "1"]
    assert main(["train", "mlp", *flags, "--out", out]) == 0
    capsys.readouterr()
    assert main(["evaluate", out, *QUICK]) == 0
    found = json.loads((tmp_path / "run" / "metrics.json").read_text())["splits"]["test"]["grey"]
    assert found["metrics"]["nll_20"]["stderr"] is None
    assert {"active_units", "mutual_information", "aggregate_kl", "mse"} <= found["metrics"].keys()
    assert len(found["per_dimension"]["mean"]) == 20
    assert found["per_dimension"]["variance"] is None
    printed = capsys.readouterr()
    assert "No two-sample test: a two-sample test of 1 codes tells nothing" in printed.out
    assert "No probes: a probe needs 5 codes and 2 classes to be fitted on: got 107, 1." in printed.out
    assert "samples is left out: the training images of few are all of one class" in printed.err


def test_labels_of_the_training_images_alone(tmp_path, capsys):
    x = np.random.default_rng(0).random((60, 1, 12, 12)).astype(np.float32)
    np.savez(tmp_path / "half.npz", x_train=x[:40], y_train=np.arange(40) % 2, x_test=x[40:])
    out, data = str(tmp_path / "run"), str(tmp_path / "half.npz")
    assert main(["train", "mlp", "--data", data, "--epochs", "1", "--threads", "1", "--out", out]) == 0
    assert main(["evaluate", out, "--only", "latents"]) == 0
    assert "No probes: a probe is undefined here: the data have no labels." in capsys.readouterr().out


def test_images_that_stay_on_disk_are_scored_as_they_are(tmp_path, monkeypatch, capsys):
    """Where a likelihood would need them binarized, it is left out; or refused, where it was asked for alone."""
    monkeypatch.setattr(streaming, "STREAMED", 1)
    np.save(tmp_path / "grey.npy", np.random.default_rng(0).integers(0, 256, (60, 12, 12), np.uint8))
    out, data = str(tmp_path / "run"), str(tmp_path / "grey.npy")
    assert main(["train", "mlp", "--data", data, "--epochs", "1", "--threads", "1", "--out", out]) == 0
    capsys.readouterr()
    assert main(["evaluate", out, *QUICK]) == 0
    assert kept(tmp_path / "run")["test"].keys() == {"grey"}
    reasons = {"nll": "these pixels are not binary", "samples": "grey has no labels"}
    said = capsys.readouterr().err
    assert all(f"{part} is left out: {reason}" in said for part, reason in reasons.items())
    for part, reason in reasons.items():
        assert main(["evaluate", out, "--only", part]) == 2
        assert f"no {part} of this model: {reason}" in capsys.readouterr().err


def test_a_damaged_checkpoint_and_a_run_of_another_version_are_one_line_and_lose_nothing(run, capsys):
    assert main(["evaluate", str(run), "--only", "elbo"]) == 0
    before = (run / "metrics.json").read_bytes()
    weights = (run / "best_model.pth").read_bytes()
    (run / "best_model.pth").write_bytes(weights[:1000])
    assert main(["evaluate", str(run), "--only", "elbo"]) == 1
    assert "best_model.pth is damaged" in capsys.readouterr().err.splitlines()[-1]
    (run / "best_model.pth").write_bytes(weights)
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**config, "format": 99}))
    assert main(["evaluate", str(run), "--only", "elbo"]) == 1
    assert "was written in format 99" in capsys.readouterr().err.splitlines()[-1]
    assert (run / "metrics.json").read_bytes() == before


def test_a_posterior_of_nan_is_one_line(run, capsys):
    weights = torch.load(run / "best_model.pth")
    weights["posterior_head.loc_and_log_scale.bias"][:] = float("nan")
    torch.save(weights, run / "best_model.pth")
    assert main(["evaluate", str(run), "--only", "elbo", "--json"]) == 1
    shown = capsys.readouterr()
    assert "holds values in posterior_head.loc_and_log_scale.bias that are not finite" in shown.err.splitlines()[-1]
    assert not shown.out
    assert main(["sample", str(run)]) == 1
    assert not (run / "metrics.json").exists()


def test_extractors_are_trained_once(digits, tmp_path, monkeypatch):
    first = extractors.extractors_for(digits, Bar(), tmp_path)
    monkeypatch.setattr(extractors, "train_extractor", None)
    again = extractors.extractors_for(digits, Bar(), tmp_path)
    assert [features.weights_hash(e) for e in first] == [features.weights_hash(e) for e in again]
    assert len({features.weights_hash(e) for e in first}) == 3


def test_other_labels_of_the_same_images_have_extractors_of_their_own(run):
    data = load("digits")
    odd = replace(data, train=replace(data.train, y=data.train.y % 2))
    by_digit, by_parity = (extractors.extractors_for(each, Bar())[0] for each in (data, odd))
    assert (by_digit.classify.out_features, by_parity.classify.out_features) == (10, 2)


def of(run, plan):
    return measure.measure(run, plan, Bar())["splits"]["test"]["dynamic"]["metrics"]


def test_what_is_kept_is_of_these_weights(run):
    first = of(run, plan(rows=3))
    weights = torch.load(run / "best_model.pth")
    torch.save({name: value + 1e-3 for name, value in weights.items()}, run / "best_model.pth")
    assert of(run, plan(rows=3))["nll_10"]["value"] != first["nll_10"]["value"]


def test_the_gain_of_annealing_is_what_the_bounds_differ_by(run):
    found = of(run, replace(plan(rows=4), parts=("nll", "ais"), ais_images=4, annealing=Annealing(2, 3)))
    difference = found["nll_10"]["value"] - found["nll_ais"]["value"]
    assert found["ais_gain"]["value"] == pytest.approx(difference, rel=1e-3, abs=1e-3)
    assert "2 chains x 3 distributions" in found["ais_gain"]["protocol"]
    alone = of(run, replace(plan(), parts=("ais",), num_samples=7, ais_images=4, annealing=Annealing(1, 2)))
    assert alone["nll_ais"] != found["nll_ais"]
    assert "ais_gain" not in alone, "it would be that of the annealing before"


@pytest.mark.parametrize(
    "other", [Annealing(3, 3), Annealing(2, 4), Annealing(2, 3, start="prior"), Annealing(2, 3, num_leapfrog=1)]
)
def test_annealing_in_another_way_is_done_anew(run, other):
    one, another = (
        of(run, replace(plan(), parts=("ais",), ais_images=2, annealing=how)) for how in (Annealing(2, 3), other)
    )
    assert one["nll_ais"]["value"] != another["nll_ais"]["value"]
    assert one["bdmc_gap"]["value"] != another["bdmc_gap"]["value"]


def test_a_run_is_measured_by_one_process_at_a_time(run, capsys):
    """Each writes the whole of metrics.json and evaluation.pt: what the other has found meanwhile would be lost."""
    command = ["evaluate", str(run), "--only", "elbo"]
    with RunFolder.open(run).measured():
        assert main(command) == 2
        assert "another process measures" in capsys.readouterr().err.splitlines()[-1]
        assert not (run / "metrics.json").exists()
    assert main(command) == 0
    with RunFolder.open(run).measured(), RunFolder.open(run).held():  # a run that trains can be measured
        pass

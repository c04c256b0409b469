"""Choosing the latent size: the rule gives known answers, the grid loses nothing, and what is wrong is said in a line."""

import contextlib
import io
import json
import os
import re
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from vaelab.cli import main
from vaelab.config import override
from vaelab.errors import UsageError
from vaelab.figures import tuning as picture
from vaelab.measuring.kept import Kept, importance_key
from vaelab.recipes import recipe
from vaelab.runs.folder import RunFolder
from vaelab.runtime import has_fast_bf16
from vaelab.studies.grid import Grid, Point, _is_trained, _slack, cross
from vaelab.studies.recommend import Setting, gap, recommend, seed_spread
from vaelab.studies.tuning import plan
from vaelab.train import fit

N = 400
DIFFICULTY = np.random.default_rng(0).normal(0, 20, N)  # some images are hard for every model


def setting(latent_dim, nll, *, beta=1.0, noise=0.0, active=None, paired=True, **more):
    """A setting whose images differ as MNIST's do, whatever the model; ``noise``: s.d. of what is its own."""
    own = np.random.default_rng(latent_dim).normal(0, 1, N)
    own = noise * (own - own.mean()) / own.std()
    images = nll + DIFFICULTY - DIFFICULTY.mean() + own
    means = {"active_units": float(latent_dim if active is None else active)}
    stderr = float(images.std(ddof=1) / np.sqrt(N))
    return Setting(latent_dim, beta, more.pop("seeds", 1), nll, stderr, images if paired else None, means=means, **more)


def advice(*settings):
    result = recommend(settings)
    return result.chosen.latent_dim, "\n".join(result.reasons)


# --- the rule -------------------------------------------------------------------------------------------------------


class TestRule:
    def test_the_smallest_size_within_two_standard_errors(self):
        """Own noise of s.d. 2 over 400 images: a difference has a standard error of 2 sqrt(2 / 400) = 0.14, or so."""
        sizes = {2: 100.0, 4: 95.5, 8: 95.2, 16: 95.0, 32: 95.1}
        settings = [setting(d, nll, noise=2.0) for d, nll in sizes.items()]
        result = recommend(settings)
        assert [0.12 < a.stderr < 0.16 for a in result.above] == [True, True, True, False, True]
        assert (result.best.latent_dim, result.chosen.latent_dim) == (16, 8)
        assert "--latent-dim 8 --beta 1: the smallest size within 2 standard errors" in result.reasons[0]
        assert any("size 4 lies 0.50 ± 0.1" in reason for reason in result.reasons)

    def test_unpaired_standard_errors_would_choose_wrongly(self):
        """Images vary by 20 nats, so 1 nat is nothing to two independent means (s.e. 1.4), and all to a paired test."""
        sizes = {2: 97.0, 4: 95.0}
        paired, unpaired = (
            advice(*[setting(d, nll, noise=1.0, paired=paired) for d, nll in sizes.items()]) for paired in (True, False)
        )
        assert (paired[0], unpaired[0]) == (4, 2)
        assert "unpaired" in unpaired[1]
        assert "unpaired" not in paired[1]

    def test_the_best_at_the_edge_of_the_grid(self):
        assert advice(setting(2, 100.0), setting(4, 96.0), setting(8, 94.0))[0] == 8
        assert "try larger ones, --latent-dims 16" in advice(setting(2, 100.0), setting(4, 96.0), setting(8, 94.0))[1]
        assert "try smaller ones, --latent-dims 2" in advice(setting(4, 94.0), setting(8, 96.0))[1]
        inside = advice(setting(2, 100.0), setting(4, 94.0), setting(8, 96.0))[1]
        assert "try larger" not in inside
        assert "try smaller" not in inside
        size, said = advice(setting(2, 99.0, noise=2.0), setting(4, 94.1, noise=2.0), setting(8, 94.0, noise=2.0))
        assert size == 4
        assert "gained beyond size 4 is within the noise" in said

    def test_ties_go_to_the_smaller_size_and_the_beta_nearest_to_one(self):
        assert advice(setting(8, 95.0), setting(4, 95.0), setting(2, 99.0))[0] == 4
        betas = [setting(4, 95.0, beta=beta) for beta in (4.0, 0.25, 1.0, 0.0)]
        assert recommend(betas).chosen.beta == 1.0
        assert recommend([b for b in betas if b.beta != 1.0] + [setting(4, 95.0, beta=2.0)]).chosen.beta == 2.0

    def test_a_better_beta_is_taken_and_its_edge_named(self):
        result = recommend([setting(4, 95.0, beta=1.0), setting(4, 93.0, beta=0.5), setting(4, 97.0, beta=2.0)])
        assert result.chosen.beta == 0.5
        assert any("0.5, is the smallest that was tried" in reason for reason in result.reasons)

    def test_too_large_is_cheap_only_if_the_numbers_show_it(self):
        small = setting(8, 95.0, noise=2.0)
        assert "Too large is cheap: of 64 dimensions 12" in advice(small, setting(64, 95.1, noise=2.0, active=12))[1]
        assert "Too large is not free: size 64 lies 1.00" in advice(small, setting(64, 96.0, noise=2.0, active=12))[1]
        assert "Too large" not in advice(small, setting(64, 95.1, noise=2.0, active=64))[1]

    def test_seeds_widen_the_standard_error_and_warn(self):
        def pair(spread, seeds):
            return [setting(2, 95.5, spread=spread, seeds=seeds), setting(4, 95.0, spread=spread, seeds=seeds)]

        assert seed_spread([*pair(3.0, 2), setting(8, 90.0)]) == 3.0
        two = pair(1.0, 2)
        assert gap(*two, seed_sd=1.0).stderr == pytest.approx(1.0)
        assert advice(*two)[0] == 2
        assert "seeds alone differ by 1.00 nats (s.d.), more than the 0.50 between size 4 and size 2" in advice(*two)[1]
        size, said = advice(*pair(0.1, 2))
        assert size == 4
        assert "Warning" not in said
        assert "One seed each" in advice(setting(2, 95.5), setting(4, 95.0))[1]

    def test_pooled_spread_weighs_by_degrees_of_freedom(self):
        settings = [setting(2, 1.0, spread=1.0, seeds=2), setting(4, 1.0, spread=2.0, seeds=4)]
        assert seed_spread(settings) == pytest.approx(np.sqrt((1 * 1 + 3 * 4) / 4))

    def test_a_bound_that_is_loose_for_large_sizes_warns(self):
        loose = advice(setting(2, 95.0, noise=1.0), setting(64, 95.5, noise=1.0, slack=1.2))[1]
        assert "the bound of size 64 would fall by some 1.2 nats more" in loose
        assert "Warning" not in advice(setting(2, 95.0), setting(64, 95.5, slack=0.2))[1]

    def test_a_beta_is_recommended_where_there_is_one(self):
        settings = [setting(d, nll, has_beta=False) for d, nll in ((2, 99.0), (4, 95.0))]
        assert "Recommended: --latent-dim 4: the lowest" in advice(*settings)[1]

    def test_one_setting(self):
        assert "nothing to compare" in advice(setting(4, 95.0))[1]


# --- the picture ----------------------------------------------------------------------------------------------------


def test_the_picture_shows_the_numbers():
    rows = [
        {"latent_dim": d, "beta": b, "nll": 90.0 + d, "above": d - 2.0, "above_stderr": 0.5, "distortion": 80.0 - d + b, "rate": d / b,
         "active_units": d / 2}
        for d in (2, 8) for b in (0.5, 1.0, 4.0)
    ]  # fmt: skip
    figure = picture(rows, chosen=(8, 1.0), title="t")
    plane, likelihood, active = figure.axes
    size_2, size_8 = (line for line in plane.get_lines() if line.get_label() in ("2", "8"))
    assert list(size_8.get_xdata()) == [16.0, 8.0, 2.0], "along its betas"
    assert list(size_2.get_ydata()) == [78.5, 79.0, 82.0]
    at = {text.xy: text.get_text() for text in plane.texts if "beta" in text.get_text()}
    wanted = {(r["rate"], r["distortion"]): rf"$\beta$ {r['beta']:g}" for r in rows}
    assert at.items() <= wanted.items()
    assert wanted.keys() - at.keys() == {(2.0, 79.0)}, "where two would lie on one another, one is left out"
    grey = [line for line in plane.get_lines() if line.get_label().startswith("_")]
    assert len(grey) >= 3
    for line in grey:  # on a diagonal the sum is one round number, which stands at it
        totals = np.asarray(line.get_xdata()) + np.asarray(line.get_ydata())
        assert totals[0] == pytest.approx(totals[1])
        assert f"{totals[0]:g}" in {text.get_text() for text in plane.texts}
    assert [list(bar.get_segments()[0][:, 1]) for bar in likelihood.collections] == [[-1.0, 1.0]] * 3
    assert "92.00" in likelihood.get_title()
    for axes, x, y in ((plane, 8.0, 73.0), (likelihood, 8, 6.0), (active, 8, 4.0)):
        (ring,) = [line for line in axes.get_lines() if line.get_label() == "recommended"]
        assert (ring.get_xdata()[0], ring.get_ydata()[0]) == (x, y)


# --- the grid -------------------------------------------------------------------------------------------------------

EPOCHS = 24  # enough that Ctrl-C after the first comes before the last
COMMAND = ["tune-latent", "digits", "--epochs", str(EPOCHS), "--num-samples", "20", "--jobs", "1"]


def test_names_of_runs_are_exact():
    assert [p.name for p in cross([16, 4, 4], [1.0, 0.5], 2)][:5] == [
        "d04-b0.5-s0", "d04-b1-s0", "d16-b0.5-s0", "d16-b1-s0", "d04-b0.5-s1",
    ]  # fmt: skip
    assert Point(0, 2, 0.1234567).name != Point(0, 2, 0.1234568).name


def state(out) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}


def called(arguments: list[str]) -> tuple[int, str, str]:
    """Exit code, output and errors of a command."""
    out, error = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        code = main(arguments)
    return code, out.getvalue(), error.getvalue()


def interrupt_once(exists: Path) -> None:
    """Press Ctrl-C as soon as this file is there."""

    def wait():
        while not exists.exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=wait, daemon=True).start()


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """A grid that is interrupted in its second run, then extended by one that fails; with what was said meanwhile."""
    out = tmp_path_factory.mktemp("tune") / "digits"
    interrupt_once(out / "d04-b1-s0" / "history.jsonl")
    interrupted = called([*COMMAND, "--latent-dims", "2", "4", "--out", str(out)])
    first = state(out)
    (out / "d03-b1-s0").mkdir()
    (out / "d03-b1-s0" / "thesis.txt").write_text("precious")
    again = called([*COMMAND, "--latent-dims", "3", "4", "--out", str(out)])
    return {"out": out, "interrupted": interrupted, "first": first, "again": again}


def test_an_interruption_says_in_one_line_how_to_go_on(tuned):
    code, stdout, stderr = tuned["interrupted"]
    assert code == 130
    assert stdout == ""
    lines = stderr.splitlines()
    assert lines[0].startswith("2 runs to train and measure, 1 at a time")
    assert re.match(r"d02-b1-s0: -log p\(x\) \d+\.\d\d ± \d+\.\d\d nats", lines[1])
    assert re.match(r"it took \d+ (s|min); 1 more: about \d+ (s|min)", lines[2])
    assert lines[-1].startswith("vaelab: interrupted, 1 of 2 runs are left to finish")
    assert lines[-1].endswith("give the same command again")
    assert "\x1b" not in stderr
    assert "Traceback" not in stderr


def test_a_failing_run_is_named_and_the_others_go_on(tuned):
    (code, _, stderr), out = tuned["again"], tuned["out"]
    assert code == 1
    log = out / "d03-b1-s0.log"
    (line,) = [line for line in stderr.splitlines() if line.startswith("d03-b1-s0 failed")]
    assert f"{out}/d03-b1-s0 is not empty and holds no run of vaelab" in line
    assert line.endswith(f"(exit code 2; log: {log})")
    assert stderr.splitlines()[-1].startswith("vaelab: 1 run failed: d03-b1-s0; all others are kept")
    assert "Traceback" not in stderr + log.read_text()
    assert (out / "d03-b1-s0" / "thesis.txt").read_text() == "precious"
    content = json.loads((out / "tuning.json").read_text())
    assert [row["latent_dim"] for row in content["settings"]] == [2, 4], "the first grid's and this one's"
    assert list(content["failures"]) == ["d03-b1-s0"]


def test_what_is_finished_is_not_done_again(tuned):
    out = tuned["out"]
    logs = {d: (out / f"d0{d}-b1-s0.log").read_text() for d in (2, 4)}
    assert logs[2].count("$ vaelab train") == logs[2].count("$ vaelab evaluate") == 1
    assert "interrupted" in logs[4]
    assert re.findall(r"\$ vaelab train mlp .*(?=\n)", logs[4])[1].endswith("--threads 1 --resume")
    assert "resumed at step" in logs[4]
    before, after = tuned["first"], state(out)
    assert {k: v for k, v in after.items() if "d02-b1" in k} == {k: v for k, v in before.items() if "d02-b1" in k}
    assert len(RunFolder.open(out / "d04-b1-s0").history()) == EPOCHS


def test_the_result_is_what_the_runs_measured(tuned):
    out, printed = tuned["out"], tuned["again"][1]
    content = json.loads((out / "tuning.json").read_text())
    precision = ", bf16 products" if has_fast_bf16(torch.device("cpu")) else ""
    assert content["protocol"] == f"digits validation, dynamic binarization (fixed draw), IWAE k=20{precision}"
    for row in content["settings"]:
        run = out / f"d0{row['latent_dim']}-b1-s0"
        metrics = json.loads((run / "metrics.json").read_text())["splits"]["validation"]["dynamic"]["metrics"]
        assert row["nll"] == pytest.approx(metrics["nll_20"]["value"])
        assert row["stderr"] == pytest.approx(metrics["nll_20"]["stderr"])
        assert row["seconds"] == pytest.approx(sum(r["seconds"] for r in RunFolder.open(run).history()))
        assert row["slack"] == pytest.approx(metrics["nll_10"]["value"] - metrics["nll_20"]["value"])
        for name in ("negative_elbo", "distortion", "rate", "active_units", "mutual_information"):
            assert row[name] == metrics[name]["value"]
        assert f"{row['nll']:.2f} ±{row['stderr']:.2f}" in printed
    assert content["recommendation"]["reasons"][0] in printed
    assert f"--latent-dim {content['recommendation']['latent_dim']} --beta 1" in printed
    assert (out / "tuning.png").read_bytes().startswith(b"\x89PNG")


def test_differences_are_paired(tuned):
    """The values of single images are those that the reported means are of, and their difference varies far less."""
    base, _ = plan("mlp", "digits", epochs=EPOCHS)
    grid = Grid(base, cross([2, 4], [1.0], 1), tuned["out"], 20)
    (a, b), _ = grid.settings(grid.wanted)
    for s in (a, b):
        assert s.images.mean() == pytest.approx(s.nll)
        assert len(s.images) == 180
    paired = gap(a, b, np.nan)
    assert paired.value == pytest.approx(a.nll - b.nll)
    assert 0 < paired.stderr < 0.6 * np.hypot(a.stderr, b.stderr)


def test_what_a_bound_would_still_fall_is_what_is_left_of_one_over_k():
    """90 + 8 / k: 0.2 above its limit at the last k, whatever other numbers there are: also of more samples."""
    bounds = {f"nll_{k}": {"value": 90 + 8 / k} for k in (5, 1, 40, 10)} | {"nll_ais": {"value": 80.0}}
    assert _slack(bounds, 40) == pytest.approx(8 / 40)
    assert _slack(bounds | {"nll_100": {"value": 90.0}}, 40) == pytest.approx(8 / 40)
    assert _slack({"nll_10": {"value": 3.0}, "nll_20": {"value": 2.5}}, 20) == pytest.approx(0.5)
    assert _slack({"nll_1": {"value": 3.0}}, 1) == 0.0


def write_run(grid, point, images, *, kept=None, bf16=False, seconds=3.0, codes=None):
    """The files of a run that was measured, with -log p(x) of each image; ``kept``: other values beside the mean."""
    path = grid.path(point)
    path.mkdir(parents=True)
    (path / "best_model.pth").write_bytes(point.name.encode())
    weights = RunFolder(path).weights_sha256()
    images = np.asarray(images, float)
    values = {"negative_elbo": images.mean() + 2, "distortion": 70.0, "rate": 20.0, "nll_10": images.mean() + 1,
              "nll_20": images.mean()}  # fmt: skip
    found = {
        name: {"value": value, "stderr": images.std(ddof=1) / len(images) ** 0.5, "n": len(images), "protocol": "p"}
        for name, value in values.items()
    }
    if codes is not None:
        found["mutual_information"] = {"value": 5.0, "n": codes}
    splits = {"validation": {"dynamic": {"metrics": found, "per_dimension": {}}}}
    content = {
        "weights_sha256": weights,
        "data": {"validation_sha256": "of the images", "validation": len(images)},
        "splits": splits,
    }
    (path / "metrics.json").write_text(json.dumps(content))
    (path / "history.jsonl").write_text(f'{{"seconds": {seconds}}}\n' * 2)
    key = importance_key("validation", "dynamic", "of the images", 20, bf16=bf16)
    Kept(path / "evaluation.pt", weights).put(key, {"k=20": -np.asarray(images if kept is None else kept, float)})


def one_setting(tmp_path, *seeds):
    grid = Grid(plan("mlp", "digits", epochs=1)[0], cross([4], [1.0], len(seeds)), tmp_path / "grid", 20)
    for point, seed in zip(grid.wanted, seeds, strict=True):
        write_run(grid, point, **seed)
    (found,), protocol = grid.settings(grid.wanted)
    assert protocol == "p"
    return found


@pytest.mark.parametrize("bf16", [False, True])
def test_a_setting_is_the_mean_over_its_seeds_and_their_spread(tmp_path, bf16):
    seeds = [90.0, 94, 98, 94], [91, 97, 97, 95], [90, 91, 95, 92]
    found = one_setting(tmp_path, *[{"images": images, "bf16": bf16, "seconds": i} for i, images in enumerate(seeds)])
    assert (found.latent_dim, found.beta, found.seeds, found.has_beta) == (4, 1.0, 3, True)
    assert found.nll == pytest.approx((94 + 95 + 92) / 3)
    assert found.spread == pytest.approx(np.std([94, 95, 92], ddof=1))
    by_image = np.array([271, 282, 290, 281]) / 3
    np.testing.assert_allclose(found.images, by_image)
    assert found.stderr == pytest.approx(by_image.std(ddof=1) / 2)
    assert found.slack == pytest.approx(1.0)
    assert found.means["negative_elbo"] == pytest.approx(found.nll + 2)
    assert found.means["seconds"] == pytest.approx(2.0), "two epochs of 0, 1 and 2"
    assert "mutual_information" not in found.means


def test_one_seed_has_no_spread(tmp_path):
    assert np.isnan(one_setting(tmp_path, {"images": [90.0, 94, 98]}).spread)


def test_an_information_is_of_as_many_codes_as_the_fewest(tmp_path):
    """Which bound it: log of their number."""
    found = one_setting(tmp_path, *[{"images": [90.0, 94, 98], "codes": codes} for codes in (200, 10_000)])
    assert (found.codes, found.means["mutual_information"]) == (200, 5.0)


@pytest.mark.parametrize("kept", [[92.0, 94, 96.1], [92.0, 94], [-92.0, -94, -96]])
def test_values_of_other_images_than_those_that_were_reported_are_not_paired(tmp_path, kept):
    """Nor are those of the other seeds, which alone would be another mean."""
    found = one_setting(tmp_path, {"images": [90.0, 94, 98]}, {"images": [92.0, 94, 96], "kept": kept})
    assert found.images is None
    assert found.stderr == pytest.approx((4 + 2) / 2 / 3**0.5)
    assert found.nll == 94


def test_of_more_values_than_were_reported_the_first_are_paired(tmp_path):
    found = one_setting(tmp_path, {"images": [90.0, 94, 98], "kept": [90.0, 94, 98, 500]})
    assert found.images.tolist() == [90, 94, 98]


def test_a_measurement_counts_if_it_is_whole_and_of_these_weights(tmp_path):
    grid = Grid(plan("mlp", "digits", epochs=1)[0], (Point(0, 4, 1.0),), tmp_path, 20)
    (point,) = grid.wanted
    write_run(grid, point, [90.0, 94, 98])
    file, weights = grid.path(point) / "metrics.json", grid.path(point) / "best_model.pth"
    content = json.loads(file.read_text())
    assert grid.metrics(point)["nll_20"]["value"] == 94
    for name in ("nll_20", "negative_elbo", "distortion", "rate"):
        cut = json.loads(file.read_text())
        del cut["splits"]["validation"]["dynamic"]["metrics"][name]
        file.write_text(json.dumps(cut))
        assert grid.metrics(point) is None, name
        file.write_text(json.dumps(content))
    for split, protocol in (("test", "dynamic"), ("validation", "grey")):
        place = content["splits"]["validation"]["dynamic"]
        file.write_text(json.dumps({**content, "splits": {split: {protocol: place}}}))
        assert grid.metrics(point) is None, "those are other images"
    few = {**content, "data": {**content["data"], "validation": 30}}
    file.write_text(json.dumps(few))
    assert grid.metrics(point) is None, "3 of 30 images are not what others are compared on"
    file.write_text(json.dumps(content))
    assert grid.metrics(point) is not None
    weights.write_bytes(b"others")
    assert grid.metrics(point) is None


def test_a_run_that_stopped_early_is_trained_and_one_that_was_interrupted_is_not(tmp_path, digits):
    run = override(recipe("mlp"), data="digits", epochs=60, patience=1, learning_rate=1e-12, batch_size=1437)
    fit(run, digits, out=tmp_path / "run")
    folder = RunFolder(tmp_path / "run")
    state = folder.load_last()
    assert state["stopped"]
    assert state["step"] < 60
    assert _is_trained(folder)
    folder.save_last({**state, "stopped": False})
    assert not _is_trained(folder)
    folder.save_last({**state, "stopped": False, "step": 60})
    assert _is_trained(folder)
    (tmp_path / "run" / "best_model.pth").unlink()
    assert not _is_trained(folder)


def test_stages_follow_what_is_there(tuned, tmp_path):
    base, _ = plan("mlp", "digits", epochs=EPOCHS)
    out = tmp_path / "copy"
    shutil.copytree(tuned["out"], out)
    point = Point(0, 4, 1.0)

    def stage(**changes):
        grid = {"base": base, "wanted": (point,), "out": out, "num_samples": 20, **changes}
        return Grid(**grid).stage(point)

    assert stage() is None
    assert stage(num_samples=21) == "measure", "another number of samples is another measure"
    file = out / point.name / "metrics.json"
    whole, cut = file.read_text(), json.loads(file.read_text())
    del cut["splits"]["validation"]["dynamic"]["per_dimension"]
    file.write_text(json.dumps(cut))
    assert stage() == "measure", "it was interrupted before its codes were looked at"
    file.write_text(whole)
    assert stage() is None
    best = out / point.name / "best_model.pth"
    weights = torch.load(best)
    torch.save({name: value * 1.01 for name, value in weights.items()}, best)
    assert stage() == "measure", "the weights are no longer those that were measured"
    file.write_text("{")
    assert stage() == "measure", "a damaged file is told of by the process that reads it"
    (out / point.name / "last.pt").write_bytes(b"cut")
    assert stage() == "train"
    with pytest.raises(UsageError, match="--batch-size 64"):
        stage(base=override(base, batch_size=64))
    shutil.rmtree(out / point.name)
    assert stage() == "train"
    assert Point(0, 2, 1.0) in Grid(base, (point,), out, 20).points(), "what a grid before this one has trained counts"


def test_a_flow_which_has_no_active_units_is_compared_by_what_it_has(tuned, tmp_path):
    out = tmp_path / "copy"
    shutil.copytree(tuned["out"], out, ignore=shutil.ignore_patterns("d03*"))
    for file in out.glob("d*/metrics.json"):
        content = json.loads(file.read_text())
        del content["splits"]["validation"]["dynamic"]["metrics"]["active_units"]
        file.write_text(json.dumps(content))
    code, printed, stderr = called([*COMMAND, "--latent-dims", "2", "4", "--out", str(out)])
    assert (code, stderr) == (0, "")
    assert "Recommended: --latent-dim" in printed
    assert "active." not in printed
    for row in json.loads((out / "tuning.json").read_text())["settings"]:
        assert "active_units" not in row
        assert row["mutual_information"] > 0
    assert (out / "tuning.png").read_bytes().startswith(b"\x89PNG")


# --- what cannot be done --------------------------------------------------------------------------------------------


def complaint(capsys) -> str:
    error = capsys.readouterr().err
    (line,) = [line for line in error.splitlines() if line.startswith("vaelab: ")]
    assert "Traceback" not in error
    return line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["mnits"], "--data mnits: neither a path nor a data set; did you mean 'mnist'?"),
        (["digits", "--recipe", "mpl"], "no recipe 'mpl'; choose one of "),
        (["digits", "--latent-dims", "0"], "--latent-dims 0: must be at least 1"),
        (["digits", "--latent-dims", "2", "-4"], "--latent-dims -4: must be at least 1"),
        (["digits", "--latent-dims"], "--latent-dims: the grid is empty"),
        (["digits", "--betas"], "--betas: the grid is empty"),
        (["digits", "--betas", "-1"], "--betas -1: must be a finite number of at least 0"),
        (["digits", "--betas", "nan"], "--betas nan: must be a finite number"),
        (["digits", "--jobs", "0"], "--jobs 0: must be at least 1"),
        (["digits", "--epochs", "0"], "--epochs 0: must be at least 1"),
        (["digits", "--seeds", "0"], "--seeds 0: must be at least 1"),
        (["digits", "--num-samples", "0"], "--num-samples 0: must be at least 1"),
        (["digits", "--protocol", "grey"], "--protocol grey: these pixels have no likelihood under mlp"),
        (["digits", "--recipe", "conv-beta", "--epochs", "5"], "conv-beta warms up over 20 epochs"),
        (["digits", "--latent-dim", "3"], "no flag --latent-dim; did you mean '--latent-dims'?"),
        (["digits", "--recipe", "burda-iwae", "--betas", "1", "2"], "--betas 2: burda-iwae has no --beta"),
        (["digits", "--recipe", "vq"], "vq has no setting 'latent_dim'"),
        (["digits", "--recipe", "rae", "--latent-dims", "4"], "sizes of rae cannot be compared: an importance"),
    ],
)
def test_wrong_usage_exits_with_2(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["tune-latent", *arguments]) == 2
    assert message in complaint(capsys)
    assert not list(tmp_path.iterdir()), "nothing was written"


@pytest.mark.parametrize(
    ("changes", "code", "message"),
    [
        (["--epochs", "9"], 2, f"--epochs 9 differs from the {EPOCHS} of the runs in"),
        (["--recipe", "mlp-2d"], 2, "holds runs of mlp, not of mlp-2d"),
        (["--protocol", "static"], 2, "--protocol static differs from the dynamic"),
        (["freyfaces"], 2, "--data freyfaces differs from the digits"),
    ],
)
def test_a_folder_of_another_tuning_is_left_alone(tuned, changes, code, message, capsys, tmp_path, monkeypatch):
    if changes == ["freyfaces"]:
        (tmp_path / "freyfaces").mkdir()
        np.save(
            tmp_path / "freyfaces" / "freyfaces.npy", np.random.default_rng(0).integers(0, 256, (40, 28, 20), np.uint8)
        )
        monkeypatch.setenv("VAELAB_DATA", str(tmp_path))
        arguments = ["tune-latent", "freyfaces", *COMMAND[2:]]
    else:
        arguments = [*COMMAND, *changes]
    before = state(tuned["out"])
    assert main([*arguments, "--out", str(tuned["out"])]) == code
    assert message in complaint(capsys)
    assert state(tuned["out"]) == before


def test_other_folders_and_files_are_left_alone(tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("precious")
    assert main([*COMMAND, "--out", str(tmp_path)]) == 2
    assert "is not empty and holds no tuning of vaelab" in complaint(capsys)
    assert main([*COMMAND, "--out", str(tmp_path / "thesis.txt")]) == 2
    assert "is a file" in complaint(capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.skipif(sys.platform == "win32", reason="locks are POSIX's")
def test_a_folder_in_use_is_called_that(tmp_path, capsys):
    import fcntl

    with (tmp_path / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert main([*COMMAND, "--out", str(tmp_path)]) == 1
    assert "is in use by another tune-latent" in complaint(capsys)


def test_the_protocol_is_one_that_has_a_likelihood(tmp_path):
    rng = np.random.default_rng(0)
    np.save(tmp_path / "binary.npy", rng.integers(0, 2, (40, 9, 9), np.uint8))
    np.save(tmp_path / "colour.npy", rng.integers(0, 256, (40, 9, 9, 3), np.uint8))
    np.save(tmp_path / "grey.npy", rng.integers(0, 256, (40, 9, 9), np.uint8))
    protocols = {
        name: plan("mlp", str(tmp_path / f"{name}.npy"))[0].data.protocol for name in ("binary", "colour", "grey")
    }
    assert protocols == {"binary": "grey", "colour": "grey", "grey": "dynamic"}
    assert plan("mlp", str(tmp_path / "grey.npy"), protocol="threshold")[0].data.protocol == "threshold"
    assert not os.path.exists(tmp_path / "runs")
    assert recipe("mlp").data.protocol == "grey"


@pytest.mark.parametrize(("name", "changes"), [("mlp", {"beta": 0.25}), ("burda-iwae", {})])
def test_commands_train_what_was_planned(tmp_path, name, changes):
    """The flags of a run's own process give the configuration that the grid means."""
    np.save(tmp_path / "own.npy", np.random.default_rng(0).random((500, 9, 9)))
    base, _ = plan(name, str(tmp_path / "own.npy"), epochs=2400, range="unit")
    point = Point(3, 5, changes.get("beta", 1.0))
    grid = Grid(base, (point,), tmp_path / "out", 20)
    from vaelab.cli.training import _choose_parts, _parse

    name, *flags = grid.command(point, "train")[1:]
    run, out, resume, track = _parse(_choose_parts(recipe(name), flags), flags)
    assert (out, resume, track) == (tmp_path / "out" / point.name, False, ())
    assert run == override(base, latent_dim=5, seed=3, threads=1, **changes)

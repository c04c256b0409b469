"""Trackers: what the run folder holds, they are given; resumed runs stay one; their failures cost no training."""

import dataclasses
import json
import sys
import textwrap
from pathlib import Path

import pytest
import torch

import vaelab as v
from vaelab.cli import main
from vaelab.config import override
from vaelab.recipes import recipe
from vaelab.runs.folder import RunFolder
from vaelab.trackers import TRACKERS, MLflow, TensorBoard, Trackio, WandB, settings_of

# Packages that write down how they are called, in a file for each.
WRITES = """
import json, pathlib
def note(*what):
    with open({file!r}, "a") as file:
        file.write(json.dumps(what) + "\\n")
"""
PACKAGES = {
    "wandb": """
        class Image(str): pass
        class Run:
            def __init__(self, id, name): self.id, self.name = id or "given-by-wandb", name
            def log(self, values, step): note("log", values, step)
            def finish(self): note("finish")
        def init(project, name, config, resume, id=None, dir=None):
            note("init", project, name, config["epochs"], resume, id)
            return Run(id, name)
    """,
    "mlflow": """
        from types import SimpleNamespace
        def set_experiment(name): note("experiment", name)
        def start_run(run_id, run_name):
            note("init", run_id, run_name)
            return SimpleNamespace(info=SimpleNamespace(run_id=run_id or "given-by-mlflow"))
        def log_params(settings): note("settings", settings["epochs"])
        def log_metrics(values, step): note("log", values, step)
        def log_artifact(path, folder): note("picture", path, folder)
        def end_run(): note("finish")
    """,
}
PACKAGES["trackio"] = PACKAGES["wandb"].replace("id=None, dir=None", "id=None")


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """These packages can be imported; returns a function that says how one was called."""
    folder = tmp_path / "packages"
    folder.mkdir()
    for name, body in PACKAGES.items():
        monkeypatch.delitem(sys.modules, name, raising=False)
        file = WRITES.format(file=str(folder / f"{name}.jsonl"))
        (folder / f"{name}.py").write_text(file + textwrap.dedent(body))
    monkeypatch.syspath_prepend(folder)
    yield lambda name: [tuple(json.loads(line)) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
    for name in PACKAGES:
        sys.modules.pop(name, None)


def numbers(record):
    return {name: value for name, value in record.items() if name not in ("epoch", "step")}


def events(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder))
    found.Reload()
    return found


TRAIN = ["train", "mlp", "--data", "digits", "--out", "run"]


class TestTensorBoard:
    def test_has_the_numbers_settings_and_pictures_of_a_run_that_was_resumed(self, tmp_path, monkeypatch):
        from torch.utils.tensorboard import SummaryWriter

        monkeypatch.chdir(tmp_path)
        assert main([*TRAIN, "--epochs", "2", "--track", "tensorboard"]) == 0
        with SummaryWriter("run") as lost:  # of an epoch that ended, and was not saved
            lost.add_scalar("loss", 1e9, 3)
        assert main([*TRAIN, "--epochs", "4", "--track", "tensorboard", "--resume"]) == 0
        found, history = events("run"), RunFolder.open(Path("run")).history()
        assert set(found.Tags()["scalars"]) == set(numbers(history[0]))
        for name in numbers(history[0]):
            assert [(e.step, e.value) for e in found.Scalars(name)] == [
                (record["epoch"], pytest.approx(record[name])) for record in history
            ]
        assert set(found.Tags()["images"]) == {p.draw for p in recipe("mlp").pictures}
        assert {e.step for e in found.Images("samples")} == {2, 4}
        assert b"| latent_dim | 20 |" in found.Tensors("settings/text_summary")[0].tensor_proto.string_val[0]

    def test_follows_a_run_from_its_first_epoch_though_it_is_told_later(self, tmp_path, digits):
        run = override(recipe("mlp"), epochs=2)
        v.fit(run, digits, out=tmp_path / "run")
        v.fit(override(run, epochs=3), digits, out=tmp_path / "run", resume=True, on_epoch_end=[TensorBoard()])
        assert [e.step for e in events(tmp_path / "run").Scalars("rate")] == [1, 2, 3]

    def test_needs_a_folder(self, tmp_path, digits):
        run = override(recipe("mlp"), epochs=1)
        with pytest.raises(v.UsageError, match="give fit an out, or TensorBoard a folder"):
            v.fit(run, digits, on_epoch_end=[TensorBoard()])
        v.fit(run, digits, on_epoch_end=[TensorBoard(tmp_path / "events")])
        assert events(tmp_path / "events").Scalars("loss")

    def test_that_follows_two_trainings_keeps_them_apart(self, tmp_path, digits):
        tracker = TensorBoard()
        for name in "ab":
            v.fit(override(recipe("mlp"), epochs=2), digits, out=tmp_path / name, on_epoch_end=[tracker])
        assert [e.step for e in events(tmp_path / "a").Scalars("loss")] == [1, 2]
        assert [e.step for e in events(tmp_path / "b").Scalars("loss")] == [1, 2]


class TestPackages:
    def test_are_told_of_the_same_run_when_it_is_resumed(self, packages, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        track = ["--track", "wandb", "trackio", "mlflow"]
        assert main([*TRAIN, "--epochs", "2", *track]) == 0
        assert main([*TRAIN, "--epochs", "3", *track, "--resume"]) == 0
        names = json.loads(Path("run/trackers.json").read_text())
        begun = {name: [call[1:] for call in packages(name) if call[0] == "init"] for name in PACKAGES}
        assert begun["wandb"] == [
            ("vaelab", "run", 2, "never", None),
            ("vaelab", "run", 3, "allow", "given-by-wandb"),
        ]
        assert begun["trackio"] == [
            ("vaelab", names["trackio"], 2, "never", None),
            ("vaelab", names["trackio"], 3, "allow", None),
        ]
        assert names["trackio"].startswith("run-")
        assert begun["mlflow"] == [(None, "run"), ("given-by-mlflow", "run")]
        assert ("settings", 2) in packages("mlflow")
        assert ("settings", 3) not in packages("mlflow")  # which refuses to change them
        history = RunFolder.open(Path("run")).history()
        for name in PACKAGES:
            logged = [call[1:] for call in packages(name) if call[0] == "log" and "loss" in call[1]]
            assert logged == [(numbers(record), record["epoch"]) for record in history]
            assert [call for call in packages(name) if call[0] == "finish"] == [("finish",)] * 2
        shown = [call[1:] for call in packages("wandb") if call[0] == "log" and "samples" in call[1]]
        assert shown == [({"samples": "run/samples.png"}, 2), ({"samples": "run/samples.png"}, 3)]
        assert ("picture", "run/samples.png", "pictures") in packages("mlflow")

    def test_take_pictures_of_the_best_epoch_as_of_the_last(self, packages, tmp_path, digits):
        tracker = WandB()
        run = override(recipe("mlp"), epochs=3)
        v.fit(run, digits, out=tmp_path / "run", on_epoch_end=[tracker])
        (tmp_path / "run" / "best_1.png").write_bytes(b"")
        picture = dataclasses.replace(run.pictures[0], draw="best", file="best_{epoch}.png", every=None)
        tracker.show([picture], tmp_path / "run", 1)
        assert packages("wandb")[-1] == ("log", {"best": str(tmp_path / "run" / "best_1.png")}, 3)

    @pytest.mark.parametrize("kind", [WandB, Trackio, MLflow])
    def test_may_follow_a_training_without_a_folder(self, kind, packages, digits):
        v.fit(override(recipe("mlp"), epochs=1), digits, on_epoch_end=[kind("mine")])
        assert any("mine" in call for call in packages(kind.word))
        assert [call[2] for call in packages(kind.word) if call[0] == "log"] == [1]

    @pytest.mark.parametrize("place", ["init", "log"])
    def test_that_fail_cost_one_line_and_no_training(self, place, packages, tmp_path, monkeypatch, digits, caplog):
        import wandb

        def fail(*args, **settings):
            raise ConnectionError("no network\nand much more")

        monkeypatch.setattr(*((wandb, "init") if place == "init" else (wandb.Run, "log")), fail)
        run = override(recipe("mlp"), epochs=2)
        caplog.clear()
        model = v.fit(run, digits, out=tmp_path / "run", on_epoch_end=[tracker := WandB()])
        tracker.finish()
        told = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
        assert told == ["wandb: no network; the training goes on without it"]
        for ours, alone in zip(model.parameters(), v.fit(run, digits).parameters(), strict=True):
            assert torch.equal(ours, alone)


@pytest.mark.parametrize("word", TRACKERS)
def test_one_that_is_not_installed_is_named_before_anything_is_done(word, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("vaelab.trackers.find_spec", lambda name: None)
    monkeypatch.chdir(tmp_path)
    assert main([*TRAIN, "--track", word]) == 2
    assert capsys.readouterr().err == f"vaelab: {word} is not installed: pip install {word}\n"
    assert not Path("run").exists()


def test_settings_are_numbers_and_words():
    settings = settings_of(recipe("conv-beta"))
    assert (settings["recipe"], settings["encoder"], settings["beta"], settings["likelihood"]) == (
        "conv-beta", "conv", 0.8, "auto",
    )  # fmt: skip
    assert all(isinstance(value, bool | int | float | str) for value in settings.values())


def test_the_command_line_names_them_all():
    from typing import get_args

    from vaelab.cli.training import Tracked

    assert get_args(Tracked) == tuple(TRACKERS)

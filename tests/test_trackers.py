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
from vaelab.trackers import TRACKERS, MLflow, TensorBoard, Tracker, Trackio, WandB, settings_of

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
        active = None
        class Run:
            def __init__(self, id, name): self.id, self.name, self.step = id or f"given-{name}", name, 0
            def log(self, values, step):
                assert step >= self.step
                self.step = step
                note("log", values, step)
            def finish(self):
                global active
                active = None
                note("finish")
        def init(project, name, config, resume, id=None, dir=None, reinit=None):
            global active
            assert reinit == "create_new" or active is None
            note("init", project, name, config["epochs"], resume, id)
            active = Run(id, name)
            return active
    """,
    "mlflow": """
        from types import SimpleNamespace
        class MlflowClient:
            def get_experiment_by_name(self, name): note("experiment", name)
            def create_experiment(self, name): return "7"
            def create_run(self, experiment, run_name):
                note("init", experiment, run_name)
                return SimpleNamespace(info=SimpleNamespace(run_id=f"given-{run_name}"))
            def update_run(self, run, status): note("init", run, status)
            def log_param(self, run, name, value): note("setting", name, value)
            def log_metric(self, run, name, value, step): note("log", {name: value}, step)
            def log_artifact(self, run, path, folder): note("picture", path, folder)
            def set_terminated(self, run): note("finish")
    """,
}
PACKAGES["trackio"] = (
    PACKAGES["wandb"].replace("id=None, dir=None, reinit=None", "id=None").replace('reinit == "create_new" or ', "")
)


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
    @pytest.fixture(autouse=True)
    def few_files(self, monkeypatch):
        """TensorBoard reads files in the order of their names: the second, and a number that is no longer in order at 10."""
        from tensorboard.summary.writer import event_file_writer

        monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))

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

    def test_is_told_what_it_has_missed(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        track = ["--track", "tensorboard"]
        for epochs, more in ((2, track), (4, ["--resume"]), (6, [*track, "--resume"])):
            assert main([*TRAIN, "--epochs", str(epochs), *more]) == 0
        assert [e.step for e in events("run").Scalars("loss")] == [1, 2, 3, 4, 5, 6]

    def test_may_be_told_of_a_run_that_is_complete(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        assert main([*TRAIN, "--epochs", "2"]) == 0
        assert main([*TRAIN, "--epochs", "2", "--resume", "--track", "tensorboard"]) == 0
        assert [e.step for e in events("run").Scalars("loss")] == [1, 2]
        assert [e.step for e in events("run").Images("samples")] == [2]

    def test_needs_a_folder(self, tmp_path, digits):
        run = override(recipe("mlp"), epochs=1)
        with pytest.raises(v.UsageError, match="give fit an out, or TensorBoard a folder"):
            v.fit(run, digits, on_epoch_end=[lambda epoch: pytest.fail("an epoch was trained"), TensorBoard()])
        v.fit(run, digits, on_epoch_end=[TensorBoard(tmp_path / "events")])
        assert events(tmp_path / "events").Scalars("loss")

    def test_that_follows_two_trainings_keeps_them_apart(self, tmp_path, digits):
        tracker = TensorBoard()
        for name in "ab":
            v.fit(override(recipe("mlp"), epochs=2), digits, out=tmp_path / name, on_epoch_end=[tracker])
        v.fit(override(recipe("mlp"), epochs=3), digits, out=tmp_path / "b", resume=True, on_epoch_end=[tracker])
        assert [e.step for e in events(tmp_path / "a").Scalars("loss")] == [1, 2]
        assert [e.step for e in events(tmp_path / "b").Scalars("loss")] == [1, 2, 3]


class TestPackages:
    def test_are_told_of_the_same_run_when_it_is_resumed(self, packages, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        track = ["--track", "wandb", "trackio", "mlflow"]
        assert main([*TRAIN, "--epochs", "2", *track]) == 0
        assert main([*TRAIN, "--epochs", "3", *track, "--resume"]) == 0
        known = json.loads(Path("run/trackers.json").read_text())
        begun = {name: [call[1:] for call in packages(name) if call[0] == "init"] for name in PACKAGES}
        assert begun["wandb"] == [
            ("vaelab", "run", 2, "never", None),
            ("vaelab", "run", 3, "allow", "given-run"),
        ]
        of_trackio = known["trackio"]["name"]
        assert begun["trackio"] == [
            ("vaelab", of_trackio, 2, "never", None),
            ("vaelab", of_trackio, 3, "allow", None),
        ]
        assert of_trackio.startswith("run-")
        assert begun["mlflow"] == [("7", "run"), ("given-run", "RUNNING")]
        assert ("setting", "epochs", 2) in packages("mlflow")
        assert ("setting", "epochs", 3) not in packages("mlflow")  # which refuses to change them
        history = RunFolder.open(Path("run")).history()
        for name in PACKAGES:
            logged = [
                call[1:]
                for call in packages(name)
                if call[0] == "log" and not isinstance(next(iter(call[1].values())), str)
            ]
            whole = [({k: v for values, step in logged if step == e for k, v in values.items()}, e) for e in (1, 2, 3)]
            assert whole == [(numbers(record), record["epoch"]) for record in history]
            assert [call for call in packages(name) if call[0] == "finish"] == [("finish",)] * 2
            assert known[name]["epoch"] == 3
        shown = [call[1:] for call in packages("wandb") if call[0] == "log" and "samples" in call[1]]
        assert shown == [({"samples": "run/samples.png"}, 2), ({"samples": "run/samples.png"}, 3)]
        assert ("picture", "run/samples.png", "pictures") in packages("mlflow")

    def test_are_opened_before_the_first_step_and_closed_after_the_last(self, packages, tmp_path, digits):
        seen = []
        v.fit(
            override(recipe("mlp"), epochs=1), digits, on_epoch_end=[lambda e: seen.extend(packages("wandb")), WandB()]
        )
        assert [call[0] for call in seen] == ["init"]
        assert [call[0] for call in packages("wandb")] == ["init", "log", "finish"]

    def test_follow_one_training_after_another(self, packages, tmp_path, digits):
        for name in "ab":
            v.fit(override(recipe("mlp"), epochs=1), digits, out=tmp_path / name, on_epoch_end=[WandB()])
        names = [json.loads((tmp_path / name / "trackers.json").read_text())["wandb"]["name"] for name in "ab"]
        assert names == ["given-a", "given-b"]
        with WandB() as tracker:
            v.fit(override(recipe("mlp"), epochs=1), digits, on_epoch_end=[tracker])
            assert packages("wandb")[-1][0] == "log"
        assert packages("wandb")[-1] == ("finish",)

    def test_take_pictures_of_the_best_epoch_as_of_the_last(self, packages, tmp_path, digits):
        run = override(recipe("mlp"), epochs=3)
        picture = dataclasses.replace(run.pictures[0], draw="best", file="best_{epoch}.png", every=None)
        with WandB() as tracker:
            v.fit(run, digits, out=tmp_path / "run", on_epoch_end=[tracker])
            (tmp_path / "run" / "best_1.png").write_bytes(b"")
            tracker.show([picture], tmp_path / "run", 1)
        assert packages("wandb")[-2] == ("log", {"best": str(tmp_path / "run" / "best_1.png")}, 3)

    @pytest.mark.parametrize("kind", [WandB, Trackio, MLflow])
    def test_may_follow_a_training_without_a_folder(self, kind, packages, digits):
        v.fit(override(recipe("mlp"), epochs=1), digits, on_epoch_end=[kind("mine")])
        assert any("mine" in call for call in packages(kind.word))
        assert {call[2] for call in packages(kind.word) if call[0] == "log"} == {1}

    @pytest.mark.parametrize("place", ["init", "log"])
    def test_that_fail_cost_one_line_and_no_training(self, place, packages, tmp_path, monkeypatch, digits, caplog):
        import wandb

        def fail(*args, **settings):
            raise ConnectionError("no network\nand much more")

        monkeypatch.setattr(*((wandb, "init") if place == "init" else (wandb.Run, "log")), fail)
        run = override(recipe("mlp"), epochs=2)
        caplog.clear()
        model = v.fit(run, digits, out=tmp_path / "run", on_epoch_end=[tracker := WandB()])
        told = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
        assert told == ["wandb: no network; the training goes on without it"]
        if place == "log":
            assert [call[0] for call in packages("wandb")] == ["init", "finish"]
        v.fit(run, digits, on_epoch_end=[tracker])  # is another training, and may go better
        assert sum(record.levelname == "WARNING" for record in caplog.records) == 2
        for ours, alone in zip(model.parameters(), v.fit(run, digits).parameters(), strict=True):
            assert torch.equal(ours, alone)


@pytest.mark.parametrize("word", TRACKERS)
def test_one_that_is_not_installed_is_named_before_anything_is_done(word, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("vaelab.trackers.find_spec", lambda name: None)
    monkeypatch.chdir(tmp_path)
    assert main([*TRAIN, "--track", word]) == 2
    assert capsys.readouterr().err == f"vaelab: {word} is not installed: pip install {word}\n"
    assert not Path("run").exists()


def test_one_of_ones_own_needs_no_package(tmp_path, digits):
    class Lines(Tracker):
        word = "my-lab"

        def open(self, title, settings, name, folder):
            self.file = (folder / "lab.txt").open("a")
            return title

        def numbers(self, numbers, epoch):
            print(epoch, numbers["rate"], file=self.file)

        def picture(self, name, path, epoch): ...

        def close(self):
            self.file.close()

    v.fit(override(recipe("mlp"), epochs=2), digits, out=tmp_path / "run", on_epoch_end=[Lines()])
    history = RunFolder.open(tmp_path / "run").history()
    assert (tmp_path / "run" / "lab.txt").read_text().splitlines() == [f"{r['epoch']} {r['rate']}" for r in history]


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

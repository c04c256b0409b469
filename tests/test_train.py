"""The loop: same seed, same bits; a killed and resumed run is the run that was not killed; bad numbers stop it."""

import dataclasses
import json
import logging
import os
import random
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import vaelab as v
from vaelab import objectives, specs
from vaelab.cli import main
from vaelab.config import override
from vaelab.errors import FailureError, UsageError
from vaelab.models import VAE, Batch
from vaelab.objectives import elbo_terms
from vaelab.recipes import RECIPES, recipe
from vaelab.runs.checkpoint import load_tensors, save_tensors
from vaelab.runs.folder import RunFolder
from vaelab.runs.loading import load_model
from vaelab.runtime import StepNoise, has_fast_bf16
from vaelab.train import InterruptedRun, fit, interruptions
from vaelab.training.trainer import Trainer

SMALL_CONV = {"encoder_conv_channels": (4, 8), "decoder_conv_channels": (8, 4)}
RUNS = {
    "mlp": override(recipe("mlp"), data="digits", epochs=3),
    "conv-warmup": override(recipe("conv-warmup"), data="digits", epochs=3, patience=1, kl_warmup_epochs=1.0, **SMALL_CONV),
    "conv-beta": override(
        recipe("conv-beta"), data="digits", epochs=4, kl_warmup_epochs=1.0, warmup_epochs=1.0, batch_size=256,
        augment_prob=0.5, ema_decay=0.9, **SMALL_CONV,
    ),
}  # fmt: skip


def flags(run: v.Run) -> list[str]:
    """The command line of one of these runs."""
    changed = {
        "mlp": "--epochs 3",
        "conv-warmup": "--epochs 3 --patience 1 --kl-warmup-epochs 1 --encoder-conv-channels 4 8 --decoder-conv-channels 8 4",
        "conv-beta": "--epochs 4 --kl-warmup-epochs 1 --warmup-epochs 1 --batch-size 256 --augment-prob 0.5 --ema-decay 0.9 "
        "--encoder-conv-channels 4 8 --decoder-conv-channels 8 4",
    }
    return ["train", run.recipe, "--data", "digits", *changed[run.recipe].split()]


def same_bits(a: dict, b: dict) -> bool:
    """Whether two nested states are equal to the last bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_bits(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same_bits, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def weights(model: VAE) -> dict:
    return model.state_dict()


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """last.pt, best_model.pth and the history of each run that nobody interrupts."""
    results = {}
    for name, run in RUNS.items():
        out = tmp_path_factory.mktemp("whole") / name
        fit(run, out=out)
        folder = RunFolder.open(out)
        results[name] = (folder.load_last(), folder.load_best(), folder.history())
    return results


@pytest.mark.parametrize("name", RUNS)
def test_the_same_seed_gives_the_same_bits_and_another_one_does_not(name, uninterrupted):
    again = weights(fit(RUNS[name]))
    assert same_bits(again, uninterrupted[name][1])
    other = weights(fit(override(RUNS[name], seed=1)))
    assert not same_bits(other, again)


def test_training_leaves_the_users_randomness_alone(digits):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    fit(override(RUNS["mlp"], epochs=1), digits)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("where", ["step", "write"])
@pytest.mark.parametrize("name", RUNS)
def test_a_run_killed_at_a_random_moment_and_resumed_ends_with_the_same_bits(name, where, uninterrupted, tmp_path):
    run = RUNS[name]
    steps = uninterrupted[name][0]["step"]
    moment = f"{where}:{random.randrange(1, {'step': steps, 'write': 4}[where])}"
    save_every = random.choice([1, 2, 3])
    print(f"killed at {moment} of {steps} steps, saved every {save_every}")
    command = [*flags(run), "--save-every", str(save_every), "--out", str(tmp_path / "run")]
    script = Path(__file__).with_name("killed.py")
    killed = subprocess.run([sys.executable, script, moment, *command], capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert main(["train", run.recipe, "--out", str(tmp_path / "run"), "--resume"]) == 0
    folder = RunFolder.open(tmp_path / "run")
    last, best, history = uninterrupted[name]
    assert same_bits(folder.load_last(), last)
    assert same_bits(folder.load_best(), best)
    times = ("seconds", "cpu_seconds", "images_per_second")
    timeless = [{k: x for k, x in r.items() if k not in times} for r in folder.history()]
    assert timeless == [{k: x for k, x in r.items() if k not in times} for r in history]
    hidden = [path.name for path in folder.path.iterdir() if path.name.startswith(".")]
    assert hidden == [".lock"], "nothing half-written stays"


def test_this_resume_test_would_notice_a_forgotten_state(uninterrupted, tmp_path, monkeypatch):
    """If the optimizer's moments were not restored, the bits would differ."""
    run = override(RUNS["mlp"], save_every=5)
    _interrupt_at(monkeypatch, step=17)
    with pytest.raises(InterruptedRun):
        fit(run, out=tmp_path / "run")
    monkeypatch.undo()
    state = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    for moments in state["optimizers"]["model"]["state"].values():
        moments["exp_avg"].zero_()
    torch.save(state, tmp_path / "run" / "last.pt")
    fit(run, out=tmp_path / "run", resume=True)
    assert not same_bits(RunFolder.open(tmp_path / "run").load_best(), uninterrupted["mlp"][1])


@pytest.fixture(autouse=True)
def _ctrl_c_works():
    """A suite that is started in the background inherits an ignored Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler, "handlers are restored"
    signal.signal(signal.SIGINT, before)


def _interrupt_at(monkeypatch, step):
    original = Trainer.train_step

    def train_step(self):
        original(self)
        if self.step == step:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Trainer, "train_step", train_step)


def test_ctrl_c_saves_says_how_to_resume_and_resumes_to_the_same_bits(uninterrupted, tmp_path, monkeypatch, capsys):
    out = str(tmp_path / "run")
    _interrupt_at(monkeypatch, step=17)
    assert main([*flags(RUNS["mlp"]), "--out", out]) == 130
    monkeypatch.undo()
    assert f"vaelab train mlp --out {out} --resume" in capsys.readouterr().err
    assert RunFolder.open(Path(out)).load_last()["step"] == 17
    assert main(["train", "mlp", "--out", out, "--resume"]) == 0
    assert same_bits(RunFolder.open(Path(out)).load_best(), uninterrupted["mlp"][1])


def test_a_path_is_a_data_set_too(tmp_path):
    import numpy as np

    np.save(tmp_path / "a.npy", np.random.default_rng(0).random((50, 9, 9)))
    assert fit(override(RUNS["mlp"], epochs=1), tmp_path / "a.npy").shape == (1, 9, 9)


def test_a_run_on_data_that_were_loaded_says_how(tmp_path):
    """So that its folder can be measured and gone on with."""
    data, run = v.load("digits", protocol="threshold", validation_size=100), override(recipe("mlp"), epochs=1)
    fit(run, data, out=tmp_path / "run")
    kept = RunFolder.open(tmp_path / "run").run.data
    assert (kept.source, kept.protocol, kept.validation_size) == ("digits", "threshold", 100)
    assert main(["evaluate", str(tmp_path / "run"), "--only", "elbo"]) == 0
    fit(override(run, epochs=2), data, out=tmp_path / "run", resume=True)
    assert len(RunFolder.open(tmp_path / "run").history()) == 2


def test_fit_works_off_the_main_thread(digits):
    errors = []

    def work():
        try:
            fit(override(RUNS["mlp"], epochs=1), digits)
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not errors


def test_threads_that_train_take_turns(digits):
    """Initial weights are drawn from torch's own generator, of which there is one for all threads."""
    runs = [override(RUNS["mlp"], epochs=1, seed=seed) for seed in (0, 1, 2)]
    alone = [fit(run, digits).state_dict() for run in runs]
    with ThreadPoolExecutor(3) as pool:
        together = [model.state_dict() for model in pool.map(lambda run: fit(run, digits), runs)]
    for one, other in zip(alone, together, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_threads_that_train_into_one_folder_do_not_train_over_each_other(digits, tmp_path):
    """The second waits for its turn, and finds a folder that was empty when it came."""
    failures = []

    def work(seed):
        try:
            fit(override(RUNS["mlp"], epochs=2, seed=seed), digits, out=tmp_path / "run")
        except UsageError as error:
            failures.append(str(error))

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(work, (0, 1)))
    [failure] = failures
    assert "holds a run already" in failure or "another process trains" in failure
    assert [record["epoch"] for record in RunFolder.open(tmp_path / "run").history()] == [1, 2]


def test_what_cannot_be_written_is_not_called_a_part_of_ones_own(digits, tmp_path):
    run = dataclasses.replace(RUNS["mlp"], training=dataclasses.replace(RUNS["mlp"].training, seed=torch.tensor(1)))
    with pytest.raises(UsageError, match=r"a run folder cannot be written: .*Tensor.*; give plain numbers and words"):
        fit(run, digits, out=tmp_path / "run")


@dataclasses.dataclass(frozen=True)
class OwnPrior(specs.StandardNormal):
    """A prior that is not vaelab's."""

    part = specs.StandardNormal.part


def test_a_part_of_ones_own_trains_without_a_folder_and_is_refused_with_one(digits, tmp_path):
    run = dataclasses.replace(override(RUNS["mlp"], epochs=1), prior=OwnPrior())
    with pytest.raises(UsageError, match=r"a run folder could not be read again: .*'OwnPrior'.*trains without out"):
        fit(run, digits, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert isinstance(fit(run, digits), VAE)


def test_a_ctrl_c_that_was_ignored_stays_ignored():
    """As under nohup, where a termination signal alone ends a run."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with interruptions() as interrupted:
        os.kill(os.getpid(), signal.SIGTERM)
    assert interrupted.is_set()
    assert signal.signal(signal.SIGINT, signal.default_int_handler) is signal.SIG_IGN


class TestResume:
    @pytest.fixture
    def out(self, tmp_path):
        fit(override(RUNS["mlp"], epochs=1), out=tmp_path / "run")
        return tmp_path / "run"

    def test_more_epochs_on_a_constant_schedule_are_the_longer_run(self, out, uninterrupted):
        fit(RUNS["mlp"], out=out, resume=True)
        assert same_bits(RunFolder.open(out).load_best(), uninterrupted["mlp"][1])
        assert RunFolder.open(out).run.training.epochs == 3

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ("--beta 2", r"--beta 2.0 differs from the 1.0 of the run"),
            ("--batch-size 64", "--batch-size 64 differs from the 128"),
            ("--data freyfaces", "--data freyfaces differs from the digits"),
            ("--optimizer adamw", "--optimizer adamw differs from the adam of the run"),
            ("--likelihood gaussian", "--likelihood gaussian differs from the auto"),
        ],
    )
    def test_a_flag_that_differs_is_an_error_naming_both_values(self, out, given, message, capsys):
        assert main(["train", "mlp", "--out", str(out), "--resume", *given.split()]) == 2
        assert __import__("re").search(message, capsys.readouterr().err)

    def test_a_default_given_against_the_folders_value_is_noticed_too(self, tmp_path, capsys):
        out = str(tmp_path / "run")
        assert main(["train", "mlp", "--data", "digits", "--epochs", "1", "--beta", "0.5", "--out", out]) == 0
        assert main(["train", "mlp", "--out", out, "--resume", "--beta", "1.0"]) == 2
        assert "--beta 1.0 differs from the 0.5" in capsys.readouterr().err

    def test_cycles_know_no_end_either(self, tmp_path):
        run = override(RUNS["mlp"], schedule="cyclic", cycle_epochs=2, epochs=2)
        whole = fit(run, out=tmp_path / "whole")
        fit(override(run, epochs=1), out=tmp_path / "parts")
        assert same_bits(weights(fit(run, out=tmp_path / "parts", resume=True)), weights(whole))

    def test_fewer_epochs_are_refused_and_more_on_a_cosine_too(self, out, tmp_path, capsys):
        fit(override(RUNS["mlp"], epochs=2), out=out, resume=True)
        assert main(["train", "mlp", "--out", str(out), "--resume", "--epochs", "1"]) == 2
        error = capsys.readouterr().err
        assert "--epochs 1 differs from the 2" in error
        assert "spread" not in error
        fit(override(RUNS["conv-beta"], epochs=1), out=tmp_path / "cosine")
        assert main(["train", "conv-beta", "--out", str(tmp_path / "cosine"), "--resume", "--epochs", "9"]) == 2
        assert "the schedule is spread over the epochs" in capsys.readouterr().err

    def test_another_thread_count_works_and_says_so(self, out, caplog):
        with caplog.at_level("INFO", "vaelab"):
            fit(override(RUNS["mlp"], epochs=2, threads=2), out=out, resume=True)
        assert "threads was 1 and is now 2: the result will differ in its bits" in caplog.text

    def test_other_data_are_noticed(self, out, tmp_path):
        with pytest.raises(UsageError, match="--validation-size"):
            fit(override(RUNS["mlp"], epochs=2, validation_size=50), out=out, resume=True)

    def test_changed_images_are_noticed(self, tmp_path, capsys):
        import numpy as np

        path, out = tmp_path / "a.npy", str(tmp_path / "run")
        images = np.random.default_rng(0).integers(0, 256, (50, 9, 9)).astype(np.uint8)
        np.save(path, images)
        assert main(["train", "mlp", "--data", str(path), "--epochs", "1", "--out", out]) == 0
        np.save(path, 255 - images)
        for command in (
            ["train", "mlp", "--out", out, "--resume", "--epochs", "2"],
            ["evaluate", out],
            ["reconstruct", out],
        ):
            assert main(command) == 1
            assert "the data have changed" in capsys.readouterr().err

    def test_the_command_that_began_a_run_goes_on_with_it(self, tmp_path):
        """With every flag repeated, booleans and other parts too, from another folder, with the data's path relative."""
        import numpy as np

        np.save(tmp_path / "a.npy", np.random.default_rng(0).random((50, 9, 9)))
        command = ["train", "conv-2d", "--data", "a.npy", "--encoder-batch-norm", "--optimizer", "adamw", "--weight-decay",
                   "0.1", "--schedule", "constant", "--epochs", "1", "--out", str(tmp_path / "run")]  # fmt: skip
        before = Path.cwd()
        try:
            os.chdir(tmp_path)
            assert main(command) == 0
            assert main([*command, "--resume"]) == 0
        finally:
            os.chdir(before)
        more = [
            "train",
            "conv-2d",
            "--out",
            str(tmp_path / "run"),
            "--resume",
            "--epochs",
            "2",
            "--weight-decay",
            "0.1",
        ]
        assert main(more) == 0
        assert RunFolder.open(tmp_path / "run").load_last()["step"] == 2

    def test_another_recipe_is_refused(self, out, capsys):
        assert main(["train", "mlp-2d", "--out", str(out), "--resume"]) == 2
        assert "holds a run of mlp, not of mlp-2d" in capsys.readouterr().err

    def test_a_damaged_checkpoint_is_named(self, out):
        (out / "last.pt").write_bytes((out / "last.pt").read_bytes()[:1000])
        with pytest.raises(FailureError, match=r"last\.pt is damaged"):
            fit(override(RUNS["mlp"], epochs=2), out=out, resume=True)

    def test_a_damaged_line_of_the_history_is_named_unless_it_is_the_last(self, tmp_path):
        """A crash cuts the last line short; what stands before it was whole once."""
        file, lines = tmp_path / "history.jsonl", [f'{{"epoch": {epoch}}}' for epoch in (1, 2, 3)]
        file.write_text("\n".join([*lines[:2], lines[2][:5]]))
        assert RunFolder(tmp_path).history() == [{"epoch": 1}, {"epoch": 2}]
        file.write_text("\n".join([lines[0], lines[1][:5], lines[2]]) + "\n")
        with pytest.raises(FailureError, match=r"history\.jsonl, line 2 is not JSON"):
            RunFolder(tmp_path).history()

    def test_records_of_steps_that_are_taken_again_are_dropped(self, tmp_path):
        folder = RunFolder(tmp_path)
        for step in (11, 22, 33):
            folder.append_history({"step": step})
        folder.cut_history(22)
        assert folder.history() == [{"step": 11}, {"step": 22}]

    def test_a_checkpoint_that_would_run_code_is_refused(self, out):
        import pickle

        class Bomb:
            def __reduce__(self):
                return (os.system, ("touch /tmp/vaelab-bomb",))

        (out / "best_model.pth").write_bytes(pickle.dumps(Bomb()))
        with pytest.raises(FailureError, match="not a checkpoint"):
            load_model(out)
        assert not Path("/tmp/vaelab-bomb").exists()

    def test_what_was_half_written_is_removed_in_folders_too(self, out):
        (out / "progress").mkdir()
        halves = [out / ".last.pt.1.tmp", out / "progress" / ".epoch_0001.png.1.tmp"]
        for half in halves:
            half.write_bytes(b"half")
        fit(override(RUNS["mlp"], epochs=1), out=out, resume=True)
        assert not any(half.exists() for half in halves)

    def test_a_finished_run_stays_as_it_is(self, out):
        before = RunFolder.open(out).load_last()
        fit(override(RUNS["mlp"], epochs=1), out=out, resume=True)
        assert same_bits(RunFolder.open(out).load_last(), before)


def rates_of(trainer: Trainer) -> list[float]:
    return [group["lr"] for optimizer in trainer.optimizers.values() for group in optimizer.param_groups]


class TestMonitoring:
    def test_nothing_counts_before_annealing_and_warm_up_have_ended(self, digits):
        """Through a KL warm-up of 4 epochs with a patience of 1, no run stops, and no early epoch is the best."""
        run = override(RUNS["conv-warmup"], epochs=7, kl_warmup_epochs=4.0, patience=1, learning_rate=1e-2)
        trainer = Trainer(run, digits, torch.device("cpu"))
        losses = {}
        while not trainer.done:
            for _ in range(trainer.steps_per_epoch):
                trainer.train_step()
            record = trainer.end_epoch()
            losses[record["epoch"]] = record["validation_loss"]
            if record["epoch"] < 4:
                assert trainer.best is None
                assert not trainer.stopped
        assert trainer.best[1] >= 4
        assert trainer.best[0] == min(loss for epoch, loss in losses.items() if epoch >= 4)

    @pytest.mark.parametrize(("annealing", "warmup", "settled"), [(0, 0, 1), (1, 3, 3), (4, 1, 4), (0, 2.5, 3)])
    def test_the_longer_of_annealing_and_warm_up_is_waited_for(self, digits, annealing, warmup, settled):
        """The losses before are lower, and neither the best nor the beginning of patience."""
        run = override(RUNS["conv-beta"], kl_warmup_epochs=float(annealing), warmup_epochs=float(warmup), patience=2)
        trainer = Trainer(run, digits, torch.device("cpu"))
        while not trainer.stopped:
            trainer.step += trainer.steps_per_epoch
            trainer._monitor(float(trainer.epoch))
            assert (trainer.best is None) == (trainer.best_weights is None) == (trainer.epoch < settled)
        assert trainer.best == (settled, settled)
        assert trainer.epoch == settled + 2

    def test_the_best_weights_stay_what_they_were(self, digits):
        trainer = Trainer(override(RUNS["mlp"], compile="off"), digits, torch.device("cpu"))
        states = []
        for epoch, loss in enumerate((2.0, 1.0, 3.0), 1):
            trainer.train_step()
            trainer.step = epoch * trainer.steps_per_epoch
            trainer._monitor(loss)
            states.append({name: value.clone() for name, value in weights(trainer.model).items()})
        best = weights(trainer.best_model())
        assert [same_bits(best, state) for state in states] == [False, True, False]

    def test_a_plateau_is_none_before_annealing_has_ended(self, digits):
        plateau = {"learning_rate": 0.1, "lr_factor": 0.5, "lr_patience": 1}
        run = override(RUNS["conv-warmup"], kl_warmup_epochs=3.0, patience=99, **plateau)
        trainer = Trainer(run, digits, torch.device("cpu"))
        rates = []
        for _ in range(6):
            trainer.step += trainer.steps_per_epoch
            trainer._monitor(float(trainer.epoch))
            rates.append(trainer.learning_rate())
        assert rates == [0.1, 0.1, 0.1, 0.1, 0.05, 0.05], "epochs 4 and 5 are worse than 3"

    def test_what_is_monitored_is_the_objective_at_its_final_beta(self, digits):
        run = override(RUNS["mlp"], beta=3.0, kl_warmup_epochs=50.0, epochs=1)
        trainer = Trainer(run, digits, torch.device("cpu"))
        for _ in range(trainer.steps_per_epoch):
            trainer.train_step()
        record = trainer.end_epoch()
        assert record["beta"] == pytest.approx(3 / 50)
        expected = record["validation_distortion"] + 3.0 * record["validation_rate"]
        assert record["validation_loss"] == pytest.approx(expected, rel=1e-9)

    def test_early_stopping_counts_epochs_without_improvement(self, digits):
        run = override(RUNS["mlp"], epochs=50, patience=2, learning_rate=1e-12)
        history = []
        fit(run, digits, on_epoch_end=[lambda e: history.append(e.history[-1]["validation_loss"])])
        best = history.index(min(history))
        assert len(history) == best + 3 < 50

    def test_the_plateau_reduces_the_learning_rate(self, digits):
        """Of weights that stay as they are; an epoch's record has the rate of its steps."""
        still = {"learning_rate": 0.01, "min_lr": 0.0, "lr_factor": 0.1, "lr_patience": 1}
        run = override(RUNS["conv-warmup"], epochs=6, patience=6, kl_warmup_epochs=0.0, **still)
        trainer, rates = Trainer(run, digits, torch.device("cpu")), []
        while not trainer.done:
            trainer.step += trainer.steps_per_epoch
            rates.append(trainer.end_epoch()["learning_rate"])
        assert rates == pytest.approx([0.01, 0.01, 0.01, 0.001, 0.001, 0.0001])

    def test_a_plateau_lowers_the_rate_of_every_group(self, digits):
        """Also if a checkpoint is gone on with after each epoch; steps leave the rates alone."""
        run = override(recipe("mlp"), data="digits", schedule="plateau", compile="off", learning_rate=1e-3,
                       lr_factor=0.5, lr_patience=2, min_lr=3e-4)  # fmt: skip
        run = dataclasses.replace(run, objective=objectives.Factor(critic_dims=(8,)))
        trainer, other = (Trainer(run, digits, torch.device("cpu")) for _ in range(2))
        seen = []
        for epoch in range(1, 9):
            trainer.train_step()
            trainer.step = epoch * trainer.steps_per_epoch
            trainer._monitor(5.0)
            other.load_state(trainer.state(), trainer.best_weights)
            trainer, other = other, trainer
            seen.append(rates_of(trainer))
        expected = [1e-3, 1e-3, 1e-3, 5e-4, 5e-4, 5e-4, 3e-4, 3e-4]
        assert seen == [pytest.approx([rate, rate]) for rate in expected]
        assert trainer.best == (5.0, 1), "as good is no better"
        assert not trainer.stopped, "without patience"

    def test_a_schedule_sets_the_rate_of_every_group(self, digits):
        changes = {"base_lr": 0.001, "max_lr": 0.003, "warmup_epochs": 1.0, "batch_size": len(digits.train) // 4}
        run = override(recipe("mlp"), data="digits", schedule="warmup-cosine", compile="off", **changes)
        run = dataclasses.replace(run, objective=objectives.Factor(critic_dims=(8,)))
        trainer = Trainer(run, digits, torch.device("cpu"))
        for rate in (0.001, 0.0015, 0.002):
            trainer.train_step()
            assert rates_of(trainer) == pytest.approx([rate, rate])

    def test_the_plateau_works_below_zero_too(self):
        """A Gaussian likelihood gives negative losses; torch's relative threshold would call a worse one better."""
        from vaelab import specs
        from vaelab.training.trainer import _plateau

        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        plateau = _plateau(specs.Plateau(1.0, lr_patience=1), optimizer)
        for epoch in range(6):
            plateau.step(-1000 + 0.05 * epoch)
        assert optimizer.param_groups[0]["lr"] < 1.0

    def test_the_best_weights_are_the_averaged_ones_where_there_is_an_average(self, digits, tmp_path):
        run = override(RUNS["mlp"], ema_decay=0.9, epochs=2)
        model = fit(run, digits, out=tmp_path / "run")
        state = RunFolder.open(tmp_path / "run").load_last()
        averaged = {k.removeprefix("module."): x for k, x in state["average"].items() if k.startswith("module.")}
        assert same_bits(dict(model.state_dict()), averaged)
        assert not same_bits(dict(model.state_dict()), state["model"])

    def test_ema_is_the_exponential_average_of_the_weights(self, digits):
        trainer = Trainer(override(RUNS["mlp"], ema_decay=0.5), digits, torch.device("cpu"))
        expected = None
        for _ in range(4):
            trainer.train_step()
            now = trainer.model.decoder.layers[0].weight.detach().clone()
            expected = now if expected is None else 0.5 * expected + 0.5 * now
        torch.testing.assert_close(trainer.evaluated.decoder.layers[0].weight, expected)


class TestValidation:
    def test_it_is_the_mean_over_all_images_of_the_averaged_model_in_evaluation_mode(self, digits):
        """180 images, fewer than are taken at a time; dropout and batch norm are on before and after."""
        run = override(RUNS["conv-beta"], precision="fp32", dropout=0.5, batch_size=100)
        trainer = Trainer(run, digits, torch.device("cpu"))
        for _ in range(3):
            trainer.train_step()
        trainer.evaluated.train()
        found = trainer.validate()
        distortion, rate = elbo_terms(trainer.average.module.eval(), digits.batches("validation", 77))
        assert found["validation_distortion"] == pytest.approx(distortion.mean(), rel=1e-5)
        assert found["validation_rate"] == pytest.approx(rate.mean(), rel=1e-5)
        assert found["validation_loss"] == pytest.approx(distortion.mean() + 0.8 * rate.mean(), rel=1e-5)
        trainer.step = trainer.steps_per_epoch
        trainer.model.eval()
        trainer.train_step()
        assert trainer.model.training

    def test_what_an_objective_learns_is_in_evaluation_mode_too(self, digits):
        @dataclasses.dataclass(frozen=True)
        class Dropped(objectives.ELBO):
            def networks(self, model):
                return torch.nn.ModuleDict({"drop": torch.nn.Dropout()})

            def parts(self, model, networks, batch, noise):
                parts = super().parts(model, networks, batch, noise)
                return {**parts, "distortion": networks["drop"](parts["distortion"])}

        run = dataclasses.replace(RUNS["mlp"], objective=Dropped())
        trainer = Trainer(override(run, precision="fp32", compile="off"), digits, torch.device("cpu"))
        trainer.train_step()
        found = trainer.validate()
        assert trainer.networks.training is False
        distortion, _ = elbo_terms(trainer.model, digits.batches("validation", 180))
        assert found["validation_distortion"] == pytest.approx(distortion.mean(), rel=1e-5)
        trainer.step = trainer.steps_per_epoch
        trainer.train_step()
        assert trainer.networks.training

    def test_parts_that_depend_on_the_others_of_a_batch_are_those_of_batches_as_in_training(self, digits):
        """A critic sees dimensions permuted over 50 images at a time, and over the 30 that are left."""
        run = override(recipe("mlp"), data="digits", batch_size=50, precision="fp32", compile="off")
        run = dataclasses.replace(run, objective=objectives.Factor(critic_dims=(8,)))
        trainer = Trainer(run, digits, torch.device("cpu"))
        trainer.train_step()
        found = trainer.validate()["validation_critic"]

        def by_batches_of(size):
            with torch.no_grad():
                batches = digits.batches("validation", size)
                parts = [run.objective.parts(trainer.model, trainer.networks, *batch)["critic"] for batch in batches]
            return float(torch.cat(parts).mean())

        assert found == pytest.approx(by_batches_of(50), rel=1e-6)
        assert abs(found - by_batches_of(180)) > 1e-4

    def test_it_is_computed_as_training_is(self, digits):
        """In bf16 products, where those of the steps are."""
        trainer = Trainer(override(RUNS["mlp"], precision="bf16", compile="off"), digits, torch.device("cpu"))
        found = trainer.validate()["validation_distortion"]
        exact, _ = elbo_terms(trainer.model, digits.batches("validation", 500))
        with torch.autocast("cpu", torch.bfloat16):
            rounded, _ = elbo_terms(trainer.model, digits.batches("validation", 500))
        assert found == pytest.approx(rounded.mean(), rel=1e-9)
        assert found != pytest.approx(exact.mean(), rel=1e-9)


def test_pseudo_inputs_start_at_training_images_of_the_seeds_choice(digits):
    def chosen(seed, count):
        run = override(recipe("mlp"), data="digits", prior="vamp", num_components=count, compile="off", seed=seed)
        trainer = Trainer(run, digits, torch.device("cpu"))
        images = trainer._some_images(count)
        assert torch.equal(trainer.model.prior_part.pseudo_inputs, images)
        same = (images.flatten(1)[:, None] == digits.train.rows(slice(None)).x.flatten(1)).all(2)
        assert same.any(1).all()
        return same.float().argmax(1).tolist()

    first = chosen(0, 12)
    assert len(set(first)) == 12
    assert chosen(0, 12) == first
    assert chosen(0, 5) == first[:5]
    assert set(first) != set(chosen(1, 12))
    assert max(first) > len(digits.train) // 2, "of all of them"


def seen_by(trainer, steps):
    """The images of some steps that change nothing."""
    seen = []

    def step(objective, batch, noise):
        seen.append(batch.x)
        return torch.zeros(len(trainer.names))

    trainer._take_step = step
    for _ in range(steps):
        trainer.train_step()
    return torch.cat(seen)


def test_every_step_moves_every_image_in_its_own_way(digits):
    """Of one image, thirty times over: two steps an epoch, and two epochs."""
    once = digits.train.first(1)
    train = dataclasses.replace(once, **{name: torch.cat([getattr(once, name)] * 30) for name in ("x", "y", "index")})
    data = dataclasses.replace(digits, train=train)
    run = override(RUNS["conv-beta"], augment_prob=1.0, batch_size=15, compile="off")
    seen = seen_by(Trainer(run, data, torch.device("cpu")), 4)
    assert len(seen.unique(dim=0)) == 60
    again = seen_by(Trainer(run, data, torch.device("cpu")), 4)
    assert torch.equal(again, seen)
    other = seen_by(Trainer(override(run, seed=1), data, torch.device("cpu")), 4)
    assert len(torch.cat([seen, other]).unique(dim=0)) == 120


def test_schedules_drive_the_optimizer_and_the_weight_on_the_rate(digits, tmp_path):
    run = override(RUNS["conv-beta"], epochs=4, kl_warmup_epochs=2.0, warmup_epochs=2.0)
    fit(run, digits, out=tmp_path / "run")
    history = RunFolder.open(tmp_path / "run").history()
    assert [round(record["beta"], 3) for record in history] == [0.4, 0.8, 0.8, 0.8]
    rates = [record["learning_rate"] for record in history]
    assert rates[0] < rates[1] <= 3e-4
    assert rates[1] > rates[2] > rates[3] > 1e-4
    assert all(record["grad_norm"] > 0 for record in history)


def test_clipping_bounds_the_gradient(digits):
    trainer = Trainer(override(RUNS["conv-beta"], clip_norm=0.01), digits, torch.device("cpu"))
    trainer.train_step()
    norm = sum(float((p.grad**2).sum()) for p in trainer.model.parameters()) ** 0.5
    assert norm == pytest.approx(0.01, rel=1e-3)
    assert trainer.terms[0, 3] > 0.01, "what is recorded is the norm before clipping"


def test_the_last_partial_batch_is_dropped_in_training_and_kept_in_evaluation(digits):
    trainer = Trainer(override(RUNS["mlp"], batch_size=1000), digits, torch.device("cpu"))
    assert trainer.steps_per_epoch == 1
    distortion, _ = elbo_terms(trainer.model, digits.batches("validation", 77))
    assert len(distortion) == 180


def test_fewer_images_than_a_batch_shrink_it_and_say_so(digits, caplog):
    with caplog.at_level("INFO", "vaelab"):
        trainer = Trainer(override(RUNS["mlp"], batch_size=5000), digits, torch.device("cpu"))
    assert trainer.batch_size == 1437
    assert "batch size 1437" in caplog.text


def test_batch_normalisation_of_one_number_is_refused(tmp_path, capsys):
    import numpy as np

    np.save(tmp_path / "few.npy", np.random.default_rng(0).random((3, 8, 8)))
    command = ["train", "conv-beta", "--data", str(tmp_path / "few.npy"), "--epochs", "20"]
    larger_maps = ["--encoder-conv-channels", "4", "4", "--decoder-conv-channels", "4", "4"]
    assert main([*command, *larger_maps, "--out", str(tmp_path / "small")]) == 0
    assert main([*command, "--out", str(tmp_path / "run")]) == 2
    assert "batch normalisation needs more than one image a step where a map is one pixel" in capsys.readouterr().err


def test_uneven_batches_are_one_batch(digits):
    model = fit(override(RUNS["mlp"], epochs=1), digits)
    whole = elbo_terms(model, digits.batches("test", 180))
    for size in (1, 7, 64, 179):
        for a, b in zip(whole, elbo_terms(model, digits.batches("test", size)), strict=True):
            assert abs(a - b).max() < 1e-3  # float32 sums of 784 terms of up to 500 nats
            assert abs(a.mean() - b.mean()) < 1e-5


def test_dynamic_binarization_trains_on_new_binary_pixels_each_time(digits, monkeypatch):
    """Means over all images, which their order does not change, are another epoch's only up to noise."""
    seen = []
    original = VAE.draw

    def draw(self, x, *arguments, **options):
        seen.append(x.clone())
        return original(self, x, *arguments, **options)

    monkeypatch.setattr(VAE, "draw", draw)
    fit(override(RUNS["mlp"], protocol="dynamic", epochs=2, batch_size=len(digits.train)))
    assert all(set(x.unique().tolist()) <= {0.0, 1.0} for x in seen)
    # Whether to compile is decided by a draw of black images.
    one, other = (x.mean(0) for x in seen if len(x) == len(digits.train) and x.any())
    assert not torch.equal(one, other)
    for mean in (one, other):
        assert (mean - digits.train.mean()).abs().max() < 5 * 0.5 / len(digits.train) ** 0.5


def test_groups_that_share_a_draw_take_all_gradients_before_any_steps(digits):
    """Yielded together, an encoder's and a decoder's loss step as one optimizer over both would."""
    from dataclasses import dataclass

    from vaelab.objectives import ELBO

    @dataclass(frozen=True)
    class Together(ELBO):
        def groups(self, model, networks):
            encoder = [*model.encoder.parameters(), *model.posterior_head.parameters()]
            return {"encoder": encoder, "decoder": list(model.decoder.parameters())}

        def losses(self, model, networks, batch, noise):
            draw = model.draw(batch.x, noise=noise)
            loss = (draw.kl.sum(0) - draw.log_px.mean(0)).mean()
            yield ("encoder", "decoder"), (loss, loss)
            return {"loss": loss.detach(), "distortion": -draw.log_px.mean().detach(), "rate": draw.kl.mean().detach()}

    plain = Trainer(RUNS["mlp"], digits, torch.device("cpu"))
    together = Trainer(
        __import__("dataclasses").replace(RUNS["mlp"], objective=Together()), digits, torch.device("cpu")
    )
    for trainer in (plain, together):
        for _ in range(3):
            trainer.train_step()
    for (name, a), b in zip(plain.model.named_parameters(), together.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, msg=name)
    assert set(together.state()["optimizers"]) == {"encoder", "decoder"}


class TestBadNumbers:
    def test_weights_that_are_not_finite_never_replace_a_good_checkpoint(self, tmp_path, capsys):
        out = tmp_path / "run"
        command = ["train", "mlp", "--data", "digits", "--epochs", "2", "--lr", "1e39", "--save-every", "1"]
        assert main([*command, "--out", str(out)]) == 1
        assert "finite" in capsys.readouterr().err
        kept = RunFolder.open(out).load_last()
        assert kept is None or all(torch.isfinite(x).all() for x in kept["model"].values())

    def test_a_loss_that_is_not_finite_stops_names_the_step_and_keeps_the_last_good_checkpoint(
        self, tmp_path, monkeypatch, capsys
    ):
        original = VAE.draw

        def draw(self, x, y=None, num_samples=1, *, noise, stop_qz=False):
            drawn = original(self, x, y, num_samples, noise=noise, stop_qz=stop_qz)
            if isinstance(noise, StepNoise) and noise.step == 16:
                object.__setattr__(drawn, "log_px", drawn.log_px * float("nan"))
            return drawn

        monkeypatch.setattr(VAE, "draw", draw)
        out = tmp_path / "run"
        assert main([*flags(RUNS["mlp"]), "--out", str(out)]) == 1
        error = capsys.readouterr().err
        assert "distortion is nan at step 16 (epoch 2)" in error
        assert "last.pt keeps step 11" in error
        assert "Traceback" not in error
        kept = RunFolder.open(out).load_last()
        assert kept["step"] == 11
        assert all(torch.isfinite(x).all() for x in kept["model"].values())
        assert [record["step"] for record in RunFolder.open(out).history()] == [11]
        failure = RunFolder.open(out).failure()
        assert (failure["step"], failure["term"], failure["checkpoint_step"]) == (16, "distortion", 11)
        monkeypatch.undo()
        assert main(["train", "mlp", "--out", str(out), "--resume"]) == 0
        assert RunFolder.open(out).failure() is None, "it was gone on with since"


def test_two_steps_of_every_recipe(digits):
    for name in RECIPES:
        trainer = Trainer(override(recipe(name), batch_size=24, compile="off"), digits, torch.device("cpu"))
        before = {k: x.clone() for k, x in trainer.model.state_dict().items()}
        trainer.train_step()
        trainer.train_step()
        trainer.check_finite()
        changed = [k for k, x in trainer.model.state_dict().items() if not torch.equal(x, before[k])]
        assert set(changed) >= {k for k, _ in trainer.model.named_parameters()}, name


def test_colour_images_of_any_size_train_with_a_learned_sigma(tmp_path):
    import numpy as np

    rng = np.random.default_rng(0)
    colours = rng.integers(0, 256, (60, 1, 1, 3)) * np.ones((60, 33, 47, 1))
    np.save(tmp_path / "colour.npy", colours.astype(np.uint8))
    run = override(recipe("conv-2d"), data=str(tmp_path / "colour.npy"), epochs=2, batch_size=16)
    model = fit(run, out=tmp_path / "run")
    assert model.likelihood_head.spec.word == "gaussian"
    assert model.likelihood(torch.zeros(4, 2)).mean.shape == (4, 3, 33, 47)
    assert model.likelihood_head.log_sigma.item() != pytest.approx(torch.tensor(0.3).log().item(), abs=1e-6)
    assert load_model(tmp_path / "run").shape == (3, 33, 47)


def test_bf16_is_close_to_fp32(digits):
    """One step's loss in bf16 products agrees with fp32 to the precision of bf16."""
    losses = []
    for precision in ("fp32", "bf16"):
        trainer = Trainer(override(RUNS["mlp"], precision=precision), digits, torch.device("cpu"))
        trainer.train_step()
        losses.append(float(trainer.terms[0, 0]))
    assert losses[0] == pytest.approx(losses[1], rel=5e-3)
    assert losses[0] != losses[1]


@pytest.mark.parametrize(
    ("precision", "fast", "hinted"), [("bf16", False, True), ("bf16", True, False), ("fp32", False, False)]
)
def test_bf16_that_is_slow_here_is_said_to_be(precision, fast, hinted, digits, monkeypatch, caplog):
    monkeypatch.setattr("vaelab.training.trainer.has_fast_bf16", lambda device: fast)
    with caplog.at_level(logging.INFO):
        Trainer(override(RUNS["mlp"], precision=precision), digits, torch.device("cpu"))
    (line,) = [line for line in caplog.messages if line.startswith("computing in")]
    assert line.endswith(", where fp32 is faster (--precision auto)") is hinted


def test_config_records_what_auto_was_resolved_to(tmp_path, digits):
    fit(override(RUNS["mlp"], epochs=1), digits, out=tmp_path / "run")
    content = json.loads((tmp_path / "run" / "config.json").read_text())
    assert content["resolved"]["precision"] == ("bf16" if has_fast_bf16(torch.device("cpu")) else "fp32")
    assert content["resolved"]["device"] == "cpu"
    assert content["resolved"]["threads"] == 1
    assert content["data"]["test_sha256"]


def test_a_batch_is_augmented_before_it_is_seen(digits):
    run = override(RUNS["conv-beta"], augment_prob=1.0)
    trainer = Trainer(run, digits, torch.device("cpu"))
    seen: list[Batch] = []
    original = type(run.objective).losses

    def losses(self, model, networks, batch, noise):
        seen.append(batch)
        return original(self, model, networks, batch, noise)

    type(run.objective).losses = losses
    try:
        trainer.train_step()
    finally:
        type(run.objective).losses = original
    rows = trainer.order[: len(seen[0].x)]
    assert (seen[0].x != digits.train.rows(rows).x).flatten(1).any(1).all()


def test_time_is_measured(tmp_path, digits):
    started = time.monotonic()
    fit(override(RUNS["mlp"], epochs=1), digits, out=tmp_path / "run")
    record = RunFolder.open(tmp_path / "run").history()[0]
    assert 0 < record["seconds"] <= time.monotonic() - started
    assert record["images_per_second"] > 0


@pytest.mark.parametrize("recipe_name", ["mlp", "conv-2d"])
def test_glorots_weights_have_his_scale_and_the_first_image_is_the_mean_image(digits, recipe_name):
    run = override(recipe(recipe_name), init="glorot")
    model = Trainer(run, digits, torch.device("cpu")).model
    weight = model.posterior_head.loc_and_log_scale.weight.detach()
    bound = (6 / sum(weight.shape)) ** 0.5
    assert weight.abs().max() <= bound
    assert weight.std() == pytest.approx(bound / 3**0.5, rel=0.05)
    z = torch.randn(2000, model.latent_dim, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        drawn = 1e-3 * z  # near the origin only the biases speak
        first = model.likelihood(drawn).mean.mean(0)
    mean = digits.train.mean().clamp(0.001, 0.999)
    expected = mean if recipe_name == "mlp" else torch.sigmoid(mean.logit().mean((1, 2), keepdim=True))
    assert (first - expected).abs().mean() < 0.02
    plain = Trainer(recipe(recipe_name), digits, torch.device("cpu")).model
    with torch.no_grad():
        assert (plain.likelihood(drawn).mean.mean(0) - expected).abs().mean() > 0.1


def test_the_papers_weights_are_normal_biases_too(digits):
    model = Trainer(recipe("aevb"), digits, torch.device("cpu")).model
    for layer in (model.encoder.layers[1], model.posterior_head.loc_and_log_scale, model.decoder.layers[2]):
        assert layer.weight.std().item() == pytest.approx(0.01, rel=0.05)
        assert 0.006 < layer.bias.std().item() < 0.014
        assert abs(layer.weight.mean().item()) < 0.001


def test_adagrad_takes_the_papers_step_with_a_prior_over_the_weights(digits):
    """Of each weight the gradient, and the weight over N, over the root of the sum of all their squares."""
    run = override(recipe("aevb"), batch_size=64, encoder_hidden_dims=(8,), decoder_hidden_dims=(8,), weight_decay=0.5,
                   learning_rate=0.05)  # fmt: skip
    trainer = Trainer(run, digits, torch.device("cpu"))
    before = [parameter.detach().clone() for parameter in trainer.model.parameters()]
    squares = [torch.zeros_like(parameter) for parameter in before]
    for _ in range(3):
        trainer.train_step()
        for weight, square, parameter in zip(before, squares, trainer.model.parameters(), strict=True):
            gradient = parameter.grad + 0.5 * weight
            square += gradient**2
            weight -= 0.05 * gradient / (square.sqrt() + 1e-10)
            torch.testing.assert_close(parameter.detach(), weight, rtol=1e-5, atol=1e-6)


def test_adagrad_goes_on_where_it_was(digits, tmp_path):
    run = override(recipe("mlp"), data="digits", epochs=2, optimizer="adagrad", schedule="warmup-cosine",
                   encoder_hidden_dims=(16,), decoder_hidden_dims=(16,), batch_size=256, save_every=2)  # fmt: skip
    whole = Trainer(run, digits, torch.device("cpu"))
    for _ in range(8):
        whole.train_step()
    parts = Trainer(run, digits, torch.device("cpu"))
    for _ in range(3):
        parts.train_step()
    torch.save(parts.state(), tmp_path / "state.pt")
    parts = Trainer(run, digits, torch.device("cpu"))
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    for group in state["optimizers"]["model"]["param_groups"]:
        group["fused"] = None  # as where the checkpoint is of another kind of device
    parts.load_state(state, None)
    assert parts.optimizers["model"].param_groups[0]["fused"] is True
    for _ in range(5):
        parts.train_step()
    for name, value in whole.model.state_dict().items():
        assert torch.equal(parts.model.state_dict()[name], value), name


def test_two_processes_do_not_train_into_one_folder(tmp_path, digits):
    run = override(recipe("mlp"), data="digits", epochs=1, encoder_hidden_dims=(8,), decoder_hidden_dims=(8,))
    folder = RunFolder(tmp_path / "run")
    for resume in (False, True):
        with folder.held(), pytest.raises(UsageError, match=r"another process trains into .*run: wait for it or stop"):
            fit(run, digits, out=folder.path, resume=resume)
        assert (folder.path / "history.jsonl").exists() is resume
        fit(run, digits, out=folder.path, resume=resume)
    assert len(folder.history()) == 1


def test_a_stopped_run_stays_stopped(digits):
    run = override(recipe("mlp"), data="digits", compile="off")
    trainer, other = (Trainer(run, digits, torch.device("cpu")) for _ in range(2))
    trainer.train_step()
    trainer.stopped = True
    other.load_state(trainer.state(), None)
    assert other.done


def test_every_group_is_clipped(digits):
    run = override(recipe("mlp"), data="digits", batch_size=64, clip_norm=1e-3, compile="off", precision="fp32")
    run = dataclasses.replace(run, objective=objectives.Factor(critic_dims=(8,)))
    trainer = Trainer(run, digits, torch.device("cpu"))
    trainer.train_step()
    for group in trainer.groups.values():
        assert torch.stack([p.grad.square().sum() for p in group]).sum().sqrt() < 1.01e-3


def test_a_checkpoint_holds_tensors_without_what_else_lies_in_their_storage(tmp_path):
    room = torch.arange(100_000.0)
    part, whole = room[5:15].as_strided((5, 2), (1, 5)), torch.arange(3.0)
    save_tensors(tmp_path / "a.pt", {"a": {"b": [part, 1]}, "c": whole})
    assert (tmp_path / "a.pt").stat().st_size < 5_000
    found = load_tensors(tmp_path / "a.pt")
    assert torch.equal(found["a"]["b"][0], part)
    assert found["a"]["b"][0].stride() == (1, 5)
    assert torch.equal(found["c"], whole)


@pytest.mark.parametrize(
    ("channels", "changes", "kept"), [(1, {}, True), (3, {}, False), (3, {"likelihood": "gaussian"}, False)]
)
def test_what_bf16_changes_was_measured_with_grey_images(channels, changes, kept, monkeypatch):
    """Colour has another likelihood, chosen or not, and so another model than the one that was measured."""
    given = []
    monkeypatch.setattr(
        "vaelab.training.trainer.resolve_precision", lambda *arguments: given.append(arguments[2]) or "fp32"
    )
    run = override(recipe("mlp"), **changes)
    x = torch.rand(20, channels, 8, 8, generator=torch.Generator().manual_seed(0))
    Trainer(run, v.load(x), torch.device("cpu"))
    assert recipe("mlp").bf16_gap is not None
    assert given == [recipe("mlp").bf16_gap if kept else None]

"""Several processes train what one trains: the same numbers, one folder, and an end that all hear of."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from vaelab.loading import load_model

HERE = Path(__file__).parent
FLAGS = ["mlp", "--data", "digits", "--batch-size", "96", "--threads", "1", "--precision", "fp32", "--encoder-hidden-dims", "32",
         "--decoder-hidden-dims", "32", "--latent-dim", "4"]  # fmt: skip
CONV = ["conv-beta", "--data", "digits", "--batch-size", "96", "--threads", "1", "--precision", "fp32", "--encoder-conv-channels", "4", "8",
        "--encoder-hidden-dims", "16", "--decoder-conv-channels", "8", "4", "--decoder-hidden-dims", "16",
        "--kl-warmup-epochs", "0", "--warmup-epochs", "0"]  # fmt: skip


def torchrun(count: int, *arguments: object) -> list[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    return [*launcher, *map(str, arguments)]


def train(count: int, *arguments: object) -> subprocess.CompletedProcess[str]:
    program = ["-m", "vaelab", "train", *arguments]
    command = torchrun(count, *program) if count > 1 else [sys.executable, *map(str, program)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def history(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]


def assert_same_trace(one: Path, other: Path) -> None:
    keys = ("loss", "distortion", "rate", "validation_loss", "validation_distortion", "validation_rate")
    assert [record["step"] for record in history(one)] == [record["step"] for record in history(other)]
    for a, b in zip(history(one), history(other), strict=True):
        for key in keys:
            assert a[key] == pytest.approx(b[key], rel=1e-5), f"{key} of epoch {a['epoch']}"


def assert_same_weights(one: Path, other: Path) -> None:
    first, second = load_model(one).state_dict(), load_model(other).state_dict()
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=1e-3, atol=1e-5, msg=name)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    out = tmp_path_factory.mktemp("alone") / "run"
    done = train(1, *FLAGS, "--epochs", 3, "--clip-norm", 5, "--out", out)
    assert done.returncode == 0, done.stderr
    return out


def test_two_processes_train_the_same_model(alone, tmp_path):
    done = train(2, *FLAGS, "--epochs", 3, "--clip-norm", 5, "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert_same_trace(alone, tmp_path / "run")
    assert_same_weights(alone, tmp_path / "run")
    assert sorted(os.listdir(tmp_path / "run")) == sorted(os.listdir(alone)), "one process writes"
    assert done.stderr.count("epoch 3, validation") == 1, "and says so"


def test_batch_norm_and_dropout_train_too_and_all_keep_the_same_running_means(tmp_path):
    """Each process normalises its own rows: another trace, and one model that all validate."""
    done = train(2, *CONV, "--epochs", 2, "--ema-decay", 0.9, "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    losses = [record["validation_loss"] for record in history(tmp_path / "run")]
    assert losses[1] < losses[0]


def test_several_nodes(alone, tmp_path):
    """Two launchers with a process each, as on two machines."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launchers = [
        subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--node-rank", str(rank), "--master-addr",
             "127.0.0.1", "--master-port", str(port), "-m", "vaelab", "train", *FLAGS, "--epochs", "3",
             "--clip-norm", "5", "--out", str(tmp_path / "run")],
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    for launcher in launchers:
        _, errors = launcher.communicate(timeout=300)
        assert launcher.returncode == 0, errors
    assert_same_trace(alone, tmp_path / "run")


def test_a_batch_that_cannot_be_shared_is_refused(tmp_path):
    done = train(2, *FLAGS, "--batch-size", 33, "--epochs", 1, "--out", tmp_path / "run")
    assert done.returncode != 0
    message = (
        "vaelab (process 0): a batch of 33 cannot be shared by 2 processes: choose a --batch-size that their number"
    )
    assert message in done.stderr


def test_a_process_that_is_killed_ends_the_training_and_others_go_on_with_it(alone, tmp_path):
    """With another number of processes: the run is the same."""
    out = tmp_path / "run"
    flags = ["train", *FLAGS, "--epochs", 3, "--clip-norm", 5, "--out", out]
    done = subprocess.run(
        torchrun(2, HERE / "killed.py", "rank1:20", *flags), capture_output=True, text=True, timeout=300
    )
    assert done.returncode != 0
    assert "vaelab (process 0): another process of this training has gone" in done.stderr
    assert "last.pt keeps step 14" in done.stderr
    assert len(history(out)) == 1
    again = train(4, *FLAGS, "--epochs", 3, "--clip-norm", 5, "--out", out, "--resume")
    assert again.returncode == 0, again.stderr
    assert_same_trace(alone, out)
    assert_same_weights(alone, out)


def test_all_stop_after_the_same_step_and_one_goes_on(tmp_path):
    out = tmp_path / "run"
    flags = [*FLAGS, "--epochs", "40", "--out", str(out)]
    running = subprocess.Popen(
        torchrun(2, "-m", "vaelab", "train", *flags), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 120
        while not (out / "history.jsonl").exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        os.killpg(running.pid, signal.SIGINT)
        _, errors = running.communicate(timeout=120)
    finally:
        if running.poll() is None:
            os.killpg(running.pid, signal.SIGKILL)
    assert "and saved" in errors, errors
    step = torch.load(out / "last.pt")["step"]
    assert step > 0
    again = train(1, *flags, "--resume")
    assert again.returncode == 0, again.stderr
    assert f"resumed at step {step}" in again.stderr
    whole = train(1, *FLAGS, "--epochs", 40, "--out", tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    assert_same_trace(tmp_path / "whole", out)

"""Several processes train what one trains: the same numbers, one folder, and an end that all hear of."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from vaelab import recipes
from vaelab.cli import main
from vaelab.config import override
from vaelab.errors import FailureError, LostProcessError, UsageError
from vaelab.processes.distributed import Team, launched, leads, team
from vaelab.processes.sharing import SharedMemory, Table
from vaelab.runs.loading import load_model
from vaelab.train import fit
from vaelab.training.compiling import can_compile
from vaelab.training.trainer import Trainer

HERE = Path(__file__).parent
CPU = torch.device("cpu")
FLAGS = ["mlp", "--data", "digits", "--batch-size", "96", "--threads", "1", "--precision", "fp32", "--encoder-hidden-dims", "32",
         "--decoder-hidden-dims", "32", "--latent-dim", "4"]  # fmt: skip
CONV = ["conv-beta", "--data", "digits", "--batch-size", "96", "--threads", "1", "--precision", "fp32", "--encoder-conv-channels", "4", "8",
        "--encoder-hidden-dims", "16", "--decoder-conv-channels", "8", "4", "--decoder-hidden-dims", "16",
        "--kl-warmup-epochs", "0", "--warmup-epochs", "0"]  # fmt: skip


def torchrun(count: int, *arguments: object) -> list[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    return [*launcher, *map(str, arguments)]


def train(count: int, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = torchrun(count, "-m", "vaelab", "train", *arguments)
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def train_alone(*arguments: object) -> None:
    assert main(["train", *map(str, arguments)]) == 0


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
    train_alone(*FLAGS, "--epochs", 3, "--clip-norm", 5, "--out", out)
    return out


def test_two_processes_train_the_same_model(alone, tmp_path):
    done = train(2, *FLAGS, "--epochs", 3, "--clip-norm", 5, "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert_same_trace(alone, tmp_path / "run")
    assert_same_weights(alone, tmp_path / "run")
    assert sorted(os.listdir(tmp_path / "run")) == sorted(os.listdir(alone)), "one process writes"
    assert done.stderr.count("epoch 3, validation") == 1, "and says so"


@pytest.mark.skipif(not can_compile(torch.device("cpu")), reason="no C++ compiler here")
def test_two_processes_with_compiled_steps_train_the_same_model(alone, tmp_path):
    """Gradients from one function, the optimizer's step from another, and the weights of the plain run."""
    flags = [*FLAGS, "--epochs", 3, "--clip-norm", 5, "--compile", "on", "--out", tmp_path / "run"]
    done = train(2, *flags)
    assert done.returncode == 0, done.stderr
    assert "compiling the training step" in done.stderr
    assert "slower without" not in done.stderr
    assert "2 processes, which share memory" in done.stderr
    assert_same_trace(alone, tmp_path / "run")
    assert_same_weights(alone, tmp_path / "run")


def test_a_process_that_is_killed_ends_the_training_and_others_go_on_with_it(alone, tmp_path):
    """With another number of processes: what is saved within an epoch has the terms of all, and the run is the same."""
    out = tmp_path / "run"
    flags = [*FLAGS, "--epochs", 3, "--clip-norm", 5, "--save-every", 4, "--out", out]
    done = subprocess.run(
        torchrun(2, HERE / "killed.py", "rank1:23", "train", *flags), capture_output=True, text=True, timeout=300
    )
    assert done.returncode != 0
    assert "vaelab (process 0): another process of this training has gone" in done.stderr
    assert "last.pt keeps step 20" in done.stderr
    assert len(history(out)) == 1
    again = train(4, *flags, "--resume")
    assert again.returncode == 0, again.stderr
    assert_same_trace(alone, out)
    assert_same_weights(alone, out)


class Post:
    """The messages of processes that are threads here: each waits for the other, as with gloo."""

    def __init__(self, monkeypatch, world):
        self.world, self.sizes = world, []
        self._barrier = threading.Barrier(world, timeout=20)
        self._mail = [None] * world
        self.rank = threading.local()
        monkeypatch.setattr(torch.distributed, "all_reduce", self.all_reduce)

    def all_reduce(self, values):
        self._mail[self.rank.now] = values.clone()
        self._barrier.wait()
        total = sum(self._mail)
        self._barrier.wait()
        values.copy_(total)
        if self.rank.now == 0:
            self.sizes.append(values.numel())

    def each(self, work):
        def start(rank):
            self.rank.now = rank
            return work(rank)

        with ThreadPoolExecutor(self.world) as pool:
            return list(pool.map(start, range(self.world)))


@pytest.mark.parametrize("world", [2, 3])
def test_what_lies_in_shared_memory_is_averaged_as_messages_are(monkeypatch, shared, world):
    count, post = 20_000, Post(monkeypatch, world)
    given = torch.randn(world, 5, count, generator=torch.Generator().manual_seed(0))
    small = torch.randn(world, 7, generator=torch.Generator().manual_seed(1))
    large = torch.randn(world, count + 1, generator=torch.Generator().manual_seed(2))
    teams = [Team(rank, world, memory) for rank, memory in enumerate(shared(world))]

    def mean(rank, values):
        teams[rank].average_(values := values.clone())
        return values

    def averaged(rank):
        some = [mean(rank, given[rank, call]) for call in range(5)]
        few = mean(rank, small[rank])
        parts = [part.clone() for part in given[rank, 0, :17_000].view(17, 1000).mT.split([400, 600])]
        teams[rank].average_(*parts)
        return some, few, torch.cat(parts).mT.reshape(-1), mean(rank, large[rank])

    results = post.each(averaged)
    for some, few, again, much in results:
        for call in range(5):
            torch.testing.assert_close(some[call], given[:, call].mean(0))
            assert torch.equal(some[call], results[0][0][call]), "all have the same bits"
        torch.testing.assert_close(few, small.mean(0))
        torch.testing.assert_close(again, given[:, 0, :17_000].mean(0))
        torch.testing.assert_close(much, large.mean(0))
    assert post.sizes == [count + 3], "a message only of what there is no room for"


@pytest.mark.parametrize("count", [7, 20_000])
def test_a_wish_to_stop_is_heard_by_all_with_the_next_average(monkeypatch, shared, count):
    post = Post(monkeypatch, 2)
    teams = [Team(rank, 2, memory) for rank, memory in enumerate(shared(2))]

    def ask(rank):
        heard = []
        for step in range(4):
            teams[rank].average_(torch.zeros(count))
            heard.append(teams[rank].ask(stop=rank == 1 and step == 1))
        return heard

    assert post.each(ask) == [[False, False, True, False]] * 2


def has_memory(team, *wanted):
    team.share_memory(*wanted)
    return team.memory is not None


def test_without_room_everything_goes_by_message(monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    sent = []
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(os, "posix_fallocate", full)
    monkeypatch.setattr(torch.distributed, "broadcast_object_list", sent.append)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda values: values.mul_(2))
    before = os.listdir("/proc/self/fd")
    assert not has_memory(Team(0, 2), 20_000, 3, CPU)
    assert sent == [[None]], "and all others hear of it"
    assert os.listdir("/proc/self/fd") == before


@pytest.mark.parametrize("missing", ["memory", "table"])
def test_memory_that_one_process_cannot_open_is_used_by_none(monkeypatch, tmp_path, missing):
    (tmp_path / "memory").write_bytes(bytes(SharedMemory.size(20_000, 2, 3)))
    votes = []
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(
        torch.distributed, "all_reduce", lambda values: votes.append(float(values[0])) or values.mul_(2)
    )
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("")
        listening.listen(1)

        def given(told):
            memory = tmp_path / ("no/where" if missing == "memory" else "memory")
            told[0] = (str(memory), b"\0nobody" if missing == "table" else listening.getsockname())

        monkeypatch.setattr(torch.distributed, "broadcast_object_list", given)
        before = os.listdir("/proc/self/fd")
        assert not has_memory(Team(1, 2), 20_000, 3, CPU)
        assert os.listdir("/proc/self/fd") == before
    assert votes == [0.0]


def test_only_this_users_processes_are_met(monkeypatch):
    users = iter([os.getuid() + 1, os.getuid()])
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("")
        listening.listen(2)
        stranger, friend = (Table.at(listening.getsockname()) for _ in range(2))
        leader = Table(leads=True)
        monkeypatch.setattr(os, "getuid", lambda: next(users))
        leader.seat(listening, 1)
    with contextlib.closing(stranger), contextlib.closing(friend), contextlib.closing(leader):
        with ThreadPoolExecutor(1) as pool:
            met = pool.submit(friend.meet, [1.0, 2.0])
            assert leader.meet([3.0, 4.0]) == met.result() == (4.0, 6.0)
        with pytest.raises(FailureError, match="another process of this training has gone"):
            stranger.meet([1.0, 2.0])


def test_rows_are_for_one_exchange(monkeypatch, shared):
    """Later another process may still read what was written there."""
    post = Post(monkeypatch, 2)
    teams = [Team(rank, 2, memory) for rank, memory in enumerate(shared(2))]

    def exchange(rank):
        teams[rank].exchange_(rows := teams[rank].rows(10, torch.zeros(())))
        with pytest.raises(ValueError, match="an exchange before"):
            teams[rank].exchange_(rows)
        return True

    assert post.each(exchange) == [True, True]


@pytest.mark.parametrize("gone", [0, 1])
def test_who_waits_for_a_process_that_has_gone_is_told(shared, gone):
    memories = shared(2)
    memories[gone].close()
    left = Team(1 - gone, 2, memories[1 - gone])
    for wait in (lambda: left.average_(torch.zeros(20_000)), left.sums):
        with pytest.raises(FailureError, match="another process of this training has gone"):
            wait()


def test_what_all_have_in_common_is_changed_by_one_for_all(shared):
    """Until each has its own again; shapes, strides and values stay."""
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(3, 2, 4, 5, generator=generator).to(memory_format=torch.channels_last), torch.ones(7)]
    both = [[[torch.nn.Parameter(t.clone()) for t in weights], [2 * t.contiguous() for t in weights]] for _ in range(2)]
    memories = shared(2, count=200, kinds=2)
    vectors = [memory.adopt(*kinds) for memory, kinds in zip(memories, both, strict=True)]
    for kinds in both:
        for factor, tensors in enumerate(kinds, 1):
            for ours, expected in zip(tensors, weights, strict=True):
                assert torch.equal(ours, factor * expected)
                assert ours.stride() == expected.stride()
    assert [vector.shape for vector in vectors[0]] == [(127,), (127,)]
    as_they_lie = torch.cat([weights[0].permute(0, 2, 3, 1).flatten(), weights[1]])
    assert torch.equal(vectors[0][0], as_they_lie)
    assert torch.equal(vectors[0][1], 2 * as_they_lie), "the other kind lies as the first does"
    vectors[0][0][120:] = 5  # the other's
    assert torch.equal(both[1][0][1].detach(), torch.full((7,), 5.0))
    for memory in memories:
        memory.release()
    vectors[0][0].zero_()
    for kinds in both:
        assert torch.equal(kinds[0][0], weights[0])
        assert kinds[0][0].stride() == weights[0].stride()
        assert torch.equal(kinds[0][1].detach(), torch.full((7,), 5.0))


def test_sums_over_processes_are_told_from_an_exchange(monkeypatch, shared):
    post = Post(monkeypatch, 2)
    teams = [Team(rank, 2, memory) for rank, memory in enumerate(shared(2))]
    assert post.each(lambda rank: teams[rank].sums(1.5 + rank, 10.0)) == [(4.0, 20.0)] * 2

    def apart(rank):
        with pytest.raises(FailureError, match="not at the same step"):
            teams[rank].sums(0.0) if rank else teams[rank].average_(torch.zeros(20_000))
        return True

    assert post.each(apart) == [True, True]


@pytest.mark.parametrize(
    ("world", "local", "count", "device"),
    [
        (1, "1", 20_000, "cpu"),
        (2, "1", 20_000, "cpu"),
        (9, "9", 20_000, "cpu"),
        (2, "2", 20_000, "cuda"),
    ],
)
def test_memory_is_shared_only_where_it_helps(monkeypatch, world, local, count, device):
    """By several processes, not too many, all on one machine, on a CPU; nobody is asked."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", local)
    monkeypatch.setattr(torch.distributed, "broadcast_object_list", None)
    assert not has_memory(Team(0, world), count, 3, torch.device(device))


@pytest.mark.parametrize("other", [19_999, 20_001])
def test_processes_that_are_not_at_the_same_step_are_told(monkeypatch, shared, other):
    """One averages its gradients, the other something else, for which there may be no room in the shared memory."""
    post = Post(monkeypatch, 2)
    teams = [Team(rank, 2, memory) for rank, memory in enumerate(shared(2))]

    def average(rank):
        with pytest.raises(FailureError, match="not at the same step"):
            teams[rank].average_(torch.zeros((20_000, other)[rank]))
        return True

    assert post.each(average) == [True, True]


@pytest.mark.parametrize("able", [(True, True), (True, False), (False, False)])
def test_all_must_agree(monkeypatch, able):
    post = Post(monkeypatch, 2)
    assert post.each(lambda rank: Team(rank, 2).agree(able[rank])) == [all(able)] * 2
    assert [Team().agree(yes) for yes in able] == list(able)


EACH_KEEPS_ITS_MODEL = """
import runpy, sys, torch
from vaelab.training.trainer import Trainer

def end_epoch(trainer, plain=Trainer.end_epoch):
    record = plain(trainer)
    state = {**trainer.model.state_dict(), **trainer.average.state_dict()}
    torch.save(state, f"{sys.argv[-1]}-of-{trainer.team.rank}.pt")
    return record

Trainer.end_epoch = end_epoch
runpy.run_module("vaelab", run_name="__main__")
"""


def test_batch_norm_and_dropout_train_too_and_all_keep_the_same_running_means(tmp_path):
    """Each process normalises its own rows: another trace, and one model that all validate."""
    (tmp_path / "each.py").write_text(EACH_KEEPS_ITS_MODEL)
    flags = [*CONV, "--epochs", 2, "--ema-decay", 0.9, "--out", tmp_path / "run"]
    done = subprocess.run(
        torchrun(2, tmp_path / "each.py", "train", *flags), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    losses = [record["validation_loss"] for record in history(tmp_path / "run")]
    assert losses[1] < losses[0]
    one, other = (torch.load(tmp_path / f"run-of-{rank}.pt") for rank in range(2))
    assert sum("running_mean" in name for name in one) > 1, "of the model and of its average"
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_several_nodes(alone, tmp_path):
    """Two launchers with a process each, as on two machines; compiled, where there is a compiler."""
    compiled = can_compile(CPU)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launchers = [
        subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--node-rank", str(rank), "--master-addr",
             "127.0.0.1", "--master-port", str(port), "-m", "vaelab", "train", *FLAGS, "--epochs", "3",
             "--clip-norm", "5", "--compile", "on" if compiled else "off", "--out", str(tmp_path / "run")],
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    said = [launcher.communicate(timeout=300)[1] for launcher in launchers]
    assert [launcher.returncode for launcher in launchers] == [0, 0], said
    assert "2 processes, which send each other messages" in said[0]
    assert ("compiling the training step" in said[0]) == compiled
    assert "slower without" not in "".join(said)
    assert_same_trace(alone, tmp_path / "run")


def test_each_process_drops_units_of_its_own(digits):
    """What torch's global generator gives depends on seed, step and process; the first one's is that of one alone."""
    trainer = Trainer(override(recipes.conv_beta(), batch_size=24, dropout=0.5, compile="off"), digits, CPU)
    drawn = []

    def step(objective, batch, noise):
        drawn.append(torch.rand(4))
        return torch.zeros(len(trainer.names))

    trainer._take_step = step
    for at, rank, world in ((0, 0, 1), (0, 0, 2), (0, 1, 2), (1, 0, 2), (1, 1, 2), (0, 1, 2)):
        trainer.step, trainer.team = at, Team(rank, world)
        torch.manual_seed(9)
        trainer.train_step()
    alone, first, second, later, later_second, again = drawn
    assert torch.equal(alone, first)
    assert torch.equal(again, second)
    assert len(torch.stack([first, second, later, later_second]).unique(dim=0)) == 4


def test_a_batch_that_cannot_be_shared_is_refused(digits):
    with pytest.raises(UsageError, match="a batch of 33 cannot be shared by 2 processes: choose a --batch-size that "):
        Trainer(override(recipes.mlp(), batch_size=33), digits, CPU, Team(0, 2))


@pytest.mark.parametrize("error", [LostProcessError, FailureError])
def test_the_line_about_a_lost_process_is_not_cut_off_by_the_signal_that_follows(tmp_path, monkeypatch, error):
    """torchrun ends all processes when one has gone; after any other failure the signal means what it meant before."""
    calls = []

    def lose(trainer):
        calls.append(trainer.step)
        raise error("gone")

    monkeypatch.setattr(Trainer, "train_step", lose)
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(error, match=r"gone; no checkpoint had been saved yet"):
            fit(override(recipes.mlp(), data="digits", epochs=1), out=tmp_path / "run")
        assert (signal.getsignal(signal.SIGTERM) == before) == (error is FailureError)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert calls == [0]


def test_each_process_computes_on_its_gpu_from_the_start(monkeypatch):
    """And stays there: what names no device, such as an exchange, would take the first."""
    calls = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "set_device", calls.append)
    monkeypatch.setattr(torch.distributed, "init_process_group", calls.append)
    for name, result in {"get_rank": 1, "get_world_size": 2, "barrier": None, "destroy_process_group": None}.items():
        monkeypatch.setattr(torch.distributed, name, lambda result=result: result)
    with team(torch.device("cuda", 1)) as joined:
        assert (joined.rank, joined.world) == (1, 2)
    assert calls == [torch.device("cuda", 1), "cpu:gloo,cuda:nccl"]


def test_a_command_to_go_on_is_of_as_many_processes(monkeypatch):
    words = ["train", "mlp", "--out", "my run"]
    assert launched(words) == "vaelab train mlp --out 'my run'"
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    whole = "--nproc-per-node 4 -m vaelab train mlp --out 'my run'"
    assert launched(words) == f"torchrun --standalone {whole}"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    several = f"torchrun {whole.replace('4', '2')}, on each machine, with --nnodes and --rdzv-endpoint as before"
    assert launched(words) == several


def test_a_rank_without_others_is_no_reason_to_write_nothing(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert leads()
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert not leads()


def test_all_stop_after_the_same_step_and_one_goes_on(tmp_path, caplog):
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
    said = [line for line in errors.splitlines() if line.startswith("vaelab")]
    again = f"go on with: torchrun --standalone --nproc-per-node 2 -m vaelab train mlp --out {out} --resume"
    assert len(said) == 1, errors
    assert said[0].endswith(f"and saved; {again}")
    step = torch.load(out / "last.pt")["step"]
    assert step > 0
    train_alone(*flags, "--resume")
    assert f"resumed at step {step}" in caplog.text
    train_alone(*FLAGS, "--epochs", 40, "--out", tmp_path / "whole")
    assert_same_trace(tmp_path / "whole", out)

"""Noise is a function of (seed, stream, step) and of nothing else; schedules are functions of the step."""

import contextlib
import math
import os
import platform
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vaelab import schedules, specs
from vaelab.config import override
from vaelab.errors import UsageError
from vaelab.recipes import recipe
from vaelab.runtime import (
    RowNoise,
    StepNoise,
    cpu_name,
    epoch_order,
    generator,
    has_fast_bf16,
    prefers_onednn,
    resolve_device,
    resolve_precision,
    seeded,
)
from vaelab.train import fit
from vaelab.training.trainer import Trainer


def test_noise_depends_on_seed_stream_and_step_alone():
    a = StepNoise(0, 3).normal("z", (4, 5))
    torch.manual_seed(99)
    assert torch.equal(a, StepNoise(0, 3).normal("z", (4, 5)))
    for other in (
        StepNoise(1, 3).normal("z", (4, 5)),
        StepNoise(0, 4).normal("z", (4, 5)),
        StepNoise(0, 3).normal("y", (4, 5)),
    ):
        assert not torch.equal(a, other)
        assert abs(torch.corrcoef(torch.stack([a.flatten(), other.flatten()]))[0, 1]) < 0.7


@pytest.mark.parametrize("step", [0, 63, 64, 1000])
def test_a_steps_noise_is_that_of_its_seed_stream_and_number(step):
    drawn = torch.randn([4, 5], generator=generator(7, "z", step))
    assert torch.equal(StepNoise(7, step).normal("z", (4, 5)), drawn)


def test_streams_are_uncorrelated_and_of_the_right_law():
    z = torch.stack([StepNoise(0, step).normal("z", (1000,)) for step in range(50)])
    assert abs(z.mean()) < 0.02
    assert abs(z.var() - 1) < 0.03
    off = torch.corrcoef(z) - torch.eye(50)
    assert off.abs().max() < 0.2
    u = StepNoise(0, 0).uniform("u", (10_000,))
    assert u.min() >= 0
    assert u.max() < 1
    assert abs(u.mean() - 0.5) < 0.02


def test_a_seeded_block_draws_from_its_seed_and_leaves_the_global_generator_as_it_was():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    with seeded(7):
        drawn = torch.rand(3)
    assert torch.equal(torch.rand(3), expected)
    with seeded(7):
        assert torch.equal(torch.rand(3), drawn)
    assert not torch.equal(drawn, expected)


def test_a_seeded_block_seeds_the_generator_of_a_gpu_too_and_restores_it(monkeypatch):
    done, device = [], torch.device("cuda:0")
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: f"state of {device}")
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: done.append((state, device)))
    monkeypatch.setattr(torch.cuda, "manual_seed", done.append)
    with seeded(7, device):
        assert done == [7]
        assert torch.default_generator.initial_seed() == 7
    assert done == [7, ("state of cuda:0", device)]


@pytest.mark.parametrize("world", [2, 4])
def test_processes_see_their_rows_of_the_global_draw(world):
    whole = StepNoise(0, 7).normal("z", (8, 3))
    parts = [StepNoise(0, 7, rank=rank, world=world).normal("z", (8 // world, 3)) for rank in range(world)]
    assert torch.equal(whole, torch.cat(parts))


@given(st.integers(1, 700), st.integers(1, 300))
def test_row_noise_belongs_to_rows_not_to_batches(rows, batch):
    whole = RowNoise(5).normal("z", (rows, 2))
    parts = [RowNoise(5, start).normal("z", (min(batch, rows - start), 2)) for start in range(0, rows, batch)]
    assert torch.equal(whole, torch.cat(parts))


def test_epoch_order_is_a_permutation_that_changes_every_epoch():
    first, second = epoch_order(100, 0, 0), epoch_order(100, 0, 1)
    assert sorted(first.tolist()) == list(range(100))
    assert not torch.equal(first, second)
    assert torch.equal(first, epoch_order(100, 0, 0))


def test_precision_is_proven_before_auto_takes_it(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setattr("vaelab.runtime.cpu_flags", lambda: {"amx_bf16"})
    assert resolve_precision("auto", cpu, None) == "fp32"
    assert resolve_precision("auto", cpu, 0.31) == resolve_precision("auto", cpu, -0.31) == "fp32"
    assert resolve_precision("auto", cpu, 0.29) == "bf16"
    assert resolve_precision("auto", cpu, -0.05) == "bf16"
    monkeypatch.setattr("vaelab.runtime.cpu_flags", lambda: {"avx2"})
    assert resolve_precision("auto", cpu, -0.05) == "fp32"
    assert resolve_precision("bf16", cpu, None) == "bf16"


@pytest.mark.parametrize(
    ("vendor", "flags", "expected"),
    [("GenuineIntel", "avx512_bf16 amx_bf16", True), ("GenuineIntel", "avx512_bf16", False),
     ("AuthenticAMD", "avx512_bf16", True), ("AuthenticAMD", "avx512f", False)],
)  # fmt: skip
def test_bf16_is_fast_on_tile_units_and_where_its_instruction_has_the_full_rate(monkeypatch, vendor, flags, expected):
    monkeypatch.setattr("vaelab.runtime._cpu_info", lambda: f"vendor_id\t: {vendor}\nflags\t\t: {flags}\n")
    assert has_fast_bf16(torch.device("cpu")) is expected
    assert not has_fast_bf16(torch.device("mps"))


@pytest.mark.parametrize(
    ("vendor", "family", "flags", "expected"),
    [("AuthenticAMD", 26, "fma avx512f", True), ("AuthenticAMD", 25, "fma avx512f", False),
     ("AuthenticAMD", 26, "fma avx2", False), ("GenuineIntel", 26, "fma avx512f", False)],
)  # fmt: skip
def test_onednn_is_preferred_where_mkl_leaves_half_of_the_units_idle(monkeypatch, vendor, family, flags, expected):
    first = (
        f"processor\t: 0\nvendor_id\t: {vendor}\ncpu family\t: {family}\nmodel name\t: Some: CPU\nflags\t\t: {flags}\n"
    )
    monkeypatch.setattr("vaelab.runtime._cpu_info", lambda: first + first.replace("Some", "Other"))
    assert prefers_onednn(torch.device("cpu")) is (expected and torch.backends.mkldnn.is_available())
    assert cpu_name() == "Some: CPU"


def test_a_system_that_says_nothing_of_its_processor_has_one(monkeypatch):
    monkeypatch.setattr("vaelab.runtime._cpu_info", lambda: "")
    assert not prefers_onednn(torch.device("cpu"))
    assert cpu_name()


def test_a_device_that_is_not_there_is_named():
    assert resolve_device("auto").type in ("cpu", "cuda")
    with pytest.raises(UsageError, match="--device tpu9"):
        resolve_device("tpu9")


def test_each_process_of_a_machine_has_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name in ("auto", "cuda"):
        assert resolve_device(name) == torch.device("cuda", 0)
        with monkeypatch.context() as second:
            second.setenv("LOCAL_RANK", "1")
            assert resolve_device(name) == torch.device("cuda", 1)
            second.setenv("LOCAL_RANK", "2")
            with pytest.raises(UsageError, match="no GPU is left for process 2: start 2 at most"):
                resolve_device(name)
            second.setattr(torch.cuda, "device_count", lambda: 1)
            assert resolve_device(name) == torch.device("cuda", 0), "the one that a launcher shows it"


@given(st.floats(0, 2000, allow_nan=False))
def test_schedules_stay_within_their_ends(step):
    for schedule in (schedules.linear(1.0, 3.0, 100), schedules.cosine(3.0, 1.0, 100), schedules.cyclic(1.0, 3.0, 20)):
        assert 1.0 - 1e-9 <= schedule(step) <= 3.0 + 1e-9


def test_cosine_is_halfway_at_half_time_and_stays_at_its_end():
    cosine = schedules.cosine(3.0, 1.0, 100)
    assert cosine(0) == 3.0
    assert math.isclose(cosine(50), 2.0)
    assert cosine(100) == cosine(1e6) == 1.0


def test_a_warm_up_is_followed_by_half_a_cosine_over_what_is_left_of_the_run():
    """Of 4 epochs of 10 steps one rises; a quarter, half and all of the other 30 steps later."""
    schedule = specs.WarmupCosine(base_lr=0.1, max_lr=0.5, warmup_epochs=1).schedule(10, 4)
    eighth = 0.1 + 0.4 * (1 + math.cos(math.pi / 4)) / 2
    expected = {0: 0.1, 5: 0.3, 10: 0.5, 17.5: eighth, 25: 0.3, 40: 0.1}
    assert {step: schedule(step) for step in expected} == pytest.approx(expected)
    half = specs.WarmupCosine(base_lr=0.1, max_lr=0.5, warmup_epochs=0.5).schedule(10, 4)
    assert (half(5), half(22.5)) == pytest.approx((0.5, 0.3))


def test_a_warm_up_longer_than_the_run_is_cut_to_it():
    """All of its 20 steps rise."""
    schedule = specs.WarmupCosine(base_lr=0.1, max_lr=0.5, warmup_epochs=9).schedule(10, 2)
    assert [schedule(step) for step in (0, 10, 19)] == pytest.approx([0.1, 0.3, 0.48])


@pytest.mark.parametrize("epochs", [1, 2, 30])
def test_cycles_are_as_long_in_every_run(epochs):
    schedule = specs.Cyclic(base_lr=0.1, max_lr=0.5, cycle_epochs=2).schedule(10, epochs)
    assert [schedule(step) for step in (0, 5, 10, 20, 25)] == pytest.approx([0.1, 0.3, 0.5, 0.1, 0.3])


@pytest.mark.skipif(sys.platform != "linux" or platform.libc_ver()[0] != "glibc", reason="glibc's own setting")
def test_freed_memory_is_kept():
    """Pages that a process takes from the system for a piece that it has had before: none."""
    program = """
import resource, torch
from vaelab.runtime import keep_freed_memory
if {}:
    keep_freed_memory()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
    torch.ones(2_000_000)
before = faults()
for _ in range(20):
    torch.ones(2_000_000), torch.ones(1_500_000)
print(faults() - before)
"""
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072"}  # as where nothing large was freed before
    kept, taken = (
        int(subprocess.run([sys.executable, "-c", program.format(keep)], env=environment, capture_output=True,
                           text=True, check=True).stdout)
        for keep in (True, False)
    )  # fmt: skip
    assert kept < taken / 10


FLUSHED = """
import torch
from vaelab.runtime import denormals_flushed
torch.set_num_threads(2)
x = torch.full((1_000_000,), 1e-30)
tiny = lambda: int((x * 1e-10 != 0).sum())
print(tiny())  # this starts torch's threads
with denormals_flushed():
    print(tiny(), int((x * 1e-7 != 0).sum()))
    with denormals_flushed():
        torch.set_num_threads(4)
    print(tiny())
print(tiny())
"""


@pytest.mark.skipif(sys.platform != "linux" or platform.machine() != "x86_64", reason="other processors are fast at it")
def test_denormals_are_zero_inside_of_the_block_in_all_threads():
    """In those that were there before, and in those that come later; what is small and normal stays."""
    done = subprocess.run([sys.executable, "-c", FLUSHED], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1000000", "0", "1000000", "0", "1000000"]


@pytest.mark.skipif(not torch.set_flush_denormal(False), reason="this processor has no such setting")
def test_a_trainings_steps_flush_them_and_nothing_else_does(digits, monkeypatch):
    tiny, seen = torch.tensor(1e-30), []
    step = Trainer.train_step

    def taken(trainer):
        seen.append(bool(tiny * 1e-10 == 0))
        step(trainer)

    monkeypatch.setattr(Trainer, "train_step", taken)
    run = override(recipe("mlp"), data="digits", epochs=1, batch_size=500, kl_warmup_epochs=0)
    fit(run, data=digits, on_epoch_end=[lambda _: seen.append(bool(tiny * 1e-10 != 0))])
    assert len(seen) > 2
    assert all(seen)
    assert tiny * 1e-10 != 0

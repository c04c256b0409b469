"""The command line as a user meets it: every wrong input gets one clear line, the right exit code, and harms nothing."""

import errno
import io
import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vaelab import cli
from vaelab.cli import COMMANDS, main, training
from vaelab.errors import InterruptedRun, UsageError
from vaelab.progress import Bar
from vaelab.recipes import RECIPES
from vaelab.runs import checkpoint

TRAIN = ["train", "mlp", "--data", "digits", "--epochs", "1"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "mlp"
    assert main([*TRAIN, "--beta", "0.5", "--out", str(out)]) == 0
    return out


def complaint(capsys) -> str:
    """The one line that a failing command prints."""
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith("vaelab: ")]
    assert len(lines) == 1, error
    assert "Traceback" not in error
    return lines[0]


# --- what works -----------------------------------------------------------------------------------------------------


def timed(*arguments: str) -> tuple[float, str]:
    """What a process of Python's takes, in seconds of processor time, and what it prints."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = subprocess.run([sys.executable, *arguments], capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert result.returncode == 0, result.stderr
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, result.stdout


@pytest.fixture(scope="module")
def seconds_of_torch() -> float:
    """What importing torch takes; the machine may be busy: the least."""
    return min(timed("-c", "import torch")[0] for _ in range(2))


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["train", "conv-beta", "--help"], ["recipes"]])
def test_help_answers_at_once(arguments, seconds_of_torch):
    """In a third of the processor time that importing torch takes, whatever the machine."""
    answers = [timed("-m", "vaelab", *arguments) for _ in range(2)]
    assert min(seconds for seconds, _ in answers) < seconds_of_torch / 3
    assert all(name in answers[0][1] for name in (COMMANDS if arguments == ["--help"] else []))


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command, capsys):
    assert main([command, "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "usage" in shown.lower()
    for nothing in ("None", "(default: )", "(default: False)"):
        assert nothing not in shown


def test_help_names_each_default_once(capsys):
    """A flag that may be left out says in words what that means; one that has a value says which."""
    assert main(["evaluate", "--help"]) == 0
    lines = [" ".join(line.strip("│ ").split()) for line in capsys.readouterr().out.splitlines()]
    shown = " ".join(lines)
    assert "--num-samples INT importance samples per image (default: the preset's)." in shown
    assert "--memory INT MiB that activations may take. (default: 1024)" in shown
    assert "--preset {quick,paper} quick:" in shown
    assert "as the run was trained, and dynamic besides where" in shown, "a paragraph is broken where the source is"
    assert main(["train", "conv-beta", "--help"]) == 0
    shown = " ".join(" ".join(line.strip("│ ").split()) for line in capsys.readouterr().out.splitlines())
    assert "--image-size INT INT height" in shown
    assert "--likelihood {bernoulli," in shown
    assert "--encoder {mlp,conv,residual} kind of encoder (default: conv)" in shown
    assert "--clip-norm {None}|FLOAT" in shown, "clipping can be switched off"
    assert (
        "--encoder-batch-norm, --no-encoder-batch-norm batch normalisation after each convolution (default: True)"
        in shown
    )


def test_brackets_of_a_usage_are_shown(capsys):
    assert main(["--help"]) == 0
    assert "[any setting]" in " ".join(capsys.readouterr().out.split())


def test_brackets_of_a_path_are_shown(run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(run, "run[a]")
    assert main(["evaluate", "run[a]", "--only", "elbo"]) == 0
    assert "run[a]: digits test" in " ".join(capsys.readouterr().out.split())
    Bar().say("into run[a]")
    assert "into run[a]" in capsys.readouterr().err


def test_recipes_lists_all_with_their_published_numbers(capsys):
    assert main(["recipes"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in RECIPES)
    assert "71.16" in out


def test_sample_reconstruct_and_animate_write_pictures(run, tmp_path, capsys):
    assert main(["sample", str(run), "--num", "5", "--seed", "3"]) == 0
    assert main(["reconstruct", str(run), "--num", "4", "--out", str(tmp_path / "r.png")]) == 0
    assert main(["animate", str(run), "--digits", "314", "--frames", "3"]) == 0
    written = capsys.readouterr().out.split()
    assert written == [str(run / "sample-seed3.png"), str(tmp_path / "r.png"), str(run / "animate-314.gif")]
    for path in written:
        with Image.open(path) as picture:
            picture.verify()


def test_reconstruct_takes_own_images(run, tmp_path):
    picture = np.zeros((50, 50), np.uint8)
    picture[10:40, 20:30] = 255
    (tmp_path / "mine").mkdir()
    Image.fromarray(picture).save(tmp_path / "mine" / "a.png")
    out = tmp_path / "out.png"
    assert main(["reconstruct", str(run), "--images", str(tmp_path / "mine"), "--out", str(out)]) == 0
    assert out.exists()


@pytest.mark.parametrize("arguments", ["recipes", "--version", "train --help", "train mlp --help", "sample --help"])
def test_a_reader_that_leaves_is_no_error(arguments):
    """Before anything is printed, by rich or plainly, more than a buffer holds or less."""
    command = f"unset PYTHONUNBUFFERED; set -o pipefail; {sys.executable} -m vaelab {arguments} | true"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")


def test_a_closed_output_is_no_error():
    command = f"{sys.executable} -m vaelab --version >&-"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")


def test_training_is_quiet_in_a_pipe(tmp_path):
    command = [sys.executable, "-m", "vaelab", *TRAIN, "--out", str(tmp_path / "run")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) <= 5
    assert "\x1b" not in result.stderr


def test_a_terminal_shows_progress(tmp_path):
    """In a pseudo-terminal the live line has loss, distortion, rate, learning rate, images/s and the time left."""
    import pty

    text = bytearray()

    def read(descriptor):
        data = os.read(descriptor, 65536)
        text.extend(data)
        return data

    os.environ["COLUMNS"] = "200"
    try:
        command = [
            sys.executable,
            "-m",
            "vaelab",
            *TRAIN[:-1],
            "8",
            "--batch-size",
            "16",
            "--out",
            str(tmp_path / "run"),
        ]
        status = pty.spawn(command, read)
    finally:
        del os.environ["COLUMNS"]
    assert status == 0
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text.decode())
    assert re.search(r"epoch \d/8 .*loss \d.* distortion \d.* rate \d.* lr 0\.001 .*\d images/s \d:\d\d:\d\d", shown)


# --- what does not --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "no command 'trian'; did you mean 'train'?"),
        (["train", "conv-bta"], "no recipe 'conv-bta'; did you mean 'conv-beta'?"),
        (["train", "--epochs", "3"], "the recipe comes first"),
        (["train", "mlp", "--epochs", "-1"], "--epochs -1: must be greater than 0"),
        (["train", "mlp", "--batch-size", "0"], "--batch-size 0: must be greater than 0"),
        (["train", "mlp", "--beta", "nan"], "--beta nan: must be a finite number"),
        (["train", "mlp", "--optimizer", "rmsprop"], "optimizer 'rmsprop' is not known"),
        (["train", "mlp", "--posterior", "gumbel-softmax", "--z-dim", "8"], "--z-dim is a setting of --posterior diag"),
        (
            ["train", "mlp", "--objective", "iwae", "--beta", "4"],
            "--beta is a setting of --objective elbo, --objective tc",
        ),
        (
            ["train", "mlp", "--hidden-dims", "64"],
            "no flag --hidden-dims; did you mean '--decoder-hidden-dims' or '--encoder-hidden-dims'?",
        ),
        (
            ["train", "mlp", "--encoder-hidden-dims", "64", "--encoder_hidden_dims=32"],
            "--encoder-hidden-dims is given 2 times, and the last would count alone",
        ),
        (["evaluate", "nowhere", "--only", "elbo", "--only", "nll"], "give all values to one, --only A B"),
        (["refit", "nowhere", "--hidden-dims", "8", "--hidden-dims", "4"], "--hidden-dims is given 2 times"),
        (["train", "mlp", "--seed", "1", "--seed", "2", "--data", "mnits"], "neither a path nor a data set"),
        ([*TRAIN, "--device", "tpu"], "--device tpu cannot be used here"),
        (["train", "mlp", "--data", "mnits"], "neither a path nor a data set; did you mean 'mnist'?"),
        (["train", "mlp", "--data", "digits", "--image-size", "32", "32"], "describe your own files"),
        (["evaluate", "nowhere"], "nowhere holds no run"),
        (["sample", "nowhere"], "nowhere holds no run"),
        (["train", "mlp", "--out", "nowhere", "--resume"], "nowhere holds no run"),
    ],
)
def test_wrong_usage_exits_with_2(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    assert message in complaint(capsys)
    assert not list(tmp_path.iterdir()), "nothing was written"


@pytest.mark.parametrize(
    ("flag", "suggestion"), [("--bta", "--beta"), ("--epoch-s", "--epochs"), ("--learning-rat", "--learning-rate")]
)
def test_unknown_flags_are_answered_with_the_closest(flag, suggestion, capsys):
    assert main(["train", "mlp", flag, "3"]) == 2
    assert f"no flag {flag}; did you mean '{suggestion}'" in complaint(capsys)


def test_unknown_flags_of_other_commands(run, capsys):
    assert main(["evaluate", str(run), "--num-sample", "3"]) == 2
    assert "no flag --num-sample; did you mean '--num-samples'" in complaint(capsys)


def test_an_output_folder_that_holds_another_run_is_left_alone(run, capsys):
    before = {path: path.read_bytes() for path in run.rglob("*.*") if path.is_file()}
    assert main([*TRAIN, "--out", str(run)]) == 2
    assert "holds a run already: go on with it by --resume" in complaint(capsys)
    assert {path: path.read_bytes() for path in run.rglob("*.*") if path.is_file()} == before


def test_an_output_folder_with_other_files_or_a_file_is_left_alone(tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("precious")
    assert main([*TRAIN, "--out", str(tmp_path)]) == 2
    assert "is not empty and holds no run" in complaint(capsys)
    assert main([*TRAIN, "--out", str(tmp_path / "thesis.txt")]) == 2
    assert "is a file" in complaint(capsys)
    assert (tmp_path / "thesis.txt").read_text() == "precious"


def test_an_existing_picture_is_not_overwritten(run, tmp_path, capsys):
    (tmp_path / "mine.png").write_text("precious")
    for command in ("sample", "reconstruct", "animate"):
        assert main([command, str(run), "--out", str(tmp_path / "mine.png")]) == 2
        assert "exists: give another name" in complaint(capsys)
    assert (tmp_path / "mine.png").read_text() == "precious"


def test_an_output_that_is_taken_is_refused_before_any_work(run, tmp_path, monkeypatch, capsys):
    (tmp_path / "mine.png").write_text("precious")
    monkeypatch.setattr("vaelab.cli.showing.opened", None)
    monkeypatch.setattr("vaelab.cli.shipping.opened", None)
    assert main(["reconstruct", str(run), "--out", str(tmp_path / "mine.png")]) == 2
    assert "exists: give another name" in complaint(capsys)
    assert main(["export", str(run), "--out", str(tmp_path / "mine.png")]) == 2
    assert "is a file: choose another folder" in complaint(capsys)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evaluate", "--num-samples", "0"], "--num-samples 0: must be at least 1"),
        (["evaluate", "--ais-steps", "1"], "--ais-steps 1: must be at least 2"),
        (["evaluate", "--rows", "0"], "--rows 0: must be at least 1"),
        (["evaluate", "--memory", "0"], "--memory 0: must be at least 1"),
        (["evaluate", "--threads", "0"], "--threads 0: must be at least 1"),
        (["evaluate", "--threads", "-1"], "--threads -1: must be at least 1"),
        (["evaluate", "--split", "tset"], "--split tset: there is train, validation, test; did you mean 'test'?"),
        (
            ["evaluate", "--protocol", "gray"],
            "--protocol gray: there is grey, dynamic, static, threshold; did you mean",
        ),
        (["evaluate", "--only", "ebo"], "--only ebo: no such part; did you mean 'elbo'?"),
        (["refit", "--threads", "0"], "--threads 0: must be at least 1"),
        (["refit", "--seed", "-1"], "--seed -1: must be from 0 to 4,294,967,295"),
        (["sample", "--num", "-1"], "--num -1: must be from 1 to 10,000"),
        (["animate", "--digits", "1z"], "there is no class 'z'"),
        (["animate", "--frames", "0"], "--frames 0: must be from 1 to 500"),
        (["reconstruct", "--num", "0"], "--num 0: must be from 1 to 10,000"),
        (["reconstruct", "--images", "nowhere"], "neither a path nor a data set"),
    ],
)
def test_wrong_values_of_the_commands_on_a_run(run, arguments, message, capsys):
    assert main([arguments[0], str(run), *arguments[1:]]) == 2
    assert message in complaint(capsys)


@pytest.fixture
def bad_data(tmp_path):
    """Data that cannot be trained on, by name, each with what must be said of it."""
    folder = tmp_path / "data"
    folder.mkdir()
    rng = np.random.default_rng(0)
    np.save(folder / "nan.npy", np.full((20, 9, 9), np.nan))
    np.save(folder / "range.npy", rng.random((20, 9, 9)) * 300)
    np.save(folder / "negative.npy", rng.integers(-5, 5, (20, 9, 9)))
    np.save(folder / "objects.npy", np.array([{}], object), allow_pickle=True)
    np.save(folder / "ambiguous.npy", np.full((20, 3, 9, 3), 7, np.uint8))
    np.save(folder / "planes.npy", np.full((20, 9, 9, 2), 7, np.uint8))
    (folder / "pointer.npy").write_text("version https://git-lfs.github.com/spec/v1")
    np.save(folder / "tiny.npy", rng.random((20, 5, 5)))
    np.save(folder / "few.npy", rng.random((2, 9, 9)))
    (folder / "cut.npy").write_bytes((folder / "nan.npy").read_bytes()[:200])
    (folder / "empty").mkdir()
    (folder / "text").mkdir()
    (folder / "text" / "notes.txt").write_text("hello")
    (folder / "sizes").mkdir()
    for side in (9, 10):
        Image.fromarray(np.zeros((side, side), np.uint8)).save(folder / "sizes" / f"{side}.png")
    for name, content in (("magic", b"\x89PNG1234"), ("short", b"\0\0\x08\x03\0\0\0\x05\0\0\0\x1c\0\0\0\x1cxx")):
        (folder / name).mkdir()
        (folder / name / "train-images-idx3-ubyte").write_bytes(content)
    return folder


@pytest.mark.parametrize(
    ("name", "code", "message"),
    [
        ("nan.npy", 1, "values that are NaN"),
        ("range.npy", 1, "--range"),
        ("negative.npy", 1, "outside 0..255"),
        ("objects.npy", 1, "never unpickled"),
        ("cut.npy", 1, "damaged"),
        ("ambiguous.npy", 2, "a side has less than 8 pixels"),
        ("tiny.npy", 2, "images of 5x5 are too small"),
        ("few.npy", 2, "none is left to train on beside 1 for validation and 1 for test: have more, or a smaller"),
        ("pointer.npy", 1, "is not a NumPy file (it begins with b'versio')"),
        ("planes.npy", 2, "no axis of 1 or 3 channels"),
        ("empty", 1, "holds no images"),
        ("text", 1, "notes.txt is not an image"),
        ("sizes", 1, "--image-size"),
        ("magic", 1, "magic number is 0x89504e47"),
        ("short", 1, "is cut short"),
    ],
)
def test_bad_data_are_named_with_their_remedy(bad_data, name, code, message, capsys, tmp_path):
    out = tmp_path / "run"
    assert main(["train", "mlp", "--data", str(bad_data / name), "--epochs", "1", "--out", str(out)]) == code
    line = complaint(capsys)
    assert message in line
    assert not out.exists(), "nothing was written"


def test_a_full_disk_is_called_that_and_keeps_the_last_good_checkpoint(tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    original, writes = os.fsync, [0]

    def fsync(descriptor):
        writes[0] += 1
        if writes[0] > 8:
            raise OSError(errno.ENOSPC, "No space left on device")
        original(descriptor)

    monkeypatch.setattr(checkpoint.os, "fsync", fsync)
    assert main([*TRAIN[:-1], "9", "--out", str(out)]) == 1
    assert "the disk is full" in complaint(capsys)
    monkeypatch.undo()
    step = checkpoint.load_tensors(out / "last.pt")["step"]
    assert step > 0
    assert not [path for path in out.iterdir() if path.name.startswith(".") and path.name != ".lock"], (
        "no half-written file stays"
    )
    assert main(["train", "mlp", "--out", str(out), "--resume"]) == 0


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES])
def test_a_folder_that_cannot_be_written_is_called_that(tmp_path, monkeypatch, capsys, number):
    def refuse(path, mode="r", **options):
        if mode == "xb":
            raise OSError(number, os.strerror(number))
        return opened(path, mode, **options)

    opened = Path.open
    monkeypatch.setattr(Path, "open", refuse)
    assert main([*TRAIN, "--out", str(tmp_path / "run")]) == 1
    assert "cannot be written: its permissions do not allow it" in complaint(capsys)


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs /proc, a place where nobody can make folders")
def test_a_place_where_nothing_can_be_made(capsys):
    assert main([*TRAIN, "--out", "/proc/vaelab-run"]) == 1
    assert "/proc/vaelab-run" in complaint(capsys)


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("config.json", lambda raw: raw[:50], "cannot be read as JSON"),
        ("config.json", lambda raw: raw.replace(b'"format": 1', b'"format": 99'), "written in format 99"),
        (
            "config.json",
            lambda raw: raw.replace(b'"latent_dim": 20', b'"latent_dim": 7'),
            "does not fit its configuration",
        ),
        ("config.json", lambda raw: raw.replace(b'"epochs"', b'"epochz"'), "unknown key 'epochz'"),
        ("best_model.pth", lambda raw: raw[:999], "is damaged or not a checkpoint"),
    ],
)
def test_a_damaged_run_is_named(run, tmp_path, name, damage, message, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    (copy / name).write_bytes(damage((copy / name).read_bytes()))
    assert main(["sample", str(copy)]) in (1, 2)
    assert message in complaint(capsys)


def test_a_finished_run_that_has_lost_its_history_is_named(run, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    (copy / "history.jsonl").unlink()
    assert main(["train", "mlp", "--out", str(copy), "--resume"]) == 1
    assert "has lost its history.jsonl or last.pt" in complaint(capsys)


def test_the_way_to_go_on_can_be_pasted(tmp_path, monkeypatch, capsys):
    def stop(*arguments, **options):
        raise InterruptedRun("interrupted")

    monkeypatch.setattr("vaelab.train.fit", stop)
    assert main([*TRAIN, "--out", str(tmp_path / "my run")]) == 130
    assert complaint(capsys).endswith(f"go on with: vaelab train mlp --out '{tmp_path / 'my run'}' --resume")


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("train mlp --epochs 1.5", "--epochs: '1.5' is not a whole number; vaelab train mlp --help says more"),
        ("train mlp --beta much", "--beta: 'much' is not a number; vaelab train mlp --help says more"),
        ("train mlp --protocol gray", "invalid choice 'gray' for argument '--protocol'"),
        ("train mlp --epochs", "Missing value for argument '--epochs'"),
        ("evaluate", "Missing from vaelab evaluate: RUN"),
        ("evaluate run --num-samples many", "--num-samples: 'many' is not a whole number; vaelab evaluate --help"),
        ("evaluate run more", "Unrecognized options: more"),
    ],
)
def test_a_value_of_the_wrong_kind_is_one_line(command, message, capsys):
    assert main(command.split()) == 2
    found = capsys.readouterr()
    (line,) = found.err.splitlines()
    assert line.startswith(f"vaelab: {message}")
    assert found.out == ""


def test_what_a_terminal_cannot_show_costs_a_character_and_not_the_result(monkeypatch):
    def recipes() -> None:
        """Say a number."""
        print("98.2 ± 0.3")

    shown = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", shown)
    monkeypatch.setitem(COMMANDS, "recipes", recipes)
    assert main(["recipes"]) == 0
    assert shown.buffer.getvalue().split() == [b"98.2", b"?", b"0.3"]


@pytest.mark.parametrize(
    ("others", "set_before", "found", "spins"),
    [
        (0, {}, 0, None),
        (1, {}, 1, "1000"),
        (9, {}, 9, "1000"),
        (1, {"OMP_NUM_THREADS": "1"}, 0, None),
        (1, {"GOMP_SPINCOUNT": "7"}, 1, "7"),
    ],
)
def test_where_other_programs_compute_threads_do_not_spin(others, set_before, found, spins, monkeypatch):
    monkeypatch.setattr(os, "environ", dict(set_before))
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    monkeypatch.setattr(cli, "others_computing", lambda: others)
    assert cli._give_way() == found
    assert os.environ.get("GOMP_SPINCOUNT") == spins


@pytest.mark.parametrize(("others", "words", "hint"), [
    (0, [], None),
    (1, [], "--threads 3 may well be faster"),
    (9, [], "--threads 1 may well be faster"),
    (1, ["--threads", "2"], None),
    (1, ["--threads=2"], None),
])  # fmt: skip
def test_fewer_threads_are_named_where_other_programs_compute(others, words, hint, tmp_path, monkeypatch, caplog):
    def stopped(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    monkeypatch.setattr("vaelab.train.fit", stopped)
    caplog.set_level("INFO", "vaelab")
    command = ["mlp", "--data", "digits", "--out", str(tmp_path / "run"), *words]
    with pytest.raises(KeyboardInterrupt):
        training.run_training(command, others)
    assert (hint in caplog.text) if hint else "may well be faster" not in caplog.text
    (tmp_path / "run").write_text("taken")
    for refused in (command, [*command, "--no-such-flag"]):
        with pytest.raises(UsageError):
            training.run_training(refused, others)
    assert caplog.text.count("may well be faster") == bool(hint), "a command that is refused has no advice"


def test_others_that_compute_are_counted_by_the_least_of_some_moments(monkeypatch):
    texts = iter(["0.1 0.2 0.3 4/321 999", "0.1 0.2 0.3 2/321 999", "0.1 0.2 0.3 3/321 999", "nothing"])
    monkeypatch.setattr(Path, "read_text", lambda path: next(texts))
    assert cli.others_computing() == 1
    assert cli.others_computing() == 0, "where it is not known"


@pytest.mark.parametrize(("arguments", "message"), [
    (["evaluate", "RUN", "--preset", "quik"], "'quik' for argument '--preset'. Expected one of ('paper', 'quick')"),
    (["train", "mlp", "--image-size", "8"], "--image-size: '8' is not INT INT"),
    (["train", "mlp", "--out", ""], "--out is empty: name a folder, or leave it out"),
    (["train", "mlp", "--out="], "--out is empty: name a folder, or leave it out"),
])  # fmt: skip
def test_no_message_speaks_of_none(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    said = complaint(capsys)
    assert message in said.replace("('quick', 'paper')", "('paper', 'quick')")
    assert "None" not in said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("environment", "says"), [
    ({}, "vaelab: interrupted"),
    ({"RANK": "1"}, "vaelab: interrupted"),
    ({"RANK": "0", "WORLD_SIZE": "2"}, "vaelab: interrupted"),
    ({"RANK": "1", "WORLD_SIZE": "2"}, ""),
])  # fmt: skip
def test_one_of_several_processes_says_that_all_are_interrupted(environment, says, monkeypatch, capsys):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)

    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setitem(COMMANDS, "recipes", interrupted)
    assert main(["recipes"]) == 130
    assert capsys.readouterr().err.strip() == says

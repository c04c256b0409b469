"""A report holds all that it shows, says the run's own numbers, and stays small; a card says the same."""

import base64
import io
import json
import re
import shlex
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vaelab import report
from vaelab.cli import main
from vaelab.cli.training import _choose_parts, _parse
from vaelab.config import override
from vaelab.progress import Bar
from vaelab.recipes import RECIPES, recipe
from vaelab.runs.folder import RunFolder
from vaelab.train import fit

LIMIT = 5 * 2**20  # bytes of a report
ARGUMENTS = ["--data", "digits", "--epochs", "3", "--batch-size", "32", "--beta", "0.5"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "a <b> & c"  # a name that would break a page
    assert main(["train", "mlp", *ARGUMENTS, "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def page(run):
    assert main(["report", str(run)]) == 0
    return (run / "report.html").read_text()


class Reader(HTMLParser):
    """Checks that tags are closed in order; collects what is loaded from elsewhere, ids, and the text."""

    VOID = ("meta", "img", "br", "link", "input", "hr")

    def __init__(self):
        super().__init__()
        self.open, self.loaded, self.ids, self.text, self.images = [], [], [], [], []

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.ids += [attributes["id"]] if "id" in attributes else []
        if tag == "img":
            self.images.append(attributes)
        self.loaded += [attributes[key] for key in ("src", "href", "xlink:href") if key in attributes]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="module")
def read(page):
    reader = Reader()
    reader.feed(page)
    assert reader.open == []
    return reader


def test_a_report_needs_nothing_from_elsewhere(page, read):
    elsewhere = [link for link in read.loaded if not link.startswith(("#", "data:image/png;base64,"))]
    assert elsewhere == []
    assert "@import" not in page
    assert "<script" not in page
    assert not re.search(r"url\((?!#)", page), "fonts or pictures from elsewhere"
    assert {link[1:] for link in read.loaded if link.startswith("#")} <= set(read.ids), "a link leads nowhere"
    assert len(read.ids) == len(set(read.ids)), "an id is used twice"


def test_it_is_small(page):
    assert len(page.encode()) < LIMIT


def test_its_pictures_are_pictures_and_described(read):
    assert len(read.images) > 20
    for image in read.images:
        assert image["alt"]
        with Image.open(io.BytesIO(base64.b64decode(image["src"].partition(",")[2]))) as picture:
            assert len(np.unique(np.asarray(picture))) > 4, f"{image['alt']} is empty"


def test_it_says_the_numbers_that_were_measured(run, read):
    text = " ".join(" ".join(read.text).split())
    found = json.loads((run / "metrics.json").read_text())["splits"]["test"]["grey"]["metrics"]
    for key in ("negative_elbo", "distortion", "rate", "psnr"):
        value, stderr = found[key]["value"], found[key]["stderr"]
        assert f"{value:.2f}" in text
        assert f"{stderr:.2f}" in text
        assert found[key]["protocol"] in text
    assert "no likelihood, and cannot go below" in text
    record = RunFolder.open(run).history()[-1]
    assert f"distortion {record['validation_distortion']:.2f}, rate {record['validation_rate']:.2f}" in text


def test_it_says_what_was_trained_and_how(run, read):
    text = " ".join(" ".join(read.text).split())
    assert "mlp on digits: 1,437 grey images of 28×28, " in text
    assert "vaelab train mlp --data digits --beta 0.5 --epochs 3 --batch-size 32 --out 'a <b> & c'" in text
    resolved = RunFolder.open(run).config()["resolved"]
    assert resolved["machine"] in text
    assert resolved["torch"] in text
    assert RECIPES["mlp"].source in text


def test_what_the_doctor_finds_is_told(run, read, capsys):
    assert main(["doctor", str(run), "--json"]) == 0
    findings = json.loads(capsys.readouterr().out)
    text = " ".join(" ".join(read.text).split())
    assert findings
    for finding in findings:
        assert finding["name"] in text
        assert " ".join(finding["evidence"].split()) in text
        assert " ".join(finding["remedy"].split()) in text


def test_a_name_cannot_break_the_page(page):
    assert "<title>a &lt;b&gt; &amp; c · vaelab report</title>" in page
    assert "a <b>" not in page


def test_charts_take_the_colours_of_the_page(page):
    svgs = re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)
    assert len(svgs) == 5
    for svg in svgs:
        assert "currentColor" in svg
        assert "#010203" not in svg
        assert "#fdfcfb" not in svg


def test_no_path_of_the_machine_is_told(run, page):
    assert str(run.parent) not in page
    assert str(run.parent) not in (run / "MODEL_CARD.md").read_text()


def test_the_card_says_the_same_numbers(run, page):
    text = (run / "MODEL_CARD.md").read_text()
    assert text.startswith("---\nlibrary_name: vaelab\n")
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert len({row.count(" | ") for row in rows if "nats" in row}) == 1, "every row has as many cells"
    found = json.loads((run / "metrics.json").read_text())["splits"]["test"]["grey"]["metrics"]["negative_elbo"]
    assert f"| -ELBO (distortion + rate) | {found['value']:.2f} | {found['stderr']:.2f} | nats |" in text
    findings = [line for line in text.splitlines() if line.startswith("- **")]
    assert findings
    assert all(re.search(r"[^.]\. Next: ", line) for line in findings)


def test_measurements_of_an_evaluation_are_kept_and_shown(run, page, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    assert main(["evaluate", str(copy), "--num-samples", "20", "--only", "nll"]) == 0
    before = (copy / "metrics.json").read_bytes()
    assert main(["report", str(copy), "--out", str(tmp_path / "r.html")]) == 0
    assert (copy / "metrics.json").read_bytes() == before
    assert "IWAE k=20" in (tmp_path / "r.html").read_text()
    assert (tmp_path / "r.md").exists()
    assert not (copy / "report.html").stat().st_mtime > (copy / "metrics.json").stat().st_mtime


def test_numbers_of_weights_that_were_trained_further_are_measured_anew(run, page, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    before = json.loads((copy / "metrics.json").read_text())
    assert main(["train", "mlp", "--out", str(copy), "--resume", "--epochs", "6"]) == 0
    assert main(["report", str(copy)]) == 0
    after = json.loads((copy / "metrics.json").read_text())
    assert after["weights_sha256"] == RunFolder.open(copy).weights_sha256() != before["weights_sha256"]
    old, new = (found["splits"]["test"]["grey"]["metrics"]["distortion"]["value"] for found in (before, after))
    assert f"<b>{new:.2f}</b>" in (copy / "report.html").read_text()
    assert f"<b>{old:.2f}</b>" not in (copy / "report.html").read_text()


def test_a_run_that_ended_in_nan_has_a_report(tmp_path, capsys):
    out = tmp_path / "run"
    assert (
        main(["train", "mlp", "--data", "digits", "--epochs", "2", "--learning-rate", "1e30", "--out", str(out)]) == 1
    )
    assert not (out / "best_model.pth").exists()
    assert main(["report", str(out)]) == 0
    text = (out / "report.html").read_text()
    assert "not finite" in text
    assert "The run has saved no model" in text
    assert "nothing was measured" in (out / "MODEL_CARD.md").read_text()


def test_pictures_that_are_all_left_out_are_no_lost_model(run, page, monkeypatch):
    monkeypatch.setattr(report, "_pictures", lambda scene: ([], ["no picture fits"]))
    text = report.html(report.gather(run, Bar()))
    assert "saved no model" not in text
    assert "Left out: no picture fits." in text


def test_a_run_that_is_of_no_recipe_has_a_report(tmp_path):
    small = {"encoder_hidden_dims": (8,), "decoder_hidden_dims": (8,), "epochs": 1, "data": "digits"}
    fit(replace(override(recipe("mlp"), **small), recipe="mine"), out=tmp_path / "run")
    assert main(["report", str(tmp_path / "run")]) == 0
    for name in ("report.html", "MODEL_CARD.md"):
        text = (tmp_path / "run" / name).read_text()
        assert "mine on digits" in text
        assert "# config.json holds the settings: no recipe" in text


def test_colour_images_of_another_size(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "photos").mkdir()
    for i in range(60):
        Image.fromarray(rng.integers(0, 255, (24, 16, 3), np.uint8)).save(tmp_path / "photos" / f"{i}.png")
    out, data = tmp_path / "run", str(tmp_path / "photos")
    assert main(["train", "conv-2d", "--data", data, "--epochs", "1", "--batch-size", "16", "--out", str(out)]) == 0
    assert main(["report", str(out)]) == 0
    text = (out / "report.html").read_text()
    assert "48 colour images of 24×16" in text
    assert "Manifold" in text
    assert ">Arithmetic<" not in text, "there are no classes"
    assert "Left out: arithmetic adds and subtracts the mean codes of classes, and there are no three" in text
    assert "--data photos" in text
    assert data not in text


def test_photographs_do_not_make_it_heavy(tmp_path, monkeypatch):
    """Noise of 96 pixels a side: nothing compresses it."""
    rng = np.random.default_rng(0)
    np.save(tmp_path / "noise.npy", rng.integers(0, 256, (60, 96, 96, 3), np.uint8))
    out = tmp_path / "run"
    arguments = ["--data", str(tmp_path / "noise.npy"), "--epochs", "1", "--batch-size", "16",
                 "--encoder-hidden-dims", "8", "--decoder-hidden-dims", "8"]  # fmt: skip
    assert main(["train", "conv-2d", *arguments, "--out", str(out)]) == 0
    monkeypatch.setattr(report, "examine", lambda *_: None)  # what takes minutes and makes no picture
    monkeypatch.setattr(report, "diagnose", lambda _: [])
    monkeypatch.setattr("vaelab.drawing.scene.WEIGHED", (2, 10))
    assert main(["report", str(out)]) == 0
    assert (out / "report.html").stat().st_size < LIMIT


@pytest.mark.parametrize("changes", [
    {}, {"beta": 0.25, "data": "digits", "encoder_hidden_dims": (64, 32)}, {"optimizer": "adamw", "weight_decay": 0.1},
    {"schedule": "cyclic", "clip_norm": 2.0}, {"likelihood": "gaussian", "learn_sigma": False}, {"adam_betas": (0.8, 0.9)},
    {"seed": 4, "precision": "fp32", "validation_size": 0.2},
])  # fmt: skip
@pytest.mark.parametrize("name", ["mlp", "conv-beta"])
def test_the_command_makes_the_same_run(name, changes):
    changes = dict(changes)
    if name == "conv-beta" and "encoder_hidden_dims" in changes:
        changes["encoder_batch_norm"] = False
    wanted = override(recipe(name), **changes)
    words = shlex.split(report.command_of(wanted, "my run $x"))
    assert words[:3] == ["vaelab", "train", name]
    again, out, *_ = _parse(_choose_parts(recipe(name), words[3:]), words[3:])
    assert again == wanted
    assert out == Path("my run $x")


def test_wrong_names_are_one_line(run, capsys):
    assert main(["report", str(run), "--out", "r.pdf"]) == 2
    assert "a report is an .html file" in capsys.readouterr().err
    assert main(["report", str(run.parent)]) == 2
    assert "holds no run" in capsys.readouterr().err


def test_gathering_measures_once(run, page):
    before = (run / "metrics.json").read_bytes()
    facts = report.gather(run, Bar())
    assert (run / "metrics.json").read_bytes() == before
    assert facts.metrics == json.loads(before)

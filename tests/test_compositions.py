"""Unusual compositions go through every command that looks at a run, or are refused in one line."""

import json

import pytest

from vaelab import report
from vaelab.cli import main
from vaelab.drawing.scene import scene_of
from vaelab.evaluate import latents

SMALL = ["--data", "digits", "--epochs", "2", "--warmup-epochs", "0", "--encoder-hidden-dims", "24",
         "--decoder-hidden-dims", "24", "--batch-size", "128"]  # fmt: skip
RUNS = {
    "vamp": ["vamp", *SMALL, "--num-components", "12", "--kl-warmup-epochs", "0", "--latent-dim", "4"],
    "flow": ["iaf", *SMALL, "--kl-warmup-epochs", "0", "--latent-dim", "4", "--posterior-hidden-dims", "16"],
    "planar": ["iaf", *SMALL, "--kl-warmup-epochs", "0", "--posterior", "planar", "--latent-dim", "4"],
    "sphere": ["s-vae", *SMALL, "--kl-warmup-epochs", "0", "--latent-dim", "4"],
}
AIS = ["--only", "ais", "--ais-images", "4", "--ais-steps", "4", "--ais-chains", "2"]
# What each command does with each run: nothing is passed, or the line that refuses it.
REFUSED = {
    ("planar", "ais"): "no ais of this model",
    ("sphere", "ais"): "annealing moves through real vectors, and the latents of this model lie in the unit sphere",
    ("flow", "explore"): "explore and scorer graphs show distortion, rate and spread of q(z|x)",
    ("planar", "explore"): "explore and scorer graphs show distortion, rate and spread of q(z|x)",
    (
        "sphere",
        "explore",
    ): "exploring needs latents that are any real vectors: those of this model lie in the unit sphere",
    ("sphere", "traverse"): "needs latents that are any real vectors: those of this model lie in the unit sphere",
    ("sphere", "pair"): "needs latents that are any real vectors: those of this model lie in the unit sphere",
}


@pytest.fixture(scope="module", params=RUNS)
def trained(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param) / "run"
    assert main(["train", *RUNS[request.param], "--out", str(folder)]) == 0
    return request.param, folder


@pytest.mark.parametrize("command", ["ais", "doctor", "report", "export", "explore", "traverse", "pair", "sample"])
def test_every_command_takes_the_run_or_refuses_it_in_one_line(trained, command, tmp_path, capsys):
    name, run = trained
    words = {
        "ais": ["evaluate", str(run), *AIS],
        "export": ["export", str(run), "--out", str(tmp_path / "export")],
        "explore": ["explore", str(run), "--static", str(tmp_path / "site"), "--runtime", "cdn"],
        "pair": ["interpolate", str(run), "--images", "0", "1"],
    }
    capsys.readouterr()
    code = main(words.get(command, [command, str(run)]))
    said = capsys.readouterr()
    if (reason := REFUSED.get((name, command))) is None:
        assert code == 0, said.err
        return
    assert code == 2
    assert reason in said.err
    assert len([line for line in said.err.splitlines() if line.startswith("vaelab")]) == 1


def test_a_caption_says_of_dimensions_what_is_known(trained):
    name, run = trained
    if name == "sphere":
        pytest.skip("latents on a sphere have no traversals")
    caption = report._traversals(scene_of(run)).caption
    assert caption.endswith("; by how much codes vary.")


def test_what_is_measured_of_them_is_what_is_defined(trained, monkeypatch):
    name, run = trained
    monkeypatch.setattr(latents, "FEW", few := 60)
    parts = ["--only", "elbo", "nll", "latents", "reconstruction"]
    assert main(["evaluate", str(run), "--num-samples", "20", *parts]) == 0
    found = json.loads((run / "metrics.json").read_text())["splits"]["test"]["dynamic"]
    metrics = found["metrics"]
    always = {"negative_elbo", "distortion", "rate", "nll_20", "two_sample_accuracy", "linear_probe", "psnr"}
    assert always <= metrics.keys()
    assert metrics["nll_20"]["value"] < metrics["negative_elbo"]["value"] + 0.5
    assert ("active_units" in metrics) == (name in ("vamp", "sphere")), "a flow has no known mean"
    assert ("mutual_information" in metrics) == (name != "planar"), "a planar flow cannot score foreign codes"
    assert ("left_out" in found["about"]) == (name in ("flow", "planar"))
    if name != "planar":  # of an IAF each density takes passes of a network: a few codes have to do
        assert metrics["two_sample_accuracy"]["n"] == 180
        for part in ("mutual_information", "aggregate_kl"):
            assert metrics[part]["n"] == (few if name == "flow" else 180)
            assert ("(first 60 images)" in metrics[part]["protocol"]) == (name == "flow")

"""Each recipe, at a small size on digits, leaves the files that its source names, and they are what they say."""

import numpy as np
import pytest
from PIL import Image

from vaelab.cli import main

SMALL_CONV = ["--encoder-conv-channels", "4", "8", "--decoder-conv-channels", "8", "4"]

FILES = {
    "conv-warmup": (["--epochs", "3", "--kl-warmup-epochs", "1", *SMALL_CONV], ["anim_1_to_9.gif", "anim_pi_digits.gif"]),
    "mlp": (["--epochs", "2"], ["latent_space.png", "samples.png"]),
    "fast": (["--epochs", "2"], ["samples.png", "reconstructions.png", "loss_curve.png"]),
    "burda-vae": (["--epochs", "2", "--kl-warmup-epochs", "1"], ["samples.png", "loss_curve.png"]),
    "aevb": (["--epochs", "2"], ["samples.png", "reconstructions.png", "loss_curve.png"]),
    "mlp-2d": (
        ["--epochs", "2"],
        ["loss_curve.png", "recon_epoch_1.png", "recon_epoch_2.png", "samples.png", "latent_2d.png"],
    ),
    "conv-2d": (["--epochs", "2", *SMALL_CONV], ["manifold.png", "samples.png"]),
    "conv-beta": (
        ["--epochs", "11", "--kl-warmup-epochs", "1", "--warmup-epochs", "1", *SMALL_CONV],
        ["samples_epoch_10.png", "recon_epoch_10.png", "samples_epoch_11.png", "recon_epoch_11.png",
         "training_history.png"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_a_recipe_writes_the_files_that_its_source_names(name, tmp_path):
    flags, files = FILES[name]
    out = tmp_path / "run"
    assert main(["train", name, "--data", "digits", *flags, "--out", str(out)]) == 0
    for file in ["config.json", "history.jsonl", "last.pt", "best_model.pth", *files]:
        assert (out / file).exists(), file
    for picture in out.glob("*.png"):
        with Image.open(picture) as opened:
            pixels = np.asarray(opened.convert("L"))
        assert min(pixels.shape) > 300, picture
        assert pixels.std() > 5, f"{picture} is blank"
    for animation in out.glob("*.gif"):
        with Image.open(animation) as frames:
            assert frames.n_frames > 30, "enough frames to look at"
            assert frames.info["loop"] == 0
    assert not [path for path in out.iterdir() if path.name.startswith(".") and path.name != ".lock"]
    assert main(["evaluate", str(out), "--only", "elbo"]) == 0


@pytest.mark.parametrize(
    ("flags", "left_out"),
    [
        (
            ["conv-2d", "--data", "digits", "--latent-dim", "5", *SMALL_CONV],
            "manifold.png is left out: a manifold needs 2",
        ),
        (["conv-warmup", "--data", "PETS", *SMALL_CONV], "anim_1_to_9.gif is left out: there is no class '1'"),
        (["mlp", "--data", "FEW"], "latent_space.png is left out: a map by principal components needs"),
    ],
)
def test_a_picture_that_does_not_fit_is_left_out_and_the_others_are_drawn(flags, left_out, tmp_path, caplog):
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "few.npz", x=rng.random((12, 9, 9)))
    for name in ("cat", "dog"):
        (tmp_path / "pets" / name).mkdir(parents=True)
        for i in range(15):
            Image.fromarray(rng.integers(0, 256, (12, 9)).astype(np.uint8)).save(tmp_path / "pets" / name / f"{i}.png")
    paths = {"PETS": str(tmp_path / "pets"), "FEW": str(tmp_path / "few.npz")}
    with caplog.at_level("INFO", "vaelab"):
        assert main(["train", *[paths.get(f, f) for f in flags], "--epochs", "1", "--out", str(tmp_path / "run")]) == 0
    assert left_out in caplog.text
    assert (tmp_path / "run" / "samples.png").exists()


def test_images_without_classes_train_all_the_same(tmp_path):
    np.save(tmp_path / "faces.npy", np.random.default_rng(0).random((60, 28, 20)))
    flags = FILES["conv-warmup"][0]
    command = ["train", "conv-warmup", "--data", str(tmp_path / "faces.npy"), *flags, "--out", str(tmp_path / "run")]
    assert main(command) == 0
    assert (tmp_path / "run" / "samples.png").exists()
    assert not list((tmp_path / "run").glob("*.gif")), "there is nothing to walk between"

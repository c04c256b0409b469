"""Commands that show what a model does: ``sample``, ``reconstruct``, ``animate``."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from vaelab.cli.common import Output, RunPath, config, opened, target_file, write
from vaelab.errors import UsageError


def sample(run: RunPath, /, num: int = 64, seed: int = 0, out: Output = None) -> None:
    """Draw images from the prior: z ~ p(z), mean of p(x|z), as one PNG.

    Args:
        num: how many.
        seed: another seed draws other images.
        out: the PNG to write; default: RUN/sample-seedN.png.
    """
    from vaelab import figures, pictures
    from vaelab.train import load_model

    if num < 1:
        raise UsageError(f"--num {num}: must be at least 1")
    target = target_file(run, out, f"sample-seed{seed}.png")
    write(
        target,
        pictures.png(figures.samples(load_model(run), num, seed=seed, title=f"{run.name}: samples, seed {seed}")),
    )


def reconstruct(run: RunPath, /, images: str | None = None, split: Literal["train", "validation", "test"] = "test",
                num: int = 30, out: Output = None) -> None:  # fmt: skip
    """Show images and their reconstructions, as one PNG.

    Args:
        images: a folder or array of your own images, of the size that the run was trained on; default: the run's data.
        split: the run's images to take.
        num: how many, from the first on.
        out: the PNG to write; default: RUN/reconstruct-SPLIT.png.
    """
    from vaelab import figures, pictures
    from vaelab.data.sources import NAMED, Reading, find
    from vaelab.train import load_model

    if num < 1:
        raise UsageError(f"--num {num}: must be at least 1")
    if images is None:
        _, model, data = opened(run)
        batch, _ = next(data.batches(split, num))
        x, what = batch.x, split
    else:
        import torch

        from vaelab.data.datasets import unit

        model, settings = load_model(run), config(run)
        channels, height, width = model.shape
        size = (height, width) if Path(images).is_dir() else None  # the images of a folder are scaled and cropped
        wanted = 3 if channels == 3 else 1
        pool = find(images, Reading() if images in NAMED else Reading(size, wanted, settings.data.value_range))
        if pool.train.x.shape[1:] != model.shape:
            raise UsageError(
                f"--images {images}: images of {pool.train.x.shape[1:]}, the run was trained on {model.shape}"
            )
        x, what = unit(torch.from_numpy(pool.train.x[:num])), Path(images).stem
    target = target_file(run, out, f"reconstruct-{what}.png")
    title = f"{run.name}: images ({what}) and their reconstructions"
    write(target, pictures.png(figures.reconstructions(model, x, title=title)))


def animate(run: RunPath, /, digits: str = "19", frames: int = 16, out: Output = None) -> None:
    """Move through latent space from class to class: a GIF through the codes of real images.

    Args:
        digits: the classes to pass through, in order; the walk returns to the first.
        frames: frames from one to the next.
        out: the GIF to write; default: RUN/animate-DIGITS.gif.
    """
    from vaelab import pictures

    if not 1 <= frames <= 500:
        raise UsageError(f"--frames {frames}: must be from 1 to 500")
    target = target_file(run, out, f"animate-{digits}.gif")
    _, model, data = opened(run)
    write(target, pictures.animation(model, data, digits, frames=frames))

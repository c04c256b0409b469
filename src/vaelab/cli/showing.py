"""Commands that show what a model does, as pictures and films: from ``sample`` to ``animate``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from tyro.conf import Positional

from vaelab.cli.common import RunPath, at_least, opened, target_file, write
from vaelab.errors import UsageError, did_you_mean

if TYPE_CHECKING:
    from torch import Tensor

    from vaelab.drawing.scene import Scene

MOST_IMAGES = 10_000  # in one picture
MOST_SEED = 2**63 - 1  # of torch's generators
Theme = Literal["light", "dark"]
Way = Literal["linear", "spherical"]
How = Literal["auto", "own", "pca", "tsne", "umap"]


def sample(run: RunPath, /, num: int = 64, seed: int = 0, theme: Theme = "light", out: Path | None = None) -> None:
    """Draw images from the prior: z ~ p(z), mean of p(x|z), as one picture.

    Args:
        num: how many.
        seed: another seed draws other images.
        theme: for a light or a dark page.
        out: the PNG, SVG or PDF to write; default: RUN/sample-seedN.png.
    """
    from vaelab import figures
    from vaelab.drawing import media
    from vaelab.runs.loading import load_model

    at_least(1, most=MOST_IMAGES, num=num)
    at_least(0, most=MOST_SEED, seed=seed)
    target = target_file(run, out, f"sample-seed{seed}.png")
    with figures.theme(theme):
        figure = figures.samples(
            load_model(run), num, seed=seed, title=f"{figures.plain(run.name)}: samples, seed {seed}"
        )
        write(target, media.encode(figure, target.suffix))


def reconstruct(
    run: RunPath,
    /,
    images: str | None = None,
    split: Literal["train", "validation", "test"] | None = None,
    num: int = 30,
    theme: Theme = "light",
    out: Path | None = None,
) -> None:
    """Show images and their reconstructions, as one picture.

    Args:
        images: a folder or array of your own images, of the size that the run was trained on; default: the run's data.
        split: the run's images to take (default: test).
        num: how many, from the first on.
        theme: for a light or a dark page.
        out: the PNG, SVG or PDF to write; default: RUN/reconstruct-SPLIT.png.
    """
    from vaelab import figures
    from vaelab.config import Data
    from vaelab.data.sources import NAMED, find
    from vaelab.drawing import media
    from vaelab.runs.folder import RunFolder
    from vaelab.runs.loading import load_model

    at_least(1, most=MOST_IMAGES, num=num)
    if images is not None and split is not None:
        raise UsageError(f"--split {split} takes the run's own images, and --images brings others: leave one out")
    what = (split or "test") if images is None else Path(images).stem
    target = target_file(run, out, f"reconstruct-{what}.png")
    if images is None:
        _, model, data = opened(run)
        x = next(data.batches(what, num))[0].x
    else:
        import torch

        from vaelab.data.datasets import unit

        if not images or (images not in NAMED and not Path(images).expanduser().exists()):
            raise UsageError(f"--images {images!r}: neither a path nor a data set{did_you_mean(images, NAMED)}")
        model, settings = load_model(run), RunFolder.open(run).run
        channels, height, width = model.shape
        size = (height, width) if Path(images).is_dir() else None  # the images of a folder are scaled and cropped
        wanted = 3 if channels == 3 else 1
        own = Data(images, image_size=size, channels=wanted, value_range=settings.data.value_range)
        pool = find(Data(images) if images in NAMED else own)
        if pool.train.x.shape[1:] != model.shape:
            raise UsageError(
                f"--images {images}: images of {pool.train.x.shape[1:]}, the run was trained on {model.shape}"
            )
        x = unit(torch.from_numpy(pool.train.x[:num]))
    title = f"{figures.plain(f'{run.name}: images ({what})')} and their reconstructions"
    with figures.theme(theme):
        write(target, media.encode(figures.reconstructions(model, x, title=title), target.suffix))


def traverse(run: RunPath, /, image: int | None = None, rows: int = 10, span: float = 3.0, steps: int = 11,
             theme: Theme = "light", out: Path | None = None) -> None:  # fmt: skip
    """Show what each latent dimension does: a row each, by falling rate, from the code of one image.

    Args:
        image: the validation image to start from, counted from 0; default: a typical one.
        rows: how many dimensions, those of the highest rate.
        span: the largest value of a dimension; its rows go from -span to span.
        steps: images a row.
        theme: for a light or a dark page.
        out: the PNG, SVG or PDF to write; default: RUN/traverse.png.
    """
    from vaelab import figures
    from vaelab.drawing import media
    from vaelab.drawing.scene import scene_of

    at_least(1, rows=rows)
    at_least(2, steps=steps)
    if not 0 < span < 100:
        raise UsageError(f"--span {span:g}: must be greater than 0 and less than 100")
    target = target_file(run, out, "traverse.png" if image is None else f"traverse-{image}.png")
    scene = scene_of(run)
    code = scene.typical(1)[0] if image is None else _codes(scene, [image], "--image")[0]
    start = "a typical validation image" if image is None else f"validation image {image}"
    with figures.theme(theme):
        figure = figures.traversals(scene.model, code, scene.order[:rows], scene.rate, span=span, steps=steps,
                                    title=scene.title(f"Traversals of {start}, {scene.ordered_by}"))  # fmt: skip
        write(target, media.encode(figure, target.suffix))


def interpolate(
    run: RunPath,
    /,
    images: Annotated[tuple[int, ...], tyro.conf.arg(metavar="ROW ROW ...")] = (),
    steps: int = 12,
    way: Way = "linear",
    theme: Theme = "light",
    out: Path | None = None,
) -> None:
    """Go from one image to another through latent space: a row along the line, one along the great circle; or a GIF.

    Args:
        images: two validation images, or four for two pairs, and so on, counted from 0; default: typical ones.
        steps: images from one to the other; of a GIF or MP4, frames.
        way: of a GIF or MP4: along straight lines or great circles. A picture shows both.
        theme: for a light or a dark page.
        out: the PNG, SVG, PDF, GIF or MP4 to write; default: RUN/interpolate.png.
    """
    import torch

    from vaelab import figures
    from vaelab.drawing import media
    from vaelab.drawing.scene import scene_of

    at_least(2, steps=steps)
    if len(images) % 2:
        raise UsageError(f"--images {' '.join(map(str, images))}: give two for each pair")
    target = target_file(run, out, "interpolate.png")
    scene = scene_of(run)
    if images:
        codes = _codes(scene, images, "--images")
        a, b = codes[0::2], codes[1::2]
    else:
        a, b = scene.pairs()
    if target.suffix in media.FILMS:
        codes = torch.stack([a, b], 1).flatten(0, 1)
        write(target, media.encode(figures.walk(scene.model, codes, frames=steps, way=way), target.suffix))
        return
    title = scene.title("Interpolation between codes of validation images")
    with figures.theme(theme), torch.no_grad():
        write(target, media.encode(figures.interpolation(scene.model, a, b, steps=steps, title=title), target.suffix))


def draw(
    run: RunPath,
    figure: Annotated[Positional[tuple[str, ...]], tyro.conf.arg(metavar="[NAME ...]")] = (),
    /,
    map: How = "auto",
    theme: Theme = "light",
    format: Literal["png", "svg", "pdf"] = "png",
    out: Path | None = None,
) -> None:
    """Draw figures of a run, all that fit it or those that are named, into a folder.

    Args:
        figure: samples, reconstructions, latent, manifold, traversals, interpolation, arithmetic, kl_bars,
            rate_distortion, weights, neighbours, loss_curve, training_history; default: all that fit.
        map: how codes get on the plane of the figure latent: their own two dimensions, PCA, t-SNE or UMAP; auto: own
            or PCA.
        theme: for a light or a dark page.
        format: png (two pixels a point), or svg or pdf (lines stay lines).
        out: the folder; default: RUN/figures. What it holds under the same names is replaced.
    """
    from vaelab import figures
    from vaelab.drawing import media, pictures
    from vaelab.drawing.scene import scene_of

    for name in figure:
        if name not in pictures.FIGURES:
            raise UsageError(f"no figure {name!r}{did_you_mean(name, pictures.FIGURES)}")
    scene = scene_of(run)
    folder = out or run / "figures"
    with figures.theme(theme):
        for name in figure or pictures.FIGURES:
            try:
                made = pictures.latent(scene, map) if name == "latent" else pictures.FIGURES[name](scene)
            except UsageError as error:
                if figure:
                    raise
                print(f"{name} is left out: {error}")
            else:
                write(folder / f"{name}.{format}", media.encode(made, f".{format}"))


def animate(
    run: RunPath,
    /,
    digits: str | None = None,
    of: Literal["classes", "images", "traversal", "training"] = "classes",
    frames: int = 16,
    way: Way = "linear",
    out: Path | None = None,
) -> None:
    """Move through latent space, from class to class, image to image or along each dimension, or watch the training.

    Args:
        digits: the classes to pass through, in order, the walk returns to the first: 314, or names with commas between,
            cat,dog (default: 1 and 9, or the first two).
        of: classes: through codes of real images of those classes; images: through typical ones, where there are no
            classes; traversal: along each of the most telling dimensions; training: the epochs, where the recipe drew
            them.
        frames: frames from one to the next.
        way: along straight lines or great circles.
        out: the GIF or MP4 to write; default: RUN/animate-19.gif, animate-images.gif and so on.
    """
    from vaelab.drawing import media, pictures
    from vaelab.drawing.scene import scene_of

    at_least(1, most=500, frames=frames)
    if digits is not None and of != "classes":
        raise UsageError(f"--digits {digits} names classes, and --of {of} passes through none: leave one out")
    target = target_file(run, out, f"animate-{of}.gif")
    if target.suffix not in media.FILMS:
        raise UsageError(f"--out {target}: a film is a .gif or a .mp4")
    if of == "training":
        write(target, pictures.training_film(run, target.suffix))
        return
    if of == "classes":
        _, model, data = opened(run)
        names = pictures.classes_to_pass(data, digits)
        film: Tensor = pictures.digits(model, data, names, frames=frames, way=way)
        target = out or run / _file_of(names)
    else:
        scene = scene_of(run)
        film = (pictures.wandering(scene, frames=frames, way=way) if of == "images"
                else pictures.swinging(scene, frames=frames))  # fmt: skip
    write(target, media.encode(film, target.suffix))


def _file_of(classes: Sequence[str]) -> str:
    """What a film through these classes is called: all of them, as long as a file system takes the name."""
    joined = ("" if all(len(name) == 1 for name in classes) else "-").join(classes)
    return f"animate-{joined if len(joined.encode()) <= 100 else 'classes'}.gif"


def _codes(scene: Scene, rows: Sequence[int], flag: str) -> Tensor:
    """The codes (N, D) of these validation images, to move from."""
    import torch

    from vaelab.drawing.scene import require_real
    from vaelab.figures import encode

    require_real(scene.model, "moving through latent space")
    images = scene.data.validation
    for row in rows:
        if not 0 <= row < len(images):
            raise UsageError(f"{flag} {row}: there are validation images 0 to {len(images) - 1}")
    return torch.from_numpy(encode(scene.model, images.rows(torch.tensor(rows, device=images.device)).x))

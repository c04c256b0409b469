"""Figures, pictures and films as the bytes of a file."""

from __future__ import annotations

import contextlib
import io
import logging
import re
import warnings
from collections.abc import Generator, Iterable, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn.functional import interpolate

from vaelab.errors import UsageError
from vaelab.figures.style import PAGE_INK, PAGE_PAPER

log = logging.getLogger("vaelab")

FILM_SIDE = 140
GIF_LEVELS = 32  # shades: a GIF of all 256 is three times the size and looks the same
FRAMES_PER_SECOND = 25
FIGURES, FILMS = (".png", ".svg", ".pdf"), (".gif", ".mp4")

_TRIMMED: Any = {"bbox_inches": "tight", "pad_inches": 0.08}  # to what is drawn, a long title included

Content = Figure | NDArray[np.float32] | Tensor


def encode(content: Content, suffix: str) -> bytes:
    """The bytes of a file: a figure or pixels (H, W, C) as a picture, frames (F, C, H, W) as a film.

    Raises:
        UsageError: if there is no such format, naming those that there are.
    """
    allowed = FILMS if isinstance(content, Tensor) else FIGURES if isinstance(content, Figure) else (".png",)
    if suffix not in allowed:
        raise UsageError(f"a file {suffix or 'without a suffix'} cannot be written: take {' or '.join(allowed)}")
    if isinstance(content, Figure):
        return png(content) if suffix == ".png" else _vector(content, suffix[1:])
    if isinstance(content, Tensor):
        return gif(content) if suffix == ".gif" else mp4(content)
    return pixels_png(content)


def png(figure: Figure, dpi: int = 144) -> bytes:
    """Encode a figure as pixels, two for each point."""
    buffer = io.BytesIO()
    with _missing_letters():
        figure.savefig(buffer, format="png", dpi=dpi, **_TRIMMED)
    return buffer.getvalue()


def _vector(figure: Figure, kind: str) -> bytes:
    """Encode a figure as lines and letters that can be selected; the same figure gives the same bytes."""
    buffer = io.BytesIO()
    fonts = mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "vaelab", "pdf.fonttype": 42})
    with fonts, _missing_letters():
        # Points of scatter plots are pixels in it: thousands of them would make it slow to look at.
        stamp = {"Date": None} if kind == "svg" else {"CreationDate": None}
        figure.savefig(buffer, format=kind, dpi=200, metadata=stamp, **_TRIMMED)
    return buffer.getvalue()


@contextlib.contextmanager
def _missing_letters() -> Generator[None]:
    """Say once what matplotlib says of each letter: that no font here has it."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    missing = [w for w in caught if "missing from" in str(w.message)]
    if missing:
        log.info("no font here has all letters of this picture: those of Noto Sans CJK or Arial Unicode MS have more")
    for warning in caught:
        if warning not in missing:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)


def inline_svg(figure: Figure, name: str) -> str:
    """A figure of the theme ``page`` as an SVG element: it takes the width, letters and colours of what is around it.

    Args:
        figure: drawn inside ``with theme("page")``.
        name: goes before every id, so that the figures of a page do not mix theirs up.
    """
    text = _vector(figure, "svg").decode()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, count=1, flags=re.DOTALL)
    text = re.sub(r' (?:width|height)="[\d.]+pt"', "", text, count=2)
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", text)
    text = text.replace("'DejaVu Sans', ", "").replace(f"fill: {PAGE_PAPER}", "fill: none")
    return text.replace(PAGE_INK, "currentColor").replace(PAGE_PAPER, "var(--paper)")


def pixels_png(canvas: NDArray[np.float32]) -> bytes:
    """Encode pixels (H, W, C) in [0, 1], one for one."""
    buffer = io.BytesIO()
    _image(np.round(canvas * 255).astype(np.uint8)).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _image(pixels: NDArray[np.uint8]) -> Image.Image:
    return Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)


def gif(frames: Tensor, *, side: int = FILM_SIDE, fps: float = FRAMES_PER_SECOND) -> bytes:
    """Encode frames (F, C, H, W) in [0, 1] as a GIF that loops forever, enlarged so that it can be looked at."""
    large = _enlarged(frames, side)
    shades = (large * (GIF_LEVELS - 1)).round() * (255 / (GIF_LEVELS - 1))
    return gif_of([_image(pixels) for pixels in shades.byte().permute(0, 2, 3, 1).numpy()], fps)


def gif_of(images: Sequence[Image.Image], fps: float = FRAMES_PER_SECOND) -> bytes:
    """Encode images as a GIF that loops forever."""
    buffer = io.BytesIO()
    images[0].save(buffer, "GIF", save_all=True, append_images=images[1:], duration=round(1000 / fps), loop=0,
                   optimize=False)  # fmt: skip
    return buffer.getvalue()


def mp4(frames: Tensor, *, side: int = 2 * FILM_SIDE, fps: int = FRAMES_PER_SECOND) -> bytes:
    """Encode frames (F, C, H, W) in [0, 1] as an MP4, enlarged."""
    pixels = (_enlarged(frames, side).expand(-1, 3, -1, -1) * 255).round().byte().permute(0, 2, 3, 1)
    return mp4_of(pixels.numpy(), fps)


def mp4_of(pixels: Iterable[NDArray[np.uint8]], fps: int = FRAMES_PER_SECOND) -> bytes:
    """Encode pictures (H, W, 3) as an MP4 (H.264, what every browser and phone plays).

    Raises:
        UsageError: if the package av, which brings the encoder, is not installed.
    """
    try:
        import av
    except ImportError as error:
        raise UsageError("an MP4 needs the package av: pip install av, or write a .gif") from error
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as film:
        stream: Any = film.add_stream("libx264", rate=fps)
        stream.pix_fmt, stream.options = "yuv420p", {"crf": "20"}
        for number, picture in enumerate(pixels):
            even = np.ascontiguousarray(picture[: len(picture) // 2 * 2, : picture.shape[1] // 2 * 2])
            if number == 0:
                stream.height, stream.width = even.shape[:2]  # the format wants even sides
            film.mux(stream.encode(av.VideoFrame.from_ndarray(even, format="rgb24")))
        film.mux(stream.encode())
    return buffer.getvalue()


def _enlarged(frames: Tensor, side: int) -> Tensor:
    height, width = frames.shape[2:]
    scale = max(1, round(side / max(height, width)))
    return interpolate(frames.float().cpu(), size=(height * scale, width * scale), mode="bicubic").clamp(0, 1)


def captioned(picture: Image.Image, text: str, scale: int = 1) -> Image.Image:
    """A picture, enlarged pixel by pixel, with a line of text below."""
    large = picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)
    canvas = Image.new(large.mode, (large.width, large.height + 20), "white")
    canvas.paste(large)
    ImageDraw.Draw(canvas).text((4, large.height + 3), text, fill="black", font=ImageFont.load_default(12))
    return canvas

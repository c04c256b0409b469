"""Reading back what a run needs and has made: its data, checked to be the same, and its model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vaelab.config import from_json
from vaelab.data.datasets import Dataset, load
from vaelab.errors import FailureError, UsageError
from vaelab.models import VAE
from vaelab.runs.folder import RunFolder
from vaelab.training.trainer import build_model


def require_same_data(folder: RunFolder, data: Dataset) -> None:
    """Refuse data that are not those that the run in this folder was trained on.

    Raises:
        FailureError: naming the first thing that differs.
    """
    recorded = folder.config()["data"]
    for key, value in data.record().items():
        if recorded.get(key) != value and key != "data":  # a folder may have been renamed: its images are what counts
            split = key.removesuffix("_sha256")
            others = f"the {split} images are as many, but of other pixels or in another order (that of their names)"
            changed = others if key != split else f"{key} was {recorded.get(key)}, is {value}"
            raise FailureError(f"the data have changed since the run in {folder.path} began: {changed}; bring back "
                               "what it was trained on, or train anew with another --out")  # fmt: skip


def data_of(folder: RunFolder) -> Dataset:
    """The data of the run in this folder, checked to be those that it was trained on.

    Raises:
        UsageError: if they are not where they were.
        FailureError: naming the first thing that differs.
    """
    folder.require_path_of_data(folder.run)
    data = load(folder.run.data)
    require_same_data(folder, data)
    return data


def load_model(path: str | Path) -> VAE:
    """The best model of a run folder, or that of a file written by ``vaelab export --format safetensors``.

    It is on the CPU and in ``eval`` mode.

    Raises:
        UsageError: if the folder holds no run.
        FailureError: if its files are damaged or do not belong together.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        try:
            return model_of_safetensors(path.read_bytes())
        except OSError as error:
            raise UsageError(f"{path} cannot be read: {error.strerror}") from error
    folder = RunFolder.open(path)
    return _model(folder.config(), folder.load_best(), str(folder.path / "best_model.pth"))


def model_of_safetensors(content: bytes) -> VAE:
    """The model that a safetensors file of ``vaelab export`` holds.

    Raises:
        FailureError: if it is no such file.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        weights = load(content)
        length = int.from_bytes(content[:8], "little")
        about = json.loads(content[8 : 8 + length])["__metadata__"]
        config = json.loads(about["vaelab"])
        return _model(config, weights, "the safetensors file")
    except (SafetensorError, KeyError, ValueError) as error:
        raise FailureError(f"this is no safetensors file of vaelab: {error}") from error


def _model(config: dict[str, Any], weights: dict[str, Any], where: str) -> VAE:
    channels, height, width = config["data"]["shape"]
    model = build_model(from_json(config["run"]), (channels, height, width))
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise FailureError(f"{where} does not fit its configuration: {str(error).splitlines()[-1]}") from error
    for name, values in weights.items():
        if values.is_floating_point() and not values.isfinite().all():
            raise FailureError(f"{where} holds values in {name} that are not finite: the model has diverged, or the "
                               "file was changed; train anew, or bring back a copy")  # fmt: skip
    return model.eval()

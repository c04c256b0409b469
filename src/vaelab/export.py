"""Shipping a trained model: ONNX graphs that run without torch, and safetensors; each checked against the model.

Shapes: N batch, C H W image, D latent dimensions.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import warnings
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any, Literal, cast, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from vaelab.distribution import NoDensityError
from vaelab.divergences import analytic_kl
from vaelab.errors import FailureError, UsageError
from vaelab.models import VAE
from vaelab.posteriors import Posterior
from vaelab.posteriors.codes import VectorQuantized
from vaelab.runtime import Noise, Sampler, generator, seeded
from vaelab.training.compiling import reason

Graph = Literal["encoder", "decoder", "scorer"]
OPSET = 18  # what torch's exporter is made for; runtimes of 2023 and later read it
OPSETS = range(18, 24)
TOLERANCE = 1e-4  # of a graph's numbers, relative to those above 1: rounding is some hundred times less
DRAWN = 32  # of each image, for a rate that has no closed form
BATCHES = (1, 3, 16)  # sizes that a graph is checked with


# --- what is exported -----------------------------------------------------------------------------------------------


class _Encoder(nn.Module):
    """x (N, C, H, W) to the center of q(z|x) and, where it is known, its standard deviation, each (N, D)."""

    def __init__(self, model: VAE) -> None:
        super().__init__()
        self.model = model
        self.names = ("x",), (("loc", "scale") if _has_spread(model) else ("loc",))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        qz = self.model.posterior(x)
        loc = cast(Posterior, qz).center
        return (loc, qz.stddev) if "scale" in self.names[1] else (loc,)


class _Decoder(nn.Module):
    """z (N, D) to the mean of p(x|z), (N, C, H, W)."""

    names = ("z",), ("mean",)

    def __init__(self, model: VAE) -> None:
        super().__init__()
        self.model = model

    def forward(self, z: Tensor) -> tuple[Tensor]:
        return (self.model.likelihood(z).mean,)


class Scorer(nn.Module):
    """x to loc, scale, the mean of p(x|z) at z = loc, and, in nats (N,), distortion there and rate: a score of x.

    Where the rate has no closed form it is the mean of log q(z|x) - log p(z) over 32 draws, made of the same noise for
    every image, so that a score is a function of the image.

    Raises:
        UsageError: if the model has no rate, or its posterior no standard deviation.
    """

    names = ("x",), ("loc", "scale", "mean", "distortion", "rate")

    def __init__(self, model: VAE) -> None:
        super().__init__()
        self.model = model
        self._noise = _SameNoise()
        if not _has_spread(model):
            raise UsageError(f"no score of an image: {_WHAT_A_SCORE_NEEDS}, and this posterior knows no deviation")
        with torch.no_grad():
            self(torch.zeros(1, *model.shape, device=model.device))  # draws the noise

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Encode, decode and score."""
        qz, pz = self.model.posterior(x), self.model.prior()
        loc = cast(Posterior, qz).center
        px = self.model.likelihood(loc)
        rate = analytic_kl(qz, pz)
        if rate is None:
            z, log_density = cast(Posterior, qz).rsample_and_log_prob((DRAWN,), self._noise)
            if log_density is None:
                raise UsageError(f"no score of an image: {_WHAT_A_SCORE_NEEDS}, and this posterior has no density")
            try:
                log_pz = pz.log_prob(z)
            except NoDensityError as error:
                raise UsageError(f"no score of an image: {error}") from error
            rate = (log_density() - log_pz).mean(0)
        return loc, qz.stddev, px.mean, -px.log_prob(x), rate


_WHAT_A_SCORE_NEEDS = "explore and scorer graphs show distortion, rate and spread of q(z|x)"


def _has_spread(model: VAE) -> bool:
    """Whether each dimension of q(z|x) has a standard deviation that is known, and says something."""
    if model.space != "real":
        return False
    try:
        with torch.no_grad():
            _ = model.posterior(torch.zeros(1, *model.shape, device=model.device)).stddev
    except NotImplementedError:
        return False
    return True


@final
class _SameNoise(Noise):
    """Noise that is the same for every row and every call: drawn once, then constants of a graph."""

    def __init__(self) -> None:
        self._drawn: dict[tuple[object, ...], Tensor] = {}

    def drawn(self, sampler: Sampler, stream: str, shape: Sequence[int]) -> Tensor:
        """Numbers that are the same in each row."""
        key = (sampler, stream, *shape[1:])
        if key not in self._drawn:
            self._drawn[key] = sampler((1, *shape[1:]), generator=generator(0, "score", stream))
        return self._drawn[key].expand(shape[0], *shape[1:])


_GRAPHS: dict[Graph, type[_Encoder] | type[_Decoder] | type[Scorer]] = {
    "encoder": _Encoder, "decoder": _Decoder, "scorer": Scorer,
}  # fmt: skip


# --- ONNX -----------------------------------------------------------------------------------------------------------


def to_onnx(model: VAE, graph: Graph, metadata: Mapping[str, Any], *, opset: int = OPSET) -> bytes:
    """One graph of a model as an ONNX file: fp32, any number of rows, no randomness in it.

    ``encoder``: x to loc and scale of q(z|x). ``decoder``: z to the mean of p(x|z). ``scorer``: x to all of these at
    z = loc, and distortion and rate in nats.

    Args:
        model: on the CPU.
        graph: which.
        metadata: written into the file's properties, as JSON where it is not text.
        opset: the version of ONNX's operators.

    Raises:
        UsageError: if the packages for it are missing, the opset is not offered, or the model has no such graph.
        FailureError: if torch cannot export it.
    """
    _require("onnx", "onnxscript", "onnxruntime")
    if opset not in OPSETS:
        raise UsageError(f"--opset {opset}: there is {OPSETS.start} to {OPSETS.stop - 1}")
    module = _GRAPHS[graph](model).eval()
    names_in, names_out = module.names
    example = torch.zeros(2, *((model.latent_dim,) if graph == "decoder" else model.shape))
    rows = {0: torch.export.Dim("rows")}
    with _quiet():
        try:
            with torch.no_grad():
                program = torch.onnx.export(module, (example,), dynamo=True, opset_version=opset, verbose=False,
                                            input_names=list(names_in), output_names=list(names_out),
                                            dynamic_shapes=(rows,))  # fmt: skip
        except (NotImplementedError, TypeError) as error:
            raise UsageError(f"this model has no {graph} to export: {error}") from error
        except torch.onnx.OnnxExporterError as error:
            remedy = " (vaelab explore RUN, without --static, needs none)" if graph == "scorer" else ""
            raise FailureError(f"torch cannot export the {graph}: {_in_one_line(error)}{remedy}") from error
    if program is None:
        raise FailureError(f"torch exported no {graph}")
    _only_outputs_have(names_out, program.model.graph)
    for key, value in {"graph": graph, **metadata}.items():
        program.model.metadata_props[f"vaelab.{key}"] = value if isinstance(value, str) else json.dumps(value)
    return _without_traces(program.model_proto).SerializeToString()


def _only_outputs_have(names: Sequence[str], graph: Any) -> None:
    """Rename what within a graph is called as one of its outputs: torch names values after operations (``mean``)."""
    outputs = {id(value) for value in graph.outputs}
    for value in (value for node in graph for value in node.outputs):
        if value.name in names and id(value) not in outputs:
            value.name = f"{value.name}_within"


def _without_traces(made: Any) -> Any:
    """The graph without where each node was traced: those are paths of this machine."""
    for part in (made.graph, *made.functions):
        for entry in (part, *part.node, *part.value_info, *getattr(part, "input", ()), *getattr(part, "output", ())):
            if hasattr(entry, "metadata_props"):
                del entry.metadata_props[:]
    return made


def _in_one_line(error: Exception) -> str:
    """What torch says of its first error, without colours: the last one's words are about the exporter's steps."""
    while isinstance(error.__cause__, Exception):
        error = error.__cause__
    return re.sub(r"\x1b\[[0-9;]*m", "", reason(error))


@contextlib.contextmanager
def _quiet() -> Generator[None]:
    """Without what torch's exporter says about itself."""
    before = logging.root.manager.disable
    logging.disable(max(before, logging.WARNING))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def onnx_session(content: bytes) -> Callable[[NDArray[np.float32]], list[NDArray[np.float32]]]:
    """A function that runs a graph in onnxruntime."""
    _require("onnxruntime")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3  # errors
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    return lambda rows: [np.asarray(out) for out in session.run(None, {given.name: rows})]


@final
@dataclass(frozen=True)
class Parity:
    """The largest difference between a graph's output and the model's, over inputs of several sizes.

    Args:
        graph, output: which.
        difference: the largest absolute one.
        relative: the largest one divided by the magnitude of the model's number, where that is above 1; of the codes
            of a vector-quantized model, how much farther they lie from the encoder's output than the closest ones.
    """

    graph: Graph
    output: str
    difference: float
    relative: float

    @property
    def holds(self) -> bool:
        """Whether it is rounding."""
        return self.relative <= TOLERANCE


def parity(model: VAE, graph: Graph, content: bytes, inputs: Tensor) -> list[Parity]:
    """Run a graph and the model on the same inputs (M, ...), in batches of several sizes, and compare.

    Raises:
        FailureError: if a difference is more than rounding.
    """
    module, run = _GRAPHS[graph](model).eval(), onnx_session(content)
    names = module.names[1]
    found = {name: np.zeros(2) for name in names}
    for size in BATCHES:
        rows = inputs[:size]
        with torch.no_grad():
            expected = module(rows)
        for name, tensor, theirs in zip(names, expected, run(rows.numpy()), strict=True):
            ours = tensor.double().numpy()
            if ours.shape != theirs.shape:
                raise FailureError(f"the {graph}'s {name} is {theirs.shape} in ONNX and {ours.shape} in torch")
            gap = np.abs(theirs - ours)
            relative = gap / np.maximum(1, np.abs(ours))
            if graph == "encoder" and isinstance(head := model.posterior_head, VectorQuantized):
                with torch.no_grad():  # of codes that all but tie, rounding decides which is the closest
                    relative = np.abs(head.excess(model.encoder(rows), torch.from_numpy(theirs)).numpy())
            # np.maximum, and not max: it lets NaN through.
            found[name] = np.maximum(found[name], [gap.max(), relative.max()])
    result = [Parity(graph, name, *found[name].tolist()) for name in names]
    for one in result:
        if not one.holds:  # NaN too
            gap = f"the {graph}'s {one.output} differs from the model's by {one.difference:.2g}"
            raise FailureError(f"{gap}: more than rounding, so nothing is written")
    return result


# --- safetensors ----------------------------------------------------------------------------------------------------


def to_safetensors(model: VAE, config: Mapping[str, Any]) -> bytes:
    """A model's weights as a safetensors file that holds its configuration too (``load_model`` reads both).

    Args:
        model: what to write.
        config: the content of the run's ``config.json``.
    """
    _require("safetensors")
    from safetensors.torch import save

    weights = {name: value.contiguous() for name, value in model.state_dict().items()}
    return save(weights, {"format": "pt", "vaelab": json.dumps(portable(config))})


def portable(config: Mapping[str, Any]) -> dict[str, Any]:
    """The content of a ``config.json`` as it is given away: data by their name, without the path of this machine."""
    run = config["run"]
    data = {**run["data"], "source": PurePath(run["data"]["source"]).name}
    return {**config, "run": {**run, "data": data}}


def check_safetensors(model: VAE, content: bytes, x: Tensor) -> None:
    """Read a file of ``to_safetensors`` back and compare what it computes of images x (M, C, H, W) with the model.

    Raises:
        FailureError: if a single bit differs.
    """
    from vaelab.runs.loading import model_of_safetensors

    again = model_of_safetensors(content)
    with torch.no_grad():
        checks: dict[Graph, Tensor] = {"encoder": x, "decoder": codes_to_check(model, x)}
        for graph, inputs in checks.items():
            ours, theirs = (torch.cat([part.flatten() for part in _GRAPHS[graph](m).eval()(inputs)])
                            for m in (model, again))  # fmt: skip
            if not torch.equal(ours, theirs):
                raise FailureError(f"the {graph} of the safetensors file differs from the model's: nothing is written")


def codes_to_check(model: VAE, x: Tensor) -> Tensor:
    """Codes (M, D) that a decoder is checked with: half of images, half of the prior."""
    with torch.no_grad(), seeded(0):
        drawn = model.prior().sample((len(x),))
        codes = model.center(x)
    return torch.stack([codes, drawn], 1).flatten(0, 1)[: len(x)]


def _require(*packages: str) -> None:
    import importlib.util

    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(f"exporting needs {', '.join(missing)}: pip install {' '.join(missing)}")

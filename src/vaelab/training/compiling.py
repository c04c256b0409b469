"""Compiled functions: passes over memory fused into one, where the machine has a compiler and the work is long."""

from __future__ import annotations

import logging
import os
import shutil
import sysconfig
import warnings
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast, final

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from vaelab.errors import UsageError
from vaelab.models import VAE
from vaelab.runtime import RowNoise

log = logging.getLogger("vaelab")

TRUSTED: dict[str, Any] = {"cpp.vec_isa_ok": True}
"""Options of torch's compiler: vectors that the processor has are vectors that the C++ compiler knows.

Torch would build and load a program for each kind to see that: ten seconds of a first compilation, two and a half of
every later one. Where a C++ compiler is too old for them, compiling fails and steps are taken plainly.
"""


def can_compile(device: torch.device) -> bool:
    """Whether torch can compile here: for a CPU with a C++ compiler and Python's headers, for a GPU with Triton."""
    if device.type == "cuda":
        from torch.utils._triton import has_triton

        return has_triton()
    headers = Path(sysconfig.get_path("include")) / "Python.h"
    return device.type == "cpu" and headers.exists() and shutil.which(os.environ.get("CXX", "g++")) is not None


def compile_errors() -> tuple[type[Exception], ...]:
    """What torch's compiler raises; importing it takes a while, so not before it is used."""
    from torch._dynamo.exc import TorchDynamoException
    from torch._inductor.exc import InductorError

    return TorchDynamoException, InductorError


def compile_graph(graph: GraphModule, inputs: list[Tensor], options: dict[str, Any]) -> Callable[..., Sequence[Tensor]]:
    """Compile a traced graph as it is, for inputs of these shapes, which are not looked at when it is called.

    ``torch.compile`` would trace it once more, and check what it is given at each call: a tenth of a small step.

    Args:
        graph: as ``make_fx`` traces it.
        inputs: like those that it will be called with.
        options: of torch's compiler (``torch._inductor.config``).
    """
    from torch import _inductor
    from torch._subclasses import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    # Without this notebook of shapes, which stays empty, torch would not look into its cache of compiled graphs.
    stand_ins = FakeTensorMode(shape_env=ShapeEnv())
    likes = [stand_ins.from_tensor(tensor, static_shapes=True) for tensor in inputs]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of torch's compiler, about itself
        return cast(Callable[..., Sequence[Tensor]], _inductor.compile(graph, [*likes], options=TRUSTED | options))


def reason(error: Exception) -> str:
    """Why compiling failed, in one line."""
    inner = getattr(error, "inner_exception", error)
    return f"{type(inner).__name__}: {(str(inner).strip() or 'no message').splitlines()[0]}"


@contextmanager
def compiled_log_px(model: VAE) -> Generator[None]:
    """Let a model score images by a compiled ``log_px`` inside the block; numbers change by rounding.

    It is compiled at the first call, in some ten seconds, and again for other shapes: a shape that is known is faster.
    Where that fails, one line says so, and the model scores as it did.
    """
    plain = model.log_px
    fused = torch.compile(plain, dynamic=False, options=TRUSTED)
    own = vars(model)

    def log_px(*args: Any) -> Tensor:
        try:
            return fused(*args)
        except compile_errors() as error:
            if own["log_px"] is log_px:  # the first thread that fails says it
                own["log_px"] = plain
                log.warning("log p(x|z) cannot be compiled here (%s): slower without", reason(error))
            return plain(*args)

    # An instance's attribute comes before its class's method.
    own["log_px"] = log_px
    try:
        yield
    finally:
        del own["log_px"]


# --- whether it pays ------------------------------------------------------------------------------------------------


@final
class _Operations(TorchDispatchMode):
    """The floating-point operations of products and convolutions in a block, by torch's own formulas.

    torch's ``FlopCounterMode`` does the same, and imports the compiler for it: a second, and 70 MiB of a run that is
    not compiled.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if (formula := flop_registry.get(func.overloadpacket)) is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=out)
        return out


WORTH = 90.0  # seconds of plain training: compiling takes some ten for a small network, half a minute for a large one


def choose(requested: str, model: VAE, rows: int, steps: int, device: torch.device) -> bool:
    """Whether a run's steps are compiled: as requested; ``auto``: if the run is long and the machine can.

    How long a run takes is estimated from its work, not measured, so that the same run is always taken the same way:
    2 ms a step, and its floating-point operations at 100 billion a second.

    Args:
        requested: ``auto``, ``on`` or ``off``.
        model: what is trained.
        rows: images a step.
        steps: of the whole run.
        device: where it computes.

    Raises:
        UsageError: if compiled steps are asked for and the machine has no compiler.
    """
    if requested == "off":
        return False
    able = can_compile(device)
    if requested == "on" and not able:
        raise UsageError("--compile on needs a C++ compiler and Python's headers (g++, python3-dev): install them, or "
                         "leave it out")  # fmt: skip
    if requested == "on":
        return True
    with _Operations() as counted, torch.no_grad():
        # All rows: what is done once a batch, such as encoding pseudo-inputs, is no part of each.
        model.eval().draw(torch.zeros(rows, *model.shape, device=device), noise=RowNoise(0, device=device))
    # A backward pass is two products for each of the forward pass.
    seconds = steps * (2e-3 + 3 * counted.total / 1e11)
    if seconds > WORTH and not able:
        log.info("no C++ compiler is found here: steps are not compiled, and slower")
    return seconds > WORTH and able

"""The compiled step is the plain one, up to rounding; a machine without a compiler loses time and nothing else."""

import contextlib
import dataclasses
import itertools
import json
import logging
import math
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.flop_counter import FlopCounterMode

import vaelab as v
from vaelab import specs
from vaelab.cli import main
from vaelab.config import override
from vaelab.errors import UsageError
from vaelab.models import Batch
from vaelab.objectives import ELBO, IWAE, PIWAE
from vaelab.processes.distributed import Team
from vaelab.recipes import recipe
from vaelab.runs.folder import RunFolder
from vaelab.runtime import RowNoise
from vaelab.train import fit
from vaelab.training import compiling, stepping
from vaelab.training.activations import TANH
from vaelab.training.batchnorm import BATCH_NORM
from vaelab.training.compiling import can_compile, compile_graph
from vaelab.training.stepping import COMMON, AdamUpdate, CannotCompileError, CompiledStep, PlainStep
from vaelab.training.trainer import Trainer, build_model
from vaelab.training.updates import MovingAverage

CPU = torch.device("cpu")
needs_compiler = pytest.mark.skipif(not can_compile(CPU), reason="no C++ compiler or no headers of Python here")

TINY = {"encoder_hidden_dims": (32,), "decoder_hidden_dims": (32,), "latent_dim": 4, "batch_size": 96}
MLP = override(recipe("mlp"), data="digits", epochs=3, kl_warmup_epochs=1.0, **TINY)
RUNS = {
    # Noise for the latents and for the pixels, a rising weight on the rate, a learning rate that changes each step.
    "binarized": override(MLP, protocol="dynamic", schedule="cyclic", cycle_epochs=1.0),
    # Running means, weight decay, clipped gradients, motion, dropout, averaged weights.
    "conv-beta": override(
        recipe("conv-beta"), data="digits", epochs=2, kl_warmup_epochs=1.0, warmup_epochs=1.0, batch_size=96,
        encoder_conv_channels=(4,), decoder_conv_channels=(4,), encoder_hidden_dims=(16,), dropout=0.1,
        decoder_hidden_dims=(16,), augment_prob=0.5, ema_decay=0.9,
    ),
}  # fmt: skip


def trained(run: v.Run, data: v.data.Dataset, compiled: str, steps: int) -> Trainer:
    trainer = Trainer(override(run, compile=compiled), data, CPU)
    for _ in range(steps):
        trainer.train_step()
    return trainer


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records]


# --- the same numbers -----------------------------------------------------------------------------------------------


def assert_same_way(run: v.Run, functions: int) -> None:
    """Twenty steps, by as many compiled functions as are given, end where plain ones do."""
    data = v.load("digits", protocol=run.data.protocol)
    plain, compiled = (trained(run, data, way, 20) for way in ("off", "on"))
    assert isinstance(compiled._take_step, CompiledStep)
    assert compiled._take_step.update is not None
    assert not compiled._take_step._failed
    assert len(compiled._take_step._functions) == functions
    torch.testing.assert_close(compiled.terms[:20], plain.terms[:20], rtol=2e-5, atol=1e-4)
    for (key, a), b in zip(plain.model.state_dict().items(), compiled.model.state_dict().values(), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-3, atol=2e-5, msg=key)
    states = (
        [state for optimizer in trainer.optimizers.values() for state in optimizer.state_dict()["state"].values()]
        for trainer in (plain, compiled)
    )
    for a, b in zip(*states, strict=True):
        assert a["step"] == b["step"] == 20
        torch.testing.assert_close(b["exp_avg"], a["exp_avg"], rtol=1e-2, atol=1e-4)
        torch.testing.assert_close(b["exp_avg_sq"], a["exp_avg_sq"], rtol=1e-2, atol=1e-6)


@needs_compiler
@pytest.mark.parametrize("name", RUNS)
def test_compiled_and_plain_steps_take_the_same_way(name):
    assert_same_way(RUNS[name], functions=1)


@pytest.mark.parametrize(
    ("rule", "prior"),
    [(IWAE(3, warm_samples=(1, 3), warm_epochs=(1, 1), backward_samples=2), specs.VampPrior(5)),
     (PIWAE(3, 2, warm_samples=(1, 3), warm_epochs=(1, 1), backward_samples=1), specs.StandardNormal())],
    ids=["iwae", "piwae"],
)  # fmt: skip
def test_more_samples_as_it_goes_take_a_function_for_each_count(rule, prior, uncompiled):
    run = override(MLP, objective=rule, prior=prior, protocol="dynamic", precision="fp32")
    assert_same_way(run, functions=2)


def test_a_plain_run_can_go_on_compiled_and_back(digits, uncompiled):
    whole = trained(MLP, digits, "off", 30)
    parts = trained(MLP, digits, "off", 10)
    for way in ("on", "off"):
        following = Trainer(override(MLP, compile=way), digits, CPU)
        following.load_state(parts.state(), None)
        for _ in range(10):
            following.train_step()
        parts = following
    for a, b in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-3, atol=2e-5)


def test_gradients_alone_are_compiled_for_an_optimizer_that_is_not_adam(digits, uncompiled):
    plain, compiled = (Trainer(override(MLP, compile=way), digits, CPU) for way in ("off", "on"))
    for trainer in (plain, compiled):
        trainer.optimizers = {"model": torch.optim.SGD(trainer.groups["model"], 1e-4)}
        for _ in range(10):
            trainer.train_step()
    assert compiled._take_step.update is None
    assert not compiled._take_step._failed
    for a, b in zip(plain.model.parameters(), compiled.model.parameters(), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_the_update_is_torchs(clip, decay):
    torch.manual_seed(0)
    ours, theirs = ([nn.Parameter(torch.arange(6.0).reshape(2, 3)), nn.Parameter(torch.ones(4))] for _ in range(2))
    kind = torch.optim.AdamW if decay else torch.optim.Adam
    options = {"lr": 0.1, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": decay}
    update = AdamUpdate({"all": kind(ours, **options)}, clip)
    reference = kind(theirs, **options)
    for _ in range(5):
        gradients = [torch.randn_like(parameter) for parameter in theirs]
        for parameter, gradient in zip(theirs, gradients, strict=True):
            parameter.grad = gradient.clone()
        expected = nn.utils.clip_grad_norm_(theirs, clip) if clip else torch.zeros(())
        reference.step()
        found = update({"all": ours}, {"all": gradients}, [*update.state, *update.numbers()])
        update.taken += 1
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(ours, theirs)


def test_every_group_is_updated_by_its_own_settings():
    """Two optimizers of other rates, betas, decays and clipped norms; one rate changes between two steps."""
    torch.manual_seed(0)
    settings = {"model": {"lr": 0.1, "betas": (0.8, 0.95), "weight_decay": 0.1},
                "critic": {"lr": 0.02, "betas": (0.5, 0.9), "eps": 1e-2, "weight_decay": 0.3}}  # fmt: skip
    ours, theirs = ({name: [nn.Parameter(torch.ones(n)) for n in (3, 2)] for name in settings} for _ in range(2))
    optimizers, references = (
        {name: torch.optim.AdamW(groups[name], **settings[name]) for name in settings} for groups in (ours, theirs)
    )
    update = AdamUpdate(optimizers, 0.5)
    for size in (0.01, 10.0, 0.1):
        gradients = {name: [size * torch.randn_like(parameter) for parameter in theirs[name]] for name in settings}
        gradients["critic"] = [gradient / 5 for gradient in gradients["critic"]]
        norms = []
        for name, reference in references.items():
            for parameter, gradient in zip(theirs[name], gradients[name], strict=True):
                parameter.grad = gradient.clone()
            norms.append(nn.utils.clip_grad_norm_(theirs[name], 0.5))
            reference.step()
        found = update(ours, gradients, [*update.state, *update.numbers()])
        update.taken += 1
        torch.testing.assert_close(found, max(norms))
        for name in settings:
            torch.testing.assert_close(ours[name], theirs[name])
        for named in (optimizers, references):
            named["critic"].param_groups[0]["lr"] /= 2


@pytest.mark.parametrize("options", [{"amsgrad": True}, {"maximize": True}, {"weight_decay": 0.1}])
def test_other_rules_are_refused(options):
    with pytest.raises(CannotCompileError, match="Adam"):
        AdamUpdate({"all": torch.optim.Adam([nn.Parameter(torch.ones(2))], **options)}, None)


def test_an_optimizer_that_is_not_adam_is_refused():
    with pytest.raises(CannotCompileError, match="SGD"):
        AdamUpdate({"all": torch.optim.SGD([nn.Parameter(torch.ones(2))], 0.1, weight_decay=0.1)}, None)


# --- resuming -------------------------------------------------------------------------------------------------------

# The run above, of which torch's cache has the graph, as a command.
FLAGS = ["train", "conv-beta", "--data", "digits", "--batch-size", "96", "--encoder-conv-channels", "4",
         "--decoder-conv-channels", "4", "--encoder-hidden-dims", "16", "--decoder-hidden-dims", "16", "--dropout", "0.1",
         "--augment-prob", "0.5", "--ema-decay", "0.9", "--kl-warmup-epochs", "1", "--warmup-epochs", "1",
         "--epochs", "3", "--compile", "on"]  # fmt: skip


@needs_compiler
def test_a_compiled_run_with_dropout_that_is_killed_and_resumed_ends_with_the_same_bits(tmp_path):
    assert main([*FLAGS, "--out", str(tmp_path / "whole")]) == 0
    script = Path(__file__).with_name("killed.py")
    command = [sys.executable, script, "write:2", *FLAGS, "--save-every", "2", "--out", tmp_path / "parts"]
    killed = subprocess.run([*map(str, command)], capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert main(["train", "conv-beta", "--out", str(tmp_path / "parts"), "--resume"]) == 0
    whole, parts = (RunFolder.open(tmp_path / name) for name in ("whole", "parts"))
    for name, value in whole.load_best().items():
        assert torch.equal(parts.load_best()[name], value), name
    assert [record["loss"] for record in whole.history()] == [record["loss"] for record in parts.history()]


def test_more_epochs_do_not_change_how_steps_are_taken(tmp_path, digits, monkeypatch, uncompiled):
    run = override(MLP, kl_warmup_epochs=0.0, epochs=1)
    for number, (worth, expected) in enumerate(((1e9, False), (0.0, True))):
        out = tmp_path / str(number)
        monkeypatch.setattr(compiling, "WORTH", worth)
        fit(run, digits, out=out)
        assert RunFolder.open(out).config()["resolved"]["compile"] is expected
        monkeypatch.setattr(compiling, "WORTH", 1e9 - worth)
        fit(override(run, epochs=2), digits, out=out, resume=True)
        assert RunFolder.open(out).config()["resolved"]["compile"] is expected


def test_runs_from_before_compiled_steps_are_resumed_plainly(tmp_path, digits, monkeypatch):
    run = override(MLP, kl_warmup_epochs=0.0, epochs=1)
    fit(run, digits, out=tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["resolved"]["compile"], config["run"]["training"]["compile"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(compiling, "WORTH", 0.0)
    fit(override(run, epochs=2), digits, out=tmp_path, resume=True)
    assert RunFolder.open(tmp_path).config()["resolved"]["compile"] is False


# --- where it cannot be done ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TwoSteps(ELBO):
    """Encoder and decoder are trained one after the other."""

    def groups(self, model, networks):
        encoder = [*model.encoder.parameters(), *model.posterior_head.parameters()]
        return {"encoder": encoder, "decoder": list(model.decoder.parameters())}

    def losses(self, model, networks, batch, noise):
        for name in ("encoder", "decoder"):
            draw = model.draw(batch.x, noise=noise)
            distortion, rate = -draw.log_px.mean(), draw.kl.sum(0).mean()
            yield name, distortion + rate
        return {"loss": (distortion + rate).detach(), "distortion": distortion.detach(), "rate": rate.detach()}


@dataclass(frozen=True)
class Untraceable(ELBO):
    """A gradient that is no function of known operations: of a branch, of a tensor at large, or of too few parameters."""

    kind: str = specs.option("branch", "which of them")
    one = torch.ones(())

    def losses(self, model, networks, batch, noise):
        draw = model.draw(batch.x, noise=noise)
        distortion, rate = -draw.log_px.mean(), draw.kl.sum(0).mean()
        loss = rate if self.kind == "rate" else distortion + rate
        if self.kind == "branch" and rate < 0:
            loss = distortion
        yield "model", loss * self.one if self.kind == "tensor" else loss
        return {"loss": loss.detach(), "distortion": distortion.detach(), "rate": rate.detach()}


@pytest.mark.parametrize("kind", ["branch", "tensor", "rate"])
def test_an_objective_that_cannot_be_traced_costs_a_line_and_no_number(kind, digits, caplog, uncompiled):
    run = dataclasses.replace(MLP, objective=Untraceable(kind=kind))
    with caplog.at_level(logging.WARNING):
        plain, compiled = (trained(run, digits, way, 2) for way in ("off", "on"))
    (line,) = said(caplog)
    assert "cannot be compiled" in line
    assert torch.equal(plain.terms, compiled.terms)


@needs_compiler
def test_an_objective_of_several_steps_costs_a_line_and_no_number(digits, caplog):
    run = dataclasses.replace(MLP, objective=TwoSteps())
    with caplog.at_level(logging.WARNING):
        plain, compiled = (trained(run, digits, way, 3) for way in ("off", "on"))
    (line,) = said(caplog)
    assert "TwoSteps" in line
    assert torch.equal(plain.terms, compiled.terms)


def test_a_compiler_that_fails_costs_a_line_and_no_number(tmp_path):
    command = [sys.executable, "-m", "vaelab", "train", "mlp", "--data", "digits", "--encoder-hidden-dims", "32",
               "--decoder-hidden-dims", "32", "--batch-size", "96", "--epochs", "2"]  # fmt: skip
    broken = {"CXX": "/bin/false", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run([*command, "--compile", "on", "--out", str(tmp_path / "on")], capture_output=True, text=True,
                          env={**os.environ, **broken})  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("training steps cannot be compiled") == 1
    assert main([*command[3:], "--compile", "off", "--out", str(tmp_path / "off")]) == 0
    on, off = (RunFolder.open(tmp_path / name).load_best() for name in ("on", "off"))
    assert all(torch.equal(on[name], off[name]) for name in off)


def test_without_a_compiler_one_line_says_what_it_costs(digits, monkeypatch, caplog, capsys):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    assert not can_compile(CPU)
    with pytest.raises(UsageError, match=r"g\+\+"):
        Trainer(override(MLP, compile="on"), digits, CPU)
    with caplog.at_level(logging.INFO):
        long = Trainer(override(MLP, epochs=100_000), digits, CPU)
    assert not long.compiled
    assert sum("no C++ compiler" in line for line in said(caplog)) == 1
    caplog.clear()
    with caplog.at_level(logging.INFO):
        assert not Trainer(MLP, digits, CPU).compiled
    assert not any("compiler" in line for line in said(caplog)), "a short run loses nothing"


@needs_compiler
def test_long_runs_are_compiled_and_short_ones_are_not(digits):
    assert not Trainer(MLP, digits, CPU).compiled
    assert Trainer(override(MLP, epochs=100_000), digits, CPU).compiled
    assert not Trainer(override(MLP, epochs=100_000, compile="off"), digits, CPU).compiled
    # By work, not by steps alone: of two networks that take the same number of steps the large one gains.
    steps = 20_000
    small, large = (Trainer(override(recipe(name), data="digits"), digits, CPU).model for name in ("mlp", "conv-beta"))
    assert not compiling.choose("auto", small, 32, steps, CPU)
    assert compiling.choose("auto", large, 256, steps, CPU)


def test_what_is_done_once_a_batch_is_counted_once(monkeypatch):
    """A VampPrior encodes 500 pseudo-inputs a batch, not an image: an epoch takes some ten seconds."""
    monkeypatch.setattr(compiling, "can_compile", lambda device: True)
    vamp = build_model(recipe("vamp"), (1, 28, 28))
    assert not compiling.choose("auto", vamp, 250, 200, CPU)
    assert compiling.choose("auto", vamp, 250, 20_000, CPU)


def test_the_plain_step_is_the_reference(digits):
    trainer = trained(MLP, digits, "off", 1)
    assert isinstance(trainer._take_step, PlainStep)


# --- batch norm ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape", [(32, 5, 6, 4), (17, 3, 2, 2), (64, 4)]
)  # 16 groups of two; one group, 17 being prime
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_batch_norm_in_two_stages_is_torchs(shape, dtype):
    torch.manual_seed(0)
    x, grad = ((torch.randn(shape) * 3 + 5).to(dtype) for _ in range(2))
    of_channels = torch.float32 if dtype == torch.bfloat16 else dtype
    weight, bias = torch.rand(shape[1], dtype=of_channels) + 0.5, torch.randn(shape[1], dtype=of_channels)

    def normalise(x, weight, bias, mean, var, grad):
        given = x.detach().requires_grad_(), weight.detach().requires_grad_(), bias.detach().requires_grad_()
        out = nn.functional.batch_norm(given[0], mean, var, *given[1:], training=True, momentum=0.3)
        return out, *torch.autograd.grad(out, given, grad), mean, var

    def inputs():
        return x, weight, bias, torch.ones_like(bias), torch.full_like(bias, 2.0), grad

    graph = make_fx(normalise, BATCH_NORM, tracing_mode="fake")(*inputs())
    assert not [node for node in graph.graph.nodes if "batch_norm" in str(node.target)]
    rounding = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {"rtol": 1e-9, "atol": 1e-9}
    for found, torchs in zip(graph(*inputs()), normalise(*inputs()), strict=True):
        assert found.dtype == torchs.dtype
        torch.testing.assert_close(found, torchs, **rounding)


@needs_compiler
def test_what_the_compiler_deprecates_of_itself_is_no_warning_of_ours():
    """Reading a diagonal, as full covariances do, warns within torch; the suite would make it an error."""
    x = torch.randn(4, 4)
    graph = make_fx(lambda x: [x.diagonal() + 1], tracing_mode="fake")(x)
    (found,) = compile_graph(graph, [x], {})(x)
    assert torch.equal(found, x.diagonal() + 1)


@needs_compiler
def test_torch_builds_no_program_to_see_which_vectors_there_are(monkeypatch):
    """Which takes longer than compiling a step; its option is an internal one, and could change its name or meaning."""
    from torch._inductor import config
    from torch._inductor.cpu_vec_isa import VecAVX2, VecISA

    def build(self, code):
        pytest.fail("a program was built")

    monkeypatch.setattr(VecISA, "check_build", build)
    given = {}
    monkeypatch.setattr("torch._inductor.compile", lambda graph, inputs, options: given.update(options) or graph)
    x = torch.randn(4)
    compile_graph(make_fx(lambda x: [x + 1], tracing_mode="fake")(x), [x], {"size_asserts": False})
    assert given["size_asserts"] is False
    with config.patch(given):
        assert VecAVX2()


@needs_compiler
def test_the_traced_step_has_no_batch_norm_left(digits, monkeypatch):
    traced = []
    monkeypatch.setattr(stepping, "compile_graph", lambda graph, inputs, options: traced.append(graph) or graph)
    trained(RUNS["conv-beta"], digits, "on", 1)
    names = [str(node.target) for node in traced[0].graph.nodes]
    assert "aten.rsqrt.default" in names
    assert not [name for name in names if "batch_norm" in name]


def test_batch_norm_by_its_running_means_is_left_alone():
    inputs = torch.randn(4, 3, 2, 2), torch.rand(3), torch.rand(3), torch.rand(3), torch.rand(3)
    graph = make_fx(lambda x, *numbers: nn.functional.batch_norm(x, *numbers), BATCH_NORM, tracing_mode="fake")(*inputs)
    assert [node for node in graph.graph.nodes if "batch_norm" in str(node.target)]


# --- activations ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_traced_hyperbolic_tangent_is_torchs(dtype):
    """At every size of its argument, the sign of a zero and infinity among them; and so is its gradient."""
    sizes = torch.cat([torch.logspace(-30, 2, 4001), torch.tensor([0.0, 0.02, math.inf])])
    x = torch.cat([sizes, -sizes]).to(dtype)

    def bent(x):
        given = x.detach().requires_grad_()
        y = given.tanh()
        return y, *torch.autograd.grad(y.sum(), given)

    graph = make_fx(bent, TANH, tracing_mode="fake")(x)
    assert not [node for node in graph.graph.nodes if "aten.tanh.default" in str(node.target)]
    exact = x.double().tanh()
    for found, torchs in zip(graph(x), (exact, 1 - exact**2), strict=True):
        assert found.dtype == dtype
        close = {"rtol": 8e-3, "atol": 4e-3} if dtype == torch.bfloat16 else {"rtol": 5e-6, "atol": 2e-7}
        torch.testing.assert_close(found.double(), torchs, **close)
    y = graph(x)[0].float()
    torch.testing.assert_close(y, exact.float(), rtol=4e-3 if dtype == torch.bfloat16 else 5e-6, atol=0.0)
    assert torch.equal(y.signbit(), x.signbit())


def test_a_hyperbolic_tangent_in_double_precision_is_left_alone():
    graph = make_fx(torch.tanh, TANH, tracing_mode="fake")(torch.randn(4, dtype=torch.float64))
    assert [node for node in graph.graph.nodes if "aten.tanh.default" in str(node.target)]


class Pair:
    """A team of two, as one of them sees it whose twin does the same."""

    rank, world, leads, memory = 0, 2, True, None

    def __init__(self, other_is_able=True):
        self.averaged, self.votes, self.other = [], [], other_is_able

    def average_(self, *values):
        self.averaged.append(sum(value.numel() for value in values))

    def average_gradients(self, parameters):
        self.average_(*(parameter.grad for parameter in parameters))

    def rows(self, count, like):
        return torch.zeros(1, count, dtype=like.dtype)

    def own(self, rows):
        return rows[0]

    def exchange_(self, rows):
        self.averaged.append(rows.numel())

    def agree(self, able):
        self.votes.append(able)
        return able and self.other


def steps_of(way, model, networks, objective, count=3):
    images = torch.rand(count, 6, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    return [way(objective, Batch(x), RowNoise(step)).clone() for step, x in enumerate(images)]


CONV = override(RUNS["conv-beta"], dropout=0.0)


def plain_step(objective, team, run=CONV, clip=1.0):
    """A plain step of a small model, by default a convolutional one with batch norm, and its optimizers."""
    torch.manual_seed(0)
    model = build_model(run, (1, 8, 8)).train()
    groups = objective.groups(model, nn.ModuleDict())
    optimizers = {name: specs.Adam().build(group, 1e-2) for name, group in groups.items()}

    def descend(names):
        team.average_gradients(itertools.chain.from_iterable(groups[name] for name in names))
        norms = [nn.utils.clip_grad_norm_(groups[name], clip) if clip else torch.zeros(()) for name in names]
        for name in names:
            optimizers[name].step()
        return torch.stack(norms).amax()

    return PlainStep(
        model, nn.ModuleDict(), groups, lambda batch, noise: batch, contextlib.nullcontext, descend
    ), optimizers


def assert_two_functions(objective, monkeypatch, run=CONV):
    """Between them is one average of all gradients, and their numbers are those of the plain step."""
    plain, _ = plain_step(objective, team := Pair(), run)
    expected = steps_of(plain, plain.model, plain.networks, objective)
    count = sum(parameter.numel() for parameter in plain.model.parameters())
    assert team.averaged == [count] * 3, "plainly too there is one message a step"
    twin, optimizers = plain_step(objective, team := Pair(), run)
    compiled = CompiledStep(twin, AdamUpdate(optimizers, 1.0), team)
    monkeypatch.setattr(PlainStep, "__call__", None)
    found = steps_of(compiled, twin.model, twin.networks, objective)
    assert (team.averaged, team.votes) == ([count] * 3, [True])
    torch.testing.assert_close(torch.stack(found), torch.stack(expected), rtol=1e-4, atol=1e-4)
    for name, value in plain.model.state_dict().items():  # the buffers among them: trying changes nothing
        torch.testing.assert_close(twin.model.state_dict()[name], value, rtol=2e-3, atol=2e-4, msg=name)


@pytest.mark.parametrize("places", ["each", "one"])
@pytest.mark.parametrize("objective", [ELBO(), PIWAE(2, 2)], ids=["one-group", "two-groups"])
def test_with_several_processes_the_optimizers_step_is_a_function_of_its_own(
    objective, places, monkeypatch, uncompiled
):
    if places == "one":  # for all parameters, as on a GPU
        monkeypatch.setattr(CompiledStep, "_places", lambda self, rows, sizes: [rows[0]])
    assert_two_functions(objective, monkeypatch)


@pytest.mark.parametrize("objective", [ELBO(), PIWAE(2, 2)], ids=["one-group", "two-groups"])
@pytest.mark.parametrize("clip", [None, 1.0])
def test_processes_that_share_memory_step_a_part_each(objective, clip, monkeypatch, shared, uncompiled):
    """Weights (those of convolutions lie channels last), moments and norms are those of the plain step."""
    monkeypatch.setattr(Team, "agree", lambda team, able: able)
    sums, met = Team.sums, []
    monkeypatch.setattr(Team, "sums", lambda team, *numbers: (met.append(len(numbers)), sums(team, *numbers))[1])
    images = torch.rand(3, 2, 6, 1, 8, 8, generator=torch.Generator().manual_seed(0))

    def together(make):
        ways = [make(Team(rank, 2, memory)) for rank, memory in enumerate(shared(2, kinds=COMMON))]
        for way in ways:
            if isinstance(way, CompiledStep):
                way._traced(objective, Batch(images[0, 0]))  # one after the other: threads cannot trace

        def work(rank):
            return [ways[rank](objective, Batch(x[rank]), RowNoise(step))[-1] for step, x in enumerate(images)]

        with ThreadPoolExecutor(2) as pool:
            norms = list(pool.map(work, range(2)))
        assert norms[0] == norms[1]
        return ways, norms[0]

    optimizers = []

    run = override(CONV, encoder_conv_channels=(4, 8), decoder_conv_channels=(8, 4))

    def plain(team):
        way, own = plain_step(objective, team, run, clip)
        optimizers.append(own)
        return way

    expected, norms = together(plain)
    found, same_norms = together(lambda team: CompiledStep(plain(team), AdamUpdate(optimizers[-1], clip), team))
    torch.testing.assert_close(same_norms, norms, rtol=1e-3, atol=1e-5)
    assert met.count(0) == 3 * 2, "after each step all wait until each weight is stepped"
    for rank, way in enumerate(found):
        assert not way._failed
        way._team.memory.release()
        for name, group in way.plain.groups.items():
            for ours, theirs in zip(group, expected[0].groups[name], strict=True):
                torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=2e-4)
                moments, others = optimizers[2 + rank][name].state[ours], optimizers[0][name].state[theirs]
                for kind in ("exp_avg", "exp_avg_sq", "step"):
                    torch.testing.assert_close(moments[kind], others[kind], rtol=2e-3, atol=1e-4)


def test_weights_are_each_processs_own_again_where_steps_cannot_be_compiled(monkeypatch, shared, uncompiled):
    """Stepped by each of them, plainly, in one place, they would take each step twice."""

    def fail(*_):
        raise CannotCompileError("not here")

    monkeypatch.setattr(CompiledStep, "_made", fail)
    way, optimizers = plain_step(ELBO(), team := Pair())
    team.memory = shared(2, kinds=COMMON)[0]
    weights = next(way.model.parameters())
    where = []
    adopt = team.memory.adopt
    monkeypatch.setattr(team.memory, "adopt", lambda *kinds: (adopt(*kinds), where.append(weights.data_ptr()))[0])
    before = weights.detach().clone()
    compiled = CompiledStep(way, AdamUpdate(optimizers, 1.0), team)
    monkeypatch.setattr(PlainStep, "__call__", lambda *_: torch.zeros(1))
    steps_of(compiled, way.model, way.networks, ELBO(), count=1)
    assert weights.data_ptr() != where[0]
    assert torch.equal(weights, before)


@needs_compiler
def test_what_writes_gradients_where_processes_share_them_can_be_compiled(monkeypatch):
    assert_two_functions(ELBO(), monkeypatch, MLP)


@pytest.mark.parametrize("who", ["other", "own", "second"])
def test_all_processes_step_plainly_where_one_cannot_compile(who, monkeypatch, caplog, uncompiled):
    """Whoever it is, and whichever function fails: nothing was changed or sent before."""
    objective = ELBO()
    plain, _ = plain_step(objective, Pair())
    expected = steps_of(plain, plain.model, plain.networks, objective)
    twin, optimizers = plain_step(objective, team := Pair(other_is_able=who != "other"))
    compiled = CompiledStep(twin, AdamUpdate(optimizers, 1.0), team)

    def fail(*_):
        raise CannotCompileError("not here")

    if who == "own":
        monkeypatch.setattr(CompiledStep, "_made", fail)
    if who == "second":
        monkeypatch.setattr(CompiledStep, "_compile_descent", fail)
    assert torch.equal(torch.stack(steps_of(compiled, twin.model, twin.networks, objective)), torch.stack(expected))
    assert team.votes == [who == "other"]
    assert len(team.averaged) == 3
    assert caplog.text.count("slower without") == 1
    assert ("another process cannot" in caplog.text) == (who == "other")
    for name, value in plain.model.state_dict().items():
        assert torch.equal(twin.model.state_dict()[name], value), name


@pytest.mark.parametrize("settings", [{}, {"weight_decay": 1e-2}])
def test_optimizers_that_load_no_compiler_step_as_torchs_do(settings):
    """The same bits, the same state, and a state of either is the other's."""
    kind = torch.optim.AdamW if settings else torch.optim.Adam
    spec = specs.AdamW(**settings) if settings else specs.Adam()
    start = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    weights = [torch.nn.Parameter(start.clone()) for _ in range(2)]
    ours, theirs = spec.build([weights[0]], 1e-2), kind([weights[1]], 1e-2, fused=True, **settings)
    assert isinstance(ours, kind)
    for step in range(4):
        if step == 2:
            saved = ours.state_dict()
            ours.load_state_dict(theirs.state_dict())
            theirs.load_state_dict(saved)
        for weight, optimizer in zip(weights, (ours, theirs), strict=True):
            optimizer.zero_grad()
            (weight * torch.arange(5.0) - step).square().sum().backward()
            optimizer.step()
        assert torch.equal(*weights)
    assert weights[0].requires_grad
    assert not torch.equal(weights[0], start)


def test_the_moving_average_is_torchs():
    """Weights, running means and the count of steps, before and after a checkpoint is loaded."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    torchs = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    averages = [MovingAverage(model, 0.9), MovingAverage(model, 0.9)]
    for _ in range(4):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape))
        model(torch.randn(8, 4))
        averages[1].load_state_dict(torchs.state_dict())
        for average in (torchs, *averages):
            average.update_parameters(model)
            assert dict(average.state_dict()).keys() == dict(torchs.state_dict()).keys()
            for name, value in average.state_dict().items():
                assert torch.equal(value, torchs.state_dict()[name]), name
    assert not torch.equal(torchs.module[0].weight, model[0].weight), "an average, not a copy"


@pytest.mark.parametrize("name", ["conv-beta", "vamp", "iaf"])
def test_operations_are_counted_as_torch_counts_them(name):
    model = build_model(recipe(name), (1, 28, 28)).eval()
    with FlopCounterMode(display=False) as theirs, compiling._Operations() as ours, torch.no_grad():
        model.draw(torch.zeros(1, 1, 28, 28), noise=RowNoise(0))
    assert ours.total == theirs.get_total_flops() > 1e6


def test_a_plain_training_loads_no_compiler(tmp_path):
    """It takes a second and 70 MiB, and torch would load it for its optimizers alone."""
    program = """
import sys, vaelab as v
for optimizer in ("adam", "adamw", "adagrad"):
    run = v.override(v.recipes.conv_beta(), data="digits", epochs=1, batch_size=128, encoder_conv_channels=(4, 8),
                     decoder_conv_channels=(8, 4), compile="auto", optimizer=optimizer)
    v.fit(run, out=f"{optimizer}-a")
    v.fit(v.override(run, schedule="constant", epochs=1), out=f"{optimizer}-b")
    v.fit(v.override(run, schedule="constant", epochs=2), out=f"{optimizer}-b", resume=True)
print(sorted({"torch._dynamo", "torch._inductor", "sympy"} & set(sys.modules)))
"""
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.stdout == "[]\n", done.stdout + done.stderr


def test_gradients_below_the_clip_norm_stay_as_they_are():
    ours, theirs = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))
    theirs.grad = torch.randn(4, generator=torch.Generator().manual_seed(0))
    options = {"lr": 0.1, "eps": 1.0}  # with a small epsilon Adam's step does not depend on the gradient's size
    update = AdamUpdate({"all": torch.optim.Adam([ours], **options)}, 1e6)
    torch.optim.Adam([theirs], **options).step()
    update({"all": [ours]}, {"all": [theirs.grad]}, [*update.state, *update.numbers()])
    torch.testing.assert_close(ours, theirs)

"""Parts of one's own: registered, they are what vaelab's are; not registered, they are named and refused."""

import dataclasses
import math
import os
import sys
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import nn

import vaelab as v
from vaelab import objectives, slots, specs
from vaelab.cli import main
from vaelab.config import from_json, override, to_json
from vaelab.errors import UsageError
from vaelab.likelihoods import Likelihood
from vaelab.posteriors import Head, NormalPosterior
from vaelab.recipes import recipe
from vaelab.runtime import StepNoise

RING = Path(__file__).parent.parent / "examples" / "ring.py"


pytestmark = pytest.mark.usefixtures("nothing_registered")


@pytest.fixture
def ring():
    slots.import_parts([str(RING)])
    return sys.modules["ring"]


def forget():
    """As another program, that knows nothing of the parts."""
    for added in slots._added.values():
        added.clear()
    sys.modules.pop("ring", None)
    os.environ[slots.PARTS] = ""


class TestTheExample:
    def test_density_integrates_to_one_and_is_what_is_drawn(self, ring):
        law = ring.OnRing(torch.tensor(math.log(3.0)), 0.1)
        line = torch.linspace(-6, 6, 601)
        grid = torch.cartesian_prod(line, line)
        assert law.log_prob(grid).exp().sum() * (line[1] - line[0]) ** 2 == pytest.approx(1, abs=1e-3)
        torch.manual_seed(0)
        for drawn in (law.sample((20_000,)), law.rsample_from(StepNoise(0, 0), 20_000)):
            assert drawn.norm(dim=1).log().mean() == pytest.approx(math.log(3), abs=0.005)
            assert drawn.norm(dim=1).log().std() == pytest.approx(0.1, abs=0.005)
            assert drawn.mean(0).abs().max() < 0.1

    def test_its_rate_is_led_to_the_target(self, ring, digits):
        run = override(recipe("mlp-2d"), prior="ring", objective="rate-target", target=4.0, pull=10.0, epochs=40)
        model = v.fit(run, digits)
        measured = v.evaluate.evaluate(model, run, digits, "validation")
        assert float(measured["rate"].value) == pytest.approx(4, abs=1)

    def test_another_size_is_refused_in_one_line(self, ring, digits):
        with pytest.raises(UsageError, match="--prior ring lies in the plane: --latent-dim 2, not 20"):
            v.fit(override(recipe("mlp"), prior="ring"), digits)


class TestARegisteredPart:
    def test_is_chosen_by_its_word_and_set_by_its_flags(self, ring):
        run = override(recipe("mlp-2d"), prior="ring", radius=4, objective=ring.RateTarget(target=5.0))
        assert run.prior == ring.Ring(radius=4.0)
        assert from_json(to_json(run)) == run
        assert to_json(run)["prior"] == {"kind": "ring:Ring", "radius": 4.0, "width": 0.1}
        with pytest.raises(UsageError, match=r"--radius 0\.0: must be greater than 0"):
            override(run, radius=0)

    def test_is_known_to_every_command_that_is_told(self, tmp_path, capsys, monkeypatch):
        monkeypatch.chdir(tmp_path)
        parts = ["--parts", str(RING)]
        train = ["train", "mlp-2d", "--prior", "ring", "--objective", "rate-target", "--data", "digits", "--out", "run"]
        assert main([*parts, *train, "--epochs", "1"]) == 0
        forget()
        assert main(["evaluate", "run"]) == 2
        told = "vaelab: the run.prior is ring:Ring, which is not vaelab's and was not registered here; "
        assert told + "on the command line: vaelab --parts ring.py COMMAND" in capsys.readouterr().err
        for command in (
            "doctor run",
            "report run",
            "draw run latent",
            "sample run",
            "export run",
            f"{train[0]} mlp-2d",
        ):
            forget()
            words = [*train, "--epochs", "2", "--resume"] if command.startswith("train") else command.split()
            assert main([*words, f"--parts={RING}"]) == 0, command
        assert (
            "vaelab --parts ring.py train mlp-2d --prior ring --objective rate-target"
            in Path("run/report.html").read_text()
        )
        forget()
        with pytest.raises(UsageError, match="ring:Ring, which is not vaelab's and was not registered here"):
            v.load_model("run")
        slots.import_parts([str(RING)])
        assert type(v.load_model("run").prior()).__name__ == "OnRing"

    def test_that_is_missing_in_another_process_is_named_there(self, ring):
        """Processes that this one starts import what it did."""
        assert os.environ[slots.PARTS] == str(RING.resolve())
        run = override(recipe("mlp-2d"), prior="ring")
        assert slots.parts_of(run) == ["--parts", os.path.relpath(RING)]
        assert slots.parts_of(recipe("mlp-2d")) == []

    def test_may_be_registered_anew_as_by_a_cell_that_is_run_again(self):
        def define():
            @v.register("objective")
            @dataclasses.dataclass(frozen=True)
            class Plain(objectives.Objective):
                word: ClassVar[str] = "plain"

                def loss(self, means):
                    return means["distortion"]

            return Plain

        first, second = define(), define()
        assert first is not second
        assert slots.kinds_by_word("objective")["plain"] is second

    def test_of_a_script_is_the_one_of_the_file_when_that_is_imported(self, ring):
        content = to_json(override(recipe("mlp-2d"), prior="ring", radius=2.0))
        content["prior"]["kind"] = "__main__:Ring"
        assert from_json(content).prior == ring.Ring(radius=2.0)
        content["prior"]["kind"] = "other:Ring"
        with pytest.raises(UsageError, match=r"other:Ring, which is not .* vaelab --parts other\.py COMMAND"):
            from_json(content)
        forget()
        content["prior"]["kind"] = "__main__:Ring"
        with pytest.raises(UsageError, match=r"__main__:Ring, which is not .* vaelab --parts FILE COMMAND"):
            from_json(content)

    def test_must_be_registered_before_it_is_set(self):
        with pytest.raises(
            UsageError, match=r"prior may not be OwnEncoder: @vaelab\.register\('prior'\) its class first"
        ):
            override(recipe("mlp"), prior=OwnEncoder())


def frozen(**body):
    """A frozen dataclass of these attributes, and of ``base``."""
    base = body.pop("base", specs.Spec)
    return dataclasses.dataclass(frozen=True)(type("Mine", (base,), {"__module__": "mine", **body}))


@pytest.mark.parametrize(
    ("slot", "kind", "message"),
    [
        ("likelihud", frozen, r"a run has no slot 'likelihud'; did you mean 'likelihood'\?"),
        ("prior", type("Mine", (specs.Spec,), {"word": "mine"}), "make it a frozen dataclass"),
        ("prior", dataclasses.make_dataclass("Mine", []), "make it a frozen dataclass"),
        ("prior", frozen(base=object, word="mine"), r"make it a subclass of vaelab\.specs\.Spec"),
        ("objective", frozen(word="mine"), r"make it a subclass of vaelab\.objectives\.Objective"),
        ("objective", frozen(base=objectives.Objective, word="mine"), "it has abstract methods left"),
        ("prior", frozen(word="mine"), "name the module that it makes"),
        ("optimizer", frozen(base=object, word="mine"), r"it has no method build\(\.\.\.\)"),
        ("schedule", frozen(base=object, word="mine"), r"it has no method schedule\(\.\.\.\)"),
        ("prior", frozen(part="mine:Module"), r'give it a word of its own to be chosen by \(word = "ring"\)'),
        ("prior", frozen(part="mine:Module", word="vamp"), "the word 'vamp' is that of VampPrior"),
        (
            "prior",
            frozen(part="mine:Module", word="mine", __annotations__={"size": int}, size=3),
            r"declare size by vaelab\.specs\.option\(default, help\)",
        ),
        (
            "prior",
            frozen(
                part="mine:Module", word="mine", __annotations__={"resume": int}, resume=specs.option(3, "how often")
            ),
            "the name 'resume' is taken on the command line",
        ),
    ],
)
def test_what_cannot_fill_a_slot_is_refused_in_one_line(slot, kind, message):
    with pytest.raises(UsageError, match=message):
        v.register(slot)(kind)
    assert not any(slots._added.values())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"--parts .*parts_of_mine\.py: there is no such file"),
        ("x = 1\ny = 1 / 0\n", r"--parts .*parts_of_mine\.py, line 2: ZeroDivisionError: division by zero"),
        ("def f(:\n", r"--parts .*parts_of_mine\.py, line 1: SyntaxError: "),
    ],
)
def test_a_file_that_cannot_be_imported_is_named_with_its_line(content, message, tmp_path, capsys):
    file = tmp_path / "parts_of_mine.py"
    if content is not None:
        file.write_text(content)
    assert main(["--parts", str(file), "recipes"]) == 2
    assert pytest.importorskip("re").search(message, capsys.readouterr().err)
    assert "parts_of_mine" not in sys.modules


def test_a_file_with_the_name_of_a_module_is_refused(tmp_path):
    (tmp_path / "math.py").write_text("")
    with pytest.raises(UsageError, match=r"--parts .*math\.py: another module is called math: rename the file"):
        slots.import_parts([str(tmp_path / "math.py")])


def test_modules_are_imported_by_name_and_nothing_is_an_error(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "mine_on_path.py").write_text("import vaelab\nREAD = True\n")
    assert main(["recipes", "--parts", "mine_on_path"]) == 0
    assert sys.modules["mine_on_path"].READ
    assert main(["--parts"]) == 2
    assert main(["recipes", "--parts="]) == 2
    assert "vaelab: --parts is empty: name a file that registers parts of your own" in capsys.readouterr().err


# --- a part of one's own in every slot --------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class OwnEncoder(specs.Spec):
    part: ClassVar[str] = f"{__name__}:OwnEncoderNet"
    word: ClassVar[str] = "own-encoder"
    width: int = specs.positive(24, "features")


class OwnEncoderNet(nn.Sequential):
    def __init__(self, spec, shape):
        super().__init__(nn.Flatten(), nn.Linear(math.prod(shape), spec.width), nn.Softplus())
        self.spec, self.out_features = spec, spec.width


@dataclasses.dataclass(frozen=True)
class OwnPosterior(specs.Spec):
    part: ClassVar[str] = f"{__name__}:OwnHead"
    word: ClassVar[str] = "own-posterior"
    sigma: float = specs.positive(0.3, "the same of every latent")


class OwnHead(Head):
    def __init__(self, spec, features):
        super().__init__(spec, 3)
        self.loc = nn.Linear(features, 3)

    def forward(self, features):
        loc = self.loc(features)
        return NormalPosterior(loc, torch.full_like(loc, math.log(self.spec.sigma)))


@dataclasses.dataclass(frozen=True)
class OwnDecoder(specs.Spec):
    part: ClassVar[str] = f"{__name__}:OwnDecoderNet"
    word: ClassVar[str] = "own-decoder"


class OwnDecoderNet(nn.Sequential):
    def __init__(self, spec, latent_dim, out_shape):
        super().__init__(nn.Linear(latent_dim, math.prod(out_shape)), nn.Unflatten(1, out_shape))
        self.spec = spec

    def start_at(self, params):
        with torch.no_grad():
            self[0].bias.copy_(params.flatten())


@dataclasses.dataclass(frozen=True)
class OwnLikelihood(specs.Spec):
    part: ClassVar[str] = f"{__name__}:OwnPixels"
    word: ClassVar[str] = "own-likelihood"


class OwnPixels(Likelihood):
    support = "real"

    def forward(self, params):
        pixels = torch.distributions.StudentT(5.0, params, 0.2, validate_args=False)
        return torch.distributions.Independent(pixels, 3, validate_args=False)

    def start(self, mean):
        return mean


@dataclasses.dataclass(frozen=True)
class OwnOptimizer:
    word: ClassVar[str] = "own-optimizer"
    momentum: float = specs.option(0.5, "of the gradient")

    def build(self, parameters, learning_rate):
        return torch.optim.SGD(parameters, learning_rate, momentum=self.momentum)


@dataclasses.dataclass(frozen=True)
class OwnSchedule:
    word: ClassVar[str] = "own-schedule"
    warmup_epochs: ClassVar[float] = 0
    peak: float = specs.positive(1e-4, "the learning rate of the first step")

    def schedule(self, steps_per_epoch, epochs):
        return lambda step: self.peak / (1 + step)


def test_every_slot_takes_a_part_of_ones_own(tmp_path, digits):
    slots.import_parts([str(RING)])
    own = [OwnEncoder, OwnPosterior, OwnDecoder, OwnLikelihood, OwnOptimizer, OwnSchedule]
    for slot, kind in zip(("encoder", "posterior", "decoder", "likelihood", "optimizer", "schedule"), own, strict=True):
        v.register(slot)(kind)
    chosen = {slot: list(slots.kinds_by_word(slot))[-1] for slot in slots.SLOTS if slot != "prior"}
    run = override(recipe("mlp"), **chosen, epochs=2, width=16, init="glorot", momentum=0.0, peak=1e-5)
    assert all(":" in slots.name_of(type(getattr(run, slot))) for slot in chosen)
    whole = v.fit(run, digits, out=tmp_path / "whole")
    v.fit(override(run, epochs=1), digits, out=tmp_path / "parts")
    resumed = v.fit(run, digits, out=tmp_path / "parts", resume=True)
    read = v.load_model(tmp_path / "parts")
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
        assert torch.equal(value, read.state_dict()[name]), name
    assert main(["evaluate", str(tmp_path / "parts"), "--num-samples", "10"]) == 0

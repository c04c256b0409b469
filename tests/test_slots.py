"""Parts of one's own: registered, they are what vaelab's are; not registered, they are named and refused."""

import dataclasses
import json
import math
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import nn

import vaelab as v
from vaelab import objectives, own, slots, specs
from vaelab.cli import main
from vaelab.config import from_json, override, to_json
from vaelab.errors import UsageError
from vaelab.likelihoods import Likelihood
from vaelab.posteriors import Head, NormalPosterior
from vaelab.recipes import RECIPES, part_of, recipe
from vaelab.runtime import StepNoise
from vaelab.training.trainer import Trainer
from vaelab.training.trial import require_contract

RING = Path(__file__).parent.parent / "examples" / "ring.py"


pytestmark = pytest.mark.usefixtures("nothing_registered")


@pytest.fixture
def ring():
    own.import_parts([str(RING)])
    return sys.modules["ring"]


def forget():
    """As another program, that knows nothing of the parts."""
    for added in slots._added.values():
        added.clear()
    for name in slots.recipes_added:
        del RECIPES[name]
    slots.recipes_added.clear()
    sys.modules.pop("ring", None)
    os.environ[own.PARTS] = ""


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
        own.import_parts([str(RING)])
        assert type(v.load_model("run").prior()).__name__ == "OnRing"

    def test_is_told_to_processes_that_this_one_starts_and_in_commands_that_it_prints(self, ring):
        assert os.environ[own.PARTS] == str(RING.resolve())
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
        run = dataclasses.replace(recipe("mlp"), objective=first())  # of the cell before
        assert from_json(to_json(run)).objective == second()
        with pytest.raises(UsageError, match=r"objective may not be this .*Plain: it was registered anew since"):
            override(run, objective=first())

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
            UsageError, match=r"prior may not be this OwnEncoder: @vaelab\.register\('prior'\) its class first"
        ):
            override(recipe("mlp"), prior=OwnEncoder())


def frozen(**body):
    """A frozen dataclass of these attributes, and of ``base``."""
    base = body.pop("base", specs.Spec)
    return dataclasses.dataclass(frozen=True)(type("Mine", (base,), {"__module__": __name__, **body}))


def with_field(name="size", kind=int, default=3, **more):
    """A spec that is right but for this field."""
    field = specs.option(default, "how much", **more)
    return frozen(part="mine:Module", word="mine", __annotations__={name: kind}, **{name: field})


@pytest.mark.parametrize(
    ("slot", "kind", "message"),
    [
        ("likelihud", frozen, r"a run has no slot 'likelihud'; did you mean 'likelihood'\?"),
        ("prior", type("Mine", (specs.Spec,), {"word": "mine"}), "make it a frozen dataclass"),
        ("prior", dataclasses.make_dataclass("Mine", []), "make it a frozen dataclass"),
        ("objective", type("Mine", (objectives.ELBO,), {"word": "mine"}), "make it a frozen dataclass"),
        ("prior", frozen(base=object, word="mine"), r"make it a subclass of vaelab\.specs\.Spec"),
        ("objective", frozen(word="mine"), r"make it a subclass of vaelab\.objectives\.Objective"),
        ("objective", frozen(base=objectives.Objective, word="mine"), "it has no loss"),
        ("prior", frozen(word="mine"), "name the module that it makes"),
        ("prior", frozen(part="Module", word="mine"), "name the module that it makes"),
        ("optimizer", frozen(base=object, word="mine"), "it has no build"),
        ("schedule", frozen(base=object, word="mine"), "it has no schedule, warmup_epochs"),
        ("prior", frozen(part="mine:Module"), r'give it a word of its own to be chosen by, in small letters: word = "ring"'),
        ("prior", frozen(part="mine:Module", word="Mine"), "in small letters"),
        ("prior", frozen(part="mine:Module", word="vamp"), "the word 'vamp' is that of VampPrior"),
        ("prior", frozen(part="mine:Module", word="mine", __annotations__={"size": int}, size=3), r"declare size by vaelab\.specs\.option\(default, help\)"),
        ("prior", with_field("resume"), "the name 'resume' is taken on the command line"),
        ("prior", with_field("prior_kind"), "the name 'prior_kind' is taken"),
        ("prior", with_field("epochs"), "the name 'epochs' is taken"),
        ("prior", with_field(aliases=("batch_size",)), "the name 'batch_size' is taken"),
        ("prior", with_field(aliases=("lr",)), "the name 'lr' is taken"),
        ("prior", with_field(aliases=("size",)), "the name 'size' is taken"),
        ("prior", with_field(aliases=("many", "many")), "the name 'many' is taken"),
        ("prior", with_field(flag="my-size"), "'my-size' is no name of a setting"),
        ("prior", with_field(default=2.5), r"run\.prior\.size = 2\.5: expected int"),
        ("prior", with_field(kind=list[int], default=(1,)), r"run\.prior\.size = \[1\]: expected list"),
        ("prior", with_field(kind="Nowhere"), "name 'Nowhere' is not defined"),
        ("prior", with_field(kind=float, default=-1.0), r"--size -1\.0: must be at least 0"),
    ],
)  # fmt: skip
def test_what_cannot_fill_a_slot_is_refused_in_one_line(slot, kind, message):
    with pytest.raises(UsageError, match=message) as refused:
        v.register(slot)(kind)
    assert "\n" not in str(refused.value)
    assert slots.count_of_registered() == 0
    assert ":" not in slots.name_of(specs.Spec if kind is frozen else kind)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"--parts .*parts_of_mine\.py: there is no such file"),
        ("x = 1\ny = 1 / 0\n", r"--parts .*parts_of_mine\.py, line 2: ZeroDivisionError: division by zero"),
        ("def f(:\n", r"--parts .*parts_of_mine\.py, line 1: SyntaxError: "),
        ("import sys\nsys.exit()\n", r"--parts .*parts_of_mine\.py, line 2: SystemExit: "),
        ("raise ValueError('a\\nb')", r"--parts .*parts_of_mine\.py, line 1: ValueError: a\n$"),
        ("x = 1\n", r"--parts .*parts_of_mine\.py: nothing is registered there \(@vaelab\.register\(SLOT\)\)"),
    ],
)
def test_a_file_that_cannot_be_imported_is_named_with_its_line(content, message, tmp_path, capsys):
    file = tmp_path / "parts_of_mine.py"
    if content is not None:
        file.write_text(content)
    assert main(["--parts", str(file), "recipes"]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert ("parts_of_mine" in sys.modules) == (content == "x = 1\n")


@pytest.mark.parametrize(("name", "message"), [("math", "another module is called math"), ("this", "another module is called this"), ("a.b", "a module's name has no dot")])  # fmt: skip
def test_a_file_with_a_name_that_it_cannot_have_is_refused(name, message, tmp_path):
    (tmp_path / f"{name}.py").write_text("")
    with pytest.raises(UsageError, match=rf"--parts .*{name}\.py: {message}: rename the file"):
        own.import_parts([str(tmp_path / f"{name}.py")])


OBJECTIVE = """
from dataclasses import dataclass
import vaelab as v
{imports}

@v.register("objective")
@dataclass(frozen=True)
class Plain(v.objectives.Objective):
    word = "plain"

    def loss(self, means):
        return means["distortion"]

if __name__ == "__main__":
    v.fit(v.override(v.recipes.mlp(), objective="plain", epochs=1, encoder_hidden_dims=(8,)), "digits", out="run")
"""


def test_a_script_is_the_file_that_the_command_line_is_told_of(tmp_path):
    """As whole programs: the console script, ``-m``, a module beside the file, and one of a package."""
    (tmp_path / "pack").mkdir()
    (tmp_path / "pack" / "beside.py").write_text("")
    (tmp_path / "pack" / "mine.py").write_text(OBJECTIVE.format(imports="import beside"))
    (tmp_path / "pack" / "other.py").write_text(OBJECTIVE.format(imports="").replace("plain", "plainer"))

    def run(*words):
        return subprocess.run([sys.executable, *words], cwd=tmp_path, capture_output=True, text=True)

    trained = run("pack/mine.py")
    assert trained.returncode == 0, trained.stderr
    assert '"kind": "mine:Plain"' in (tmp_path / "run" / "config.json").read_text()
    console = "import sys; from vaelab.cli import main; sys.path.remove(''); sys.exit(main())"
    for start in (["-m", "vaelab"], ["-c", console]):
        for parts in (["pack/mine.py"], ["pack.other", "--parts", "pack/mine.py"]):
            shown = run(*start, "evaluate", "run", "--json", "--num-samples", "1", "--parts", *parts)
            assert shown.returncode == 0, shown.stderr
    refused = run("-m", "vaelab", "doctor", "run", "--parts", "pack.other")
    assert (
        "mine:Plain, which is not vaelab's and was not registered here; on the command line: vaelab --parts mine.py"
        in refused.stderr
    )


def test_nothing_that_is_named_is_an_error(capsys):
    assert main(["--parts"]) == 2
    assert main(["recipes", "--parts="]) == 2
    assert main(["recipes", "--parts", "--seed", "1"]) == 2
    told = "vaelab: --parts is empty: name a file that registers parts of your own"
    assert capsys.readouterr().err.splitlines() == [told] * 3


class TestOptimizersThatAreNotTorchs:
    """Compiled steps hold Adam's own; another of the same base must not become it."""

    @pytest.mark.parametrize("groups", [1, 2])
    def test_takes_its_own_steps(self, groups, digits, uncompiled, monkeypatch):
        class Still(torch.optim.Adam):
            def step(self, closure=None):
                return None

        def build(self, parameters, learning_rate):
            parameters = list(parameters)
            if groups == 1:
                return Still(parameters, learning_rate)
            return torch.optim.Adam([{"params": parameters[:1]}, {"params": parameters[1:]}], 0.0)

        monkeypatch.setattr(specs.Adam, "build", build)
        run = override(recipe("mlp"), epochs=1, compile="on")
        before = v.fit(override(run, compile="off"), digits).state_dict()
        after = v.fit(run, digits).state_dict()
        assert all(torch.equal(after[name], value) for name, value in before.items())
        started = Trainer(run, digits, torch.device("cpu")).model.state_dict()
        if groups == 1:
            assert all(torch.equal(after[name], value) for name, value in started.items())


def test_an_objective_that_looks_at_its_numbers_takes_plain_steps(digits, uncompiled, caplog):
    @v.register("objective")
    @dataclasses.dataclass(frozen=True)
    class Positive(objectives.Objective):
        word: ClassVar[str] = "positive"
        weight: float = specs.positive(2.0, "must not be 0")

        def __post_init__(self):
            if self.weight <= 0:
                raise ValueError("weight must be above 0")

        def loss(self, means):
            return means["distortion"] * float(f"{self.weight:.2f}")

    v.fit(override(recipe("mlp"), objective="positive", epochs=1, compile="on"), digits)
    assert "training steps cannot be compiled" in caplog.text
    assert "weight must be above 0" in caplog.text


def test_every_module_is_under_version_control():
    """What git ignores is in no clone, and in no package that is built."""
    root = Path(v.__file__).parent
    found = subprocess.run(["git", "-C", root, "check-ignore", *root.rglob("*.py")], capture_output=True, text=True)
    if found.returncode == 128:
        pytest.skip("no checkout of git")
    assert found.stdout == ""


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
    own.import_parts([str(RING)])
    kinds = [OwnEncoder, OwnPosterior, OwnDecoder, OwnLikelihood, OwnOptimizer, OwnSchedule]
    for slot, kind in zip(
        ("encoder", "posterior", "decoder", "likelihood", "optimizer", "schedule"), kinds, strict=True
    ):
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


def test_the_objective_of_the_page_learns_its_own_network(digits):
    """As docs/own.md shows it: two groups that share one draw."""
    page = (RING.parent.parent / "docs" / "own.md").read_text()
    (block,) = [block for block in re.findall(r"```python\n(.*?)```", page, re.S) if "regressor" in block]
    body: dict = {"nn": nn, "common_parts": objectives.common_parts}
    exec(
        "class Shown(Objective):\n    word = 'shown'\n" + textwrap.indent(block, "    "),
        body | {"Objective": OwnObjective},
        body,
    )
    kind = v.register("objective")(dataclasses.dataclass(frozen=True)(body["Shown"]))
    trainer = Trainer(
        override(recipe("mlp"), objective=kind(), learning_rate=0.01, epochs=20), digits, torch.device("cpu")
    )
    before = trainer.validate()["validation_missed"]
    for _ in range(60):
        trainer.train_step()
    assert trainer.validate()["validation_missed"] < before / 4


# --- mistakes in them, found before training --------------------------------------------------------------------------


class Torn(OwnHead):
    """A head whose posterior can be spoiled."""

    spoil: ClassVar[dict] = {}

    def forward(self, features):
        qz = super().forward(features)
        for name, value in self.spoil.items():
            setattr(qz, name, value(qz))
        return qz


class OwnObjective(objectives.Objective):
    word: ClassVar[str] = "own-objective"

    def loss(self, means):
        return means["distortion"] + means["rate"]


def mistaken(base, **body):
    return dataclasses.dataclass(frozen=True)(
        type("Mistaken", (base,), {"__module__": __name__, "word": "mistaken", **body})
    )


def part_with(base, **body):
    """A spec whose part has these attributes."""
    name = f"Mistaken{len(globals())}"
    globals()[name] = type(name, (base,), body)
    return mistaken({OwnEncoderNet: OwnEncoder, OwnHead: OwnPosterior, Torn: OwnPosterior, OwnDecoderNet: OwnDecoder,
                     OwnPixels: OwnLikelihood}[base], part=f"{__name__}:{name}")  # fmt: skip


def posterior_with(**spoil):
    return part_with(Torn, spoil=spoil)


def torn_sample(qz):
    drawn = qz.rsample_and_log_prob

    def spoiled(shape, noise, *, stop=False):
        z, log_density = drawn(shape, noise, stop=stop)
        return z, log_density()

    return spoiled


@pytest.mark.parametrize(
    ("slot", "kind", "message"),
    [
        ("encoder", part_with(OwnEncoderNet, forward=lambda self, x: x), r"its features should have the shape \(2, 24\) for 2 images, not \(2, 1, 28, 28\)"),
        ("encoder", part_with(OwnEncoderNet, forward=lambda self, x: None), "not NoneType"),
        ("posterior", part_with(OwnHead, forward=lambda self, f: torch.distributions.Normal(f, 1.0)), "its distribution has no rsample_and_log_prob, center, penalty"),
        ("posterior", posterior_with(rsample_and_log_prob=torn_sample), "the log-density of a sample is to be a function that computes it, or None"),
        ("decoder", part_with(OwnDecoderNet, forward=lambda self, z: self[0](z)), r"what it gives should have the shape \(2, 1, 28, 28\) for 2 images, not \(2, 784\)"),
        ("likelihood", part_with(OwnPixels, support="grey"), "its support is to be one of binary, unit, bytes, real"),
        ("likelihood", part_with(OwnPixels, forward=lambda self, p: torch.distributions.Normal(p, 1.0)), r"log_prob of images should have the shape \(3, 2\) for 2 images, not \(3, 2, 1, 28, 28\)"),
        ("objective", mistaken(OwnObjective, loss=lambda self, means: 0.5), "its loss for 'model' is to be one number that depends on what is learned, not float"),
        ("objective", mistaken(OwnObjective, loss=lambda self, means: means["rate"].detach()), "not one number without a gradient"),
        ("objective", mistaken(OwnObjective, at=lambda self, epoch: None), r"at\(epoch\) is to return the objective"),
        ("objective", mistaken(OwnObjective, annealing_epochs=lambda self: 3), "annealing_epochs is to be a number: a property"),
        ("objective", mistaken(OwnObjective, parts=lambda self, *_: None), "parts is to return a dictionary"),
        ("objective", mistaken(OwnObjective, parts=lambda self, *a: {k: p.mean() for k, p in objectives.Objective.parts(self, *a).items()}), r"the part 'distortion' is to have a row for each image, not the shape \(\)"),
        ("objective", mistaken(OwnObjective, terms=("distortion", "mist")), r"the term 'mist' is none of its parts \(distortion, rate, penalty\)"),
        ("objective", mistaken(OwnObjective, shares=lambda self, loss, means: ("modal", loss)), "it trains 'modal', and its groups are model"),
    ],
)  # fmt: skip
def test_a_part_that_breaks_its_contract_is_refused_before_training(slot, kind, message, digits):
    run = dataclasses.replace(recipe("mlp"), posterior=OwnPosterior(), likelihood=OwnLikelihood())
    with pytest.raises(UsageError, match=f"--{slot} mistaken: .*{message}"):
        v.fit(dataclasses.replace(run, **{slot: kind()}), digits)


def test_the_trial_leaves_the_users_random_numbers_and_the_model_as_they_were(digits):
    run = dataclasses.replace(recipe("mlp"), encoder=OwnEncoder(), objective=mistaken(OwnObjective)())
    trainer = Trainer(run, digits, torch.device("cpu"))
    before, weights = torch.get_rng_state(), {k: t.clone() for k, t in trainer.model.state_dict().items()}
    trainer.model.train()
    require_contract(run, trainer.model, trainer.networks)
    assert torch.equal(torch.get_rng_state(), before)
    assert trainer.model.training
    assert all(torch.equal(weights[name], value) for name, value in trainer.model.state_dict().items())
    assert all(parameter.grad is None for parameter in trainer.model.parameters())


def test_where_pixels_start_is_said_by_a_likelihood_of_several_parameters(digits):
    run = dataclasses.replace(
        recipe("mlp"), likelihood=part_with(OwnPixels, params_per_channel=2, start=Likelihood.start)()
    )
    with pytest.raises(
        UsageError, match=r"--init glorot: Mistaken\d+ does not say where its parameters start \(start\)"
    ):
        v.fit(override(run, init="glorot"), digits)


class TestARecipe:
    def test_is_a_run_of_its_name(self, ring):
        run = v.recipes.on_a_ring()
        assert run == recipe("on-a-ring") == ring.on_a_ring()
        assert (run.recipe, run.prior, run.objective) == ("on-a-ring", ring.Ring(), ring.RateTarget(target=6.0))
        assert slots.sources_of(
            dataclasses.replace(run, prior=specs.StandardNormal(), objective=objectives.ELBO())
        ) == [os.path.relpath(RING)]

    def test_is_listed_trained_resumed_and_reproduced(self, tmp_path, monkeypatch, capsys):
        monkeypatch.chdir(tmp_path)
        parts, few = f"--parts={RING}", ["--data", "digits", "--epochs", "1"]
        assert main(["recipes", parts]) == 0
        assert "source ring.py; no comparable number is published" in " ".join(capsys.readouterr().out.split())
        assert main(["train", "on-a-ring", "--width", "0.2", *few, "--out", "run", parts]) == 0
        forget()
        assert main(["train", "on-a-ring", "--epochs", "2", "--out", "run", "--resume"]) == 2
        assert "one of your own is known by vaelab --parts FILE" in capsys.readouterr().err
        assert main(["train", "on-a-ring", "--epochs", "2", "--out", "run", "--resume", parts]) == 0
        assert json.loads(Path("run/config.json").read_text())["run"]["prior"]["width"] == 0.2
        assert main(["reproduce", "on-a-ring", *few, parts]) == 0
        assert "| `on-a-ring` | rate | – |" in Path("runs/reproduce/reproduce.md").read_text()

    def test_shows_what_its_source_publishes(self, capsys):
        @v.register("recipe", source="a [paper]", published={"psnr": 20, "rate": 9.5, "nll_100": 98})
        def small():
            """An MLP VAE of two latents."""
            return override(v.recipes.mlp_2d(), data="digits")

        assert main(["recipes"]) == 0
        assert "source a [paper]; published: psnr 20.00, rate 9.50, nll_100 98.00" in " ".join(
            capsys.readouterr().out.split()
        )

    def test_says_which_of_its_numbers_were_not_measured(self, tmp_path, monkeypatch, capsys):
        monkeypatch.chdir(tmp_path)

        @v.register("recipe", published={"perplexity": 3, "rate": 9.5})
        def small():
            """An MLP VAE of two latents."""
            return override(v.recipes.mlp_2d(), data="digits", epochs=1)

        assert main(["reproduce", "small"]) == 0
        told = capsys.readouterr()
        assert "small: perplexity was not measured (published 3)" in told.err
        assert "rate" in told.out
        assert "9.50" in told.out, "the published number, beside a reproduction"
        assert "perplexity" not in told.out

    def test_may_be_registered_anew_and_is_no_other_ones(self):
        def define(beta):
            @v.register("recipe")
            def heavy():
                """An MLP VAE."""
                return override(v.recipes.mlp(), beta=beta)

        define(2.0)
        define(3.0)
        assert recipe("heavy").objective.beta == 3

        def other():
            @v.register("recipe")
            def heavy():
                """Another."""
                return v.recipes.mlp()

        with pytest.raises(UsageError, match="heavy cannot be registered as recipe: another recipe is called heavy"):
            other()

    def test_of_vaelab_publishes_what_an_evaluation_measures(self):
        for entry in RECIPES.values():
            assert all(map(part_of, (*entry.published, *entry.shown)))


def mlp():
    """It has the name of one of vaelab's."""
    return recipe("mlp-2d")


def mine(needed):
    """It needs an argument."""


def bare():
    return recipe("mlp")


def broken():
    """It fails."""
    raise KeyError("no")


def none():
    """It returns nothing."""


def with_own_part():
    """Its encoder was not registered."""
    return dataclasses.replace(recipe("mlp"), encoder=OwnEncoder())


def fine():
    """It is as it should be"""
    return recipe("mlp")


@pytest.mark.parametrize(
    ("function", "about", "message"),
    [
        (mlp, {}, "another recipe is called mlp"),
        (mine, {}, "make it a function without arguments"),
        (OwnEncoder, {}, "make it a function without arguments"),
        (bare, {}, "say in its docstring what it is"),
        (broken, {}, "'no'"),
        (none, {}, "it returns NoneType, not a vaelab.Run"),
        (with_own_part, {}, "the run.encoder is of an unknown kind 'OwnEncoder'"),
        (fine, {"published": {"rate": "9.5"}}, "published rate is '9.5': give a number"),
        (fine, {"published": [("x",)]}, ""),
        (fine, {"published": {"nll": 84.0}}, "no number 'nll'; choose one of active_units, .*nll_5000"),
        (fine, {"published": {"rat": 84.0}}, r"no number 'rat'; did you mean 'rate'\?"),
    ],
)
def test_what_is_no_recipe_is_refused_in_one_line(function, about, message):
    before = dict(RECIPES)
    with pytest.raises(UsageError, match=f"{function.__name__} cannot be registered as recipe: .*{message}"):
        v.register("recipe", **about)(function)
    assert before == RECIPES
    assert slots.count_of_registered() == 0


def test_a_source_is_of_a_recipe():
    with pytest.raises(UsageError, match="source and published are of a recipe, not of a kind of prior"):
        v.register("prior", source="a paper")
    with pytest.raises(UsageError, match="cannot be registered as prior: it is no class"):
        v.register("prior")(fine)
    with pytest.raises(UsageError, match=r"write @vaelab\.register\(SLOT\)"):
        v.register(fine)

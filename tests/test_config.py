"""A run is data: it round-trips, it refuses what it does not know, and its flags are pinned."""

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest

import vaelab as v
from vaelab import slots, specs
from vaelab.config import Run, flat, from_json, override, to_json
from vaelab.errors import UsageError
from vaelab.objectives import ELBO
from vaelab.recipes import RECIPES, recipe


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_survives_json(name):
    run = recipe(name)
    assert from_json(json.loads(json.dumps(to_json(run)))) == run
    assert run.recipe == name
    printed = dict(line.split(maxsplit=1) for line in str(run).splitlines())
    assert printed["recipe"] == name
    if "beta" in flat(run):
        assert printed["beta"] == str(run.objective.beta)
    assert printed["likelihood"] == ("auto" if run.likelihood is None else type(run.likelihood).__name__)
    assert printed["batch_size"] == str(run.training.batch_size)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["training"].update(epochz=3), "unknown key 'epochz'; did you mean 'epochs'"),
        (lambda c: c["encoder"].update(kind="Resnet"), "unknown kind 'Resnet'"),
        (lambda c: c["encoder"].update(kind="Adam"), "unknown kind 'Adam'"),
        (lambda c: c["training"].update(epochs="many"), "training.epochs = 'many': expected int"),
        (lambda c: c["training"].update(epochs=-1), "--epochs -1: must be greater than 0"),
        (lambda c: c.update(surprise=1), "unknown key 'surprise'"),
        (
            lambda c: c.update(objective={"kind": "BalancedELBO", "balance": 0.0}),
            "--balance 0.0: must be greater than 0",
        ),
        (
            lambda c: c.update(objective={"kind": "BalancedELBO", "balance": 3.0}),
            "--balance 3.0: must be between 0 and 1",
        ),
        (lambda c: c.update(objective={"kind": "IWAE", "num_samples": 0}), "--num-samples 0: must be greater than 0"),
        (
            lambda c: c.update(objective={"kind": "MMD", "rate_weight": 0.0}),
            "--rate-weight 0.0: must be greater than 0",
        ),
    ],
)
def test_strict_keys(change, message):
    content = to_json(recipe("mlp"))
    change(content)
    with pytest.raises(UsageError, match=message):
        from_json(content)


def test_override_by_flat_names_aliases_and_parts():
    run = override(v.recipes.conv_beta(), beta=0.5, z_dim=8, optimizer="adam", likelihood=specs.Gaussian(0.1))
    assert run.objective.beta == 0.5
    assert run.posterior.latent_dim == 8
    assert run.optimizer == specs.Adam()
    assert run.likelihood == specs.Gaussian(0.1)
    assert v.recipes.conv_beta().objective.beta == 0.8, "the recipe itself is untouched"
    assert override(run, schedule="cyclic", cycle_epochs=3).schedule == specs.Cyclic(cycle_epochs=3.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bta": 1}, "no setting 'bta'; did you mean 'beta'"),
        ({"beta": "x"}, "beta = 'x': expected float"),
        ({"epochs": 1.5}, "epochs = 1.5: expected int"),
        ({"epochs": True}, "expected int"),
        ({"epochs": 0}, "must be greater than 0"),
        ({"dropout": 1.0}, "must be between 0 and 1"),
        ({"augment_prob": 1.1}, "must be between 0 and 1"),
        ({"max_lr": float("nan")}, "must be a finite number"),
        ({"beta": -1.0}, "must be at least 0"),
        ({"encoder_conv_channels": (8, 0)}, "must be greater than 0"),
        ({"optimizer": "adamx"}, "did you mean 'adam'"),
        ({"protocol": "gray"}, "protocol = 'gray'"),
        ({"augment_prob": 0.0, "rotate": 3.0}, "--rotate and --shift move no image while --augment-prob is 0"),
    ],
)
def test_override_refuses(changes, message):
    with pytest.raises(UsageError, match=message):
        override(recipe("conv-beta"), **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": "iwae", "elbo_share": 1.5}, "--elbo-share 1.5: must be between 0 and 1"),
        ({"prior": "two-stage", "stage_hidden_dims": (8, 0)}, "--stage-hidden-dims 0: must be greater than 0"),
        ({"optimizer": "adamw", "adam_betas": (0.9, 1.0)}, "--adam-betas 1.0: must be between 0 and 1"),
    ],
)
def test_settings_of_every_part_have_their_bounds(changes, message):
    with pytest.raises(UsageError, match=message):
        override(recipe("mlp"), **changes)


def test_settings_that_must_fit_each_other_are_changed_together():
    run = override(v.recipes.mlp(), objective="iwae", warm_samples=(1,), warm_epochs=(5,))
    assert (run.objective.warm_samples, run.objective.warm_epochs) == ((1,), (5,))
    with pytest.raises(UsageError, match="each count needs epochs"):
        override(run, warm_epochs=(5, 6))


def test_what_bf16_changes_was_measured_of_the_recipes_own_parts():
    run = v.recipes.mlp()
    assert run.bf16_gap is not None
    assert override(run, epochs=3, encoder="mlp", latent_dim=7).bf16_gap == run.bf16_gap
    others = {"posterior": "full-normal", "prior": "vamp", "objective": "iwae", "encoder": "conv", "decoder": "conv",
              "likelihood": "gaussian"}  # fmt: skip
    for slot, word in others.items():
        assert override(run, **{slot: word}).bf16_gap is None
    assert override(run, optimizer="adamw", schedule="plateau").bf16_gap == run.bf16_gap


def test_the_flags_of_conv_beta_are_pinned():
    """A new flag, or a lost one, is a decision: make it here too."""
    assert sorted(flat(recipe("conv-beta"))) == [
        "adam_betas", "adam_eps", "augment_prob", "base_lr", "batch_size", "beta", "channels", "clip_norm", "compile", "data",
        "decoder_activation", "decoder_batch_norm", "decoder_conv_channels", "decoder_hidden_dims", "device", "dropout",
        "ema_decay", "encoder_activation", "encoder_batch_norm", "encoder_conv_channels", "encoder_hidden_dims", "epochs",
        "image_size", "init", "kl_warmup_epochs", "latent_dim", "max_lr", "patience", "precision", "protocol", "range", "rotate",
        "save_every", "seed", "shift", "test_size", "threads", "validation_size", "warmup_epochs", "weight_decay",
    ]  # fmt: skip


def test_recipes_are_as_their_sources_describe_them():
    beta = recipe("conv-beta")
    assert beta.encoder.conv_channels == (32, 64, 128)
    assert beta.decoder.conv_channels == (128, 64, 32)
    assert beta.encoder.batch_norm
    assert beta.decoder.batch_norm
    assert beta.encoder.dropout > 0
    assert beta.augment.augment_prob > 0
    values = {name: leaf.value for name, leaf in flat(beta).items()}
    expected = {"epochs": 120, "beta": 0.8, "latent_dim": 32, "base_lr": 1e-4, "max_lr": 3e-4, "batch_size": 256,
                "warmup_epochs": 10, "weight_decay": 1e-5, "clip_norm": 1.0, "kl_warmup_epochs": 20}  # fmt: skip
    assert {name: values[name] for name in expected} == expected
    flat_2d = recipe("mlp-2d")
    assert (flat_2d.posterior.latent_dim, flat_2d.training.batch_size, flat_2d.training.epochs) == (2, 128, 20)
    assert flat_2d.schedule == specs.Constant(1e-3)
    assert recipe("mlp").encoder == specs.MLPEncoder((512,))
    assert recipe("conv-2d").posterior.latent_dim == 2
    warm = recipe("conv-warmup")
    assert warm.objective.kl_warmup_epochs > 0
    assert isinstance(warm.schedule, specs.Plateau)
    assert warm.training.patience


@pytest.mark.parametrize(
    "statement", ["import vaelab", "import vaelab.cli", "import vaelab.recipes; vaelab.recipes.mlp()"]
)
def test_nothing_heavy_is_imported_early(statement):
    heavy = ["torch", "matplotlib", "sklearn", "scipy"]
    code = f"import sys; {statement}; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


def test_public_names_all_resolve():
    for name in v.__all__:
        assert getattr(v, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'VEA'"):
        _ = v.VEA


def test_every_kind_has_a_word_of_its_own():
    for slot in slots.SLOTS:
        assert len(slots.kinds_by_word(slot)) == len(slots.kinds(slot)) > 1


def test_numbers_of_numpy_are_numbers():
    """As sweeps over ``np.arange`` give them; what is kept is plain, so that it can be written as JSON."""
    run = override(
        recipe("mlp"), latent_dim=np.int64(5), beta=np.float32(0.5), encoder_hidden_dims=tuple(np.array([7, 8]))
    )
    assert run == override(recipe("mlp"), latent_dim=5, beta=0.5, encoder_hidden_dims=(7, 8))
    assert from_json(json.loads(json.dumps(to_json(run)))) == run
    with pytest.raises(UsageError, match="expected int"):
        override(recipe("mlp"), latent_dim=np.float64(5.5))
    with pytest.raises(UsageError, match="expected int"):
        override(recipe("mlp"), latent_dim=np.array([5]))


def test_a_name_of_two_settings_is_refused_not_guessed():
    """As a part of one's own may have one that is another's in this run alone."""

    @dataclasses.dataclass(frozen=True)
    class Squared(ELBO):
        strength: float = specs.positive(10.0, "nats", aliases=("scale",))

    assert flat(Run(recipe="trial", objective=Squared()))["strength"].value == 10
    with pytest.raises(
        UsageError, match=r"'scale' is taken .*: it is Laplace\.scale's and Squared\.strength's; rename one"
    ):
        flat(Run(recipe="trial", objective=Squared(), likelihood=specs.Laplace()))

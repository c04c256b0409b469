"""``vaelab reproduce``: runs, measures, and puts side by side; what is there already is not done again."""

import dataclasses
import json
import statistics

import pytest

import vaelab as v
from vaelab.cli import main
from vaelab.errors import UsageError
from vaelab.recipes import RECIPES
from vaelab.studies import reproduce as work

FLAGS = ["--data", "digits", "--epochs", "1", "--num-samples", "20", "--threads", "1"]


def test_cheap_recipes_get_three_seeds_and_dear_ones_one():
    assert len(work.seeds_of(RECIPES["mlp"], None)) == 3
    assert len(work.seeds_of(RECIPES["conv-beta"], None)) == 1
    assert list(work.seeds_of(RECIPES["conv-beta"], 2)) == [0, 1]


def test_of_one_seed_no_spread_is_shown():
    row = work.Row("mlp", "rate", None, (25.0,), 0.05, "nats", "test", 3.0)
    assert row.measured == "25.00 (one seed; s.e. over images 0.05)"
    values = (25.0, 26.0, 27.5)
    many = work.Row("mlp", "rate", 29.79, values, 0.05, "nats", "test", 3.0)
    assert many.measured == f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f} (s.d. of 3 seeds)"
    assert "| 29.79 | 26.17 ± 1.26" in work.markdown([many])


@pytest.fixture(scope="module")
def reproduced(tmp_path_factory):
    out = tmp_path_factory.mktemp("reproduce") / "all"
    assert main(["reproduce", "mlp", "burda-vae", "--seeds", "2", "--out", str(out), *FLAGS]) == 0
    return out


def test_published_numbers_stand_beside_a_reproduction_and_nothing_else():
    entry, own = RECIPES["burda-vae"], v.recipes.recipe("burda-vae")
    assert work._comparable(entry, own, None, None) == entry.published != {}
    assert work._comparable(entry, own, "mnist", own.training.epochs) == entry.published
    assert work._comparable(entry, own, "digits", None) == work._comparable(entry, own, None, 2) == {}


def test_every_number_of_a_recipe_is_measured(reproduced):
    rows = json.loads((reproduced / "reproduce.json").read_text())["rows"]
    found = {(row["recipe"], row["metric"]): row for row in rows}
    # With 20 samples the bound of 5000 was not measured: the one that was is shown under its own name.
    assert found.keys() == {("mlp", m) for m in ("negative_elbo", "distortion", "rate")} | {
        ("burda-vae", "nll_20"), ("burda-vae", "active_units")}  # fmt: skip
    assert {row["published"] for row in rows} == {None}, "these are other data, and few epochs"
    for row in rows:
        assert len(row["values"]) == 2
        assert row["unit"] == "units" or row["values"][0] != row["values"][1], "two seeds"
        assert row["protocol"]
        assert row["minutes"] > 0
    assert "IWAE k=20" in found["burda-vae", "nll_20"]["protocol"]
    assert "burda-vae" in (reproduced / "reproduce.md").read_text()


def test_what_was_not_measured_has_no_row():
    """Digits have no known factors; and what one seed has besides, as it was asked for apart, others have not."""
    wanted = ("rate", "nll_5000", "total_correlation")
    one, other = ({"rate": {}, "nll_20": {}, **more} for more in ({"nll_5000": {}, "nll_ais": {}}, {}))
    assert work._measured(wanted, 20, [other, one]) == work._measured(wanted, 20, [one, other]) == ["rate", "nll_20"]
    assert work._measured(wanted, 5000, [one]) == ["rate", "nll_5000"]


def test_what_is_there_is_not_done_again(reproduced, capsys):
    weights = reproduced / "mlp-digits-s0" / "best_model.pth"
    before = weights.stat().st_mtime_ns
    assert main(["reproduce", "mlp", "--seeds", "2", "--out", str(reproduced), *FLAGS, "--json"]) == 0
    assert weights.stat().st_mtime_ns == before
    out = capsys.readouterr().out
    assert {row["recipe"] for row in json.loads(out[out.index("[\n") :])} == {"mlp"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["burda-vea"], "no recipe 'burda-vea'; did you mean 'burda-vae'?"),
        (["mlp", "--seeds", "0"], "--seeds 0: must be at least 1"),
        (["mlp", "--epoch", "3"], "no flag --epoch; did you mean '--epochs'?"),
        (["mlp", "--data", "nowhere"], "neither a path nor a data set"),
    ],
)
def test_wrong_usage_is_one_line(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["reproduce", *arguments]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not list(tmp_path.iterdir())


def test_other_settings_in_the_same_folder_are_refused(reproduced, capsys):
    flags = ["--data", "digits", "--epochs", "2", "--threads", "1", "--seeds", "1"]
    command = ["reproduce", "burda-vae", *flags, "--out", str(reproduced)]
    assert main(command) == 2
    assert "holds a table of other settings" in capsys.readouterr().err
    table, aside = reproduced / "reproduce.json", reproduced / "aside.json"
    table.rename(aside)
    try:
        assert main(command) == 2
    finally:
        aside.rename(table)
    error = capsys.readouterr().err
    assert "--epochs 2 differs from the 1" in error
    assert "ask for what it was begun with, or choose another folder with --out" in error
    assert "leave it out" not in error


def test_rows_of_other_recipes_stay_and_names_count_once(reproduced, capsys):
    flags = ["--data", "digits", "--epochs", "1", "--num-samples", "20", "--threads", "1", "--out", str(reproduced)]
    assert main(["reproduce", "mlp", "mlp", "--seeds", "2", *flags, "--json"]) == 0
    assert {row["recipe"] for row in json.loads(capsys.readouterr().out)} == {"mlp"}
    rows = json.loads((reproduced / "reproduce.json").read_text())["rows"]
    assert [row["recipe"] for row in rows] == 2 * ["burda-vae"] + 3 * ["mlp"]
    assert (reproduced / "reproduce.md").read_text().count("| `burda-vae` |") == 2


def test_bars_of_a_protocol_do_not_part_cells():
    row = work.Row("rae", "mse", None, (0.1,), 0.05, "1", "mean of p(x|z)", 3.0)
    assert "| mean of p(x\\|z) | 3.0 |" in work.markdown([row])


def test_only_rows_of_the_same_settings_stay(tmp_path):
    table, settings = tmp_path / "reproduce.json", {"data": "digits", "epochs": 1, "num_samples": None}
    row = work.Row("rae", "mse", None, (0.1, 0.2), 0.05, "1", "test", 3.0)
    assert work.rows_before(table, ["mlp"], settings) == []
    table.write_text(json.dumps({"settings": settings, "rows": [dataclasses.asdict(row)]}))
    assert work.rows_before(table, ["mlp"], settings) == [row]
    assert work.rows_before(table, ["rae"], settings) == []
    other = {**settings, "epochs": 2}
    with pytest.raises(UsageError, match="holds a table of other settings: choose another --out"):
        work.rows_before(table, ["mlp"], other)
    assert work.rows_before(table, ["rae"], other) == [], "nothing is lost"


@pytest.mark.parametrize("content", [{}, {"rows": 3}, {"rows": [{"recipe": "x", "values": [1]}]}])
def test_a_table_of_others_is_one_line(tmp_path, content, capsys):
    (tmp_path / "reproduce.json").write_text(json.dumps(content))
    assert main(["reproduce", "mlp", "--out", str(tmp_path)]) == 1
    assert "was not written by this vaelab: remove it" in capsys.readouterr().err.splitlines()[-1]
    assert len(list(tmp_path.iterdir())) == 1

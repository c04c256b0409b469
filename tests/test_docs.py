"""What the documentation says is run as written, or parsed, and its tables are the committed numbers."""

import ast
import functools
import itertools
import operator
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vaelab import __version__
from vaelab.cli import COMMANDS, main, training
from vaelab.measuring.extractors import extractors_for
from vaelab.progress import Bar

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(language: str, page: Path = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.S)


def commands(page: Path = README) -> list[list[str]]:
    lines = [line for block in blocks("sh", page) for line in block.splitlines() if line.strip()]
    return [shlex.split(line, comments=True) for line in lines]


@pytest.fixture
def cached(extractor_cache, digits, monkeypatch):
    """Other processes find feature extractors, and need not train any."""
    extractors_for(digits, Bar())
    monkeypatch.setenv("XDG_CACHE_HOME", str(extractor_cache))


@pytest.fixture
def photos(tmp_path):
    """The folder of the README's example: photographs of different sizes."""
    folder = tmp_path / "my-photos"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(40):
        colour = rng.integers(0, 256, (1, 1, 3)) * np.ones((60 + i, 90 - i, 1))
        Image.fromarray(colour.astype(np.uint8)).save(folder / f"{i}.jpg")
    return folder


def test_every_readme_command_runs(tmp_path, monkeypatch, photos):
    """As written, in their order; where one trains, ``--data digits --epochs 1`` is appended (own data keep their data)."""
    monkeypatch.chdir(tmp_path)
    ran = []
    for command in commands():
        if command[0] in ("make", "."):
            continue
        assert command[0] == "vaelab", command
        arguments = command[1:]
        if arguments[0] == "train":
            arguments += ["--epochs", "1"] if "--data" in arguments else ["--data", "digits", "--epochs", "1"]
        if arguments[0] == "explore":  # as files: a server would not end
            arguments += ["--static", str(tmp_path / "site"), "--runtime", "cdn"]
        assert main(arguments) == 0, command
        ran.append(command[1])
    assert {"recipes", "train", "evaluate", "sample", "reconstruct", "animate"} <= set(ran)
    assert (tmp_path / "vae_final_out" / "best_model.pth").exists()


def test_every_make_target_of_the_readme_exists():
    makefile = (ROOT / "Makefile").read_text()
    targets = [command[1] for command in commands() if command[0] == "make"]
    assert targets == ["demo", "test"]
    for target in [*targets, "lint", "docs", "bench"]:
        assert re.search(rf"^{target}:", makefile, re.M)


def test_the_python_snippets_run_unchanged(tmp_path):
    """One after the other: the second goes on with the names of the first."""
    snippet = "\n".join(blocks("python"))
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", snippet], capture_output=True, text=True, cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr
    assert "nats (n=180" in result.stdout


def test_make_demo_runs_with_fewer_epochs(tmp_path, cached):
    """In a copy of the tree, with this environment in place of a new one."""
    if not (Path(sys.prefix) / ".ready").exists() or shutil.which("make") is None:
        pytest.skip("the environment was not made by make: run the suite with make test")
    for name in ("src", "tools", "Makefile", "pyproject.toml", "README.md", "requirements.txt", "requirements-dev.txt"):
        source = ROOT / name
        (shutil.copytree if source.is_dir() else shutil.copy2)(source, tmp_path / name)
    (tmp_path / ".venv").symlink_to(sys.prefix)
    demo = (tmp_path / "tools" / "demo.sh").read_text()
    assert demo.count("--epochs 30") == 1
    (tmp_path / "tools" / "demo.sh").write_text(demo.replace("--epochs 30", "--epochs 6"))
    # -o: were the requirements newer than the environment, it would be made anew, with vaelab from this copy.
    result = subprocess.run(["make", "-o", ".venv/.ready", "demo"], capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    for name in ("anim_1_to_9.gif", "anim_pi_digits.gif", "samples.png", "reconstructions.png", "metrics.json"):
        assert (tmp_path / "runs" / "demo" / name).exists(), name
    assert "-ELBO" in result.stdout


def test_a_second_demo_goes_on_with_the_first(tmp_path):
    out = tmp_path / "runs" / "demo"
    out.mkdir(parents=True)
    (out / "config.json").touch()
    stub = tmp_path / "vaelab"
    stub.write_text('#!/bin/sh\necho "$@" >> asked\n')
    stub.chmod(0o755)
    subprocess.run(["sh", str(ROOT / "tools" / "demo.sh"), str(tmp_path)], cwd=tmp_path, check=True)
    asked = (tmp_path / "asked").read_text().splitlines()
    assert asked == ["train conv-warmup --out runs/demo --resume", "evaluate runs/demo --preset quick"]


def test_the_example_is_the_whole_story_in_sixty_lines(tmp_path):
    example = ROOT / "examples" / "train_vae.py"
    assert len(example.read_text().splitlines()) <= 60
    command = [sys.executable, "-W", "error", str(example), "--data", "digits", "--epochs", "1", "--out", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latent_space.png", "reconstructions.png", "samples.png"]


def test_the_notebook_runs_with_fewer_epochs(tmp_path, cached):
    """Executed from top to bottom on digits; the committed one has its outputs, animations included."""
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(ROOT / "examples" / "conv_warmup.ipynb", as_version=4)
    kinds = {kind for cell in notebook.cells for out in cell.get("outputs", []) for kind in out.get("data", {})}
    assert {"image/gif", "image/png"} <= kinds, "committed with its outputs"
    (cell,) = [cell for cell in notebook.cells if "epochs=30" in cell.source]
    cell.source = cell.source.replace("epochs=30", "epochs=6")
    NotebookClient(notebook, timeout=240, resources={"metadata": {"path": str(tmp_path)}}).execute()
    fresh = [kind for cell in notebook.cells for out in cell.get("outputs", []) for kind in out.get("data", {})]
    assert fresh.count("image/gif") == 2


def test_tables_are_the_committed_numbers():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import tables

    for page in tables.PAGES:
        text = (ROOT / page).read_text()
        assert tables.rendered(text) == text, f"{page}: run python benchmarks/tables.py render"


def test_the_page_shows_the_example_as_it_is():
    shown, *_ = blocks("python", ROOT / "docs" / "own.md")
    assert shown in (ROOT / "examples" / "ring.py").read_text()


def anchors(page: Path) -> set[str]:
    """What links can lead to within a page: its headings, as GitHub and mkdocs write them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def test_links_and_pictures_of_the_pages_exist():
    for page in PAGES:
        for link in re.findall(r'\]\(([^) ]+)\)|<(?:img|a)[^>]*? (?:src|href)="([^"]+)"', page.read_text()):
            target, _, anchor = "".join(link).partition("#")
            if not target.startswith("http"):
                file = page.parent / target if target else page
                assert file.exists(), f"{page.name} links to {target}"
                assert not anchor or anchor in anchors(file), f"{page.name} links to {target}#{anchor}"


def test_commands_of_the_other_pages_are_understood(monkeypatch, nothing_registered):
    """They are parsed, and not run."""
    for name, command in COMMANDS.items():
        monkeypatch.setitem(COMMANDS, name, functools.wraps(command)(lambda *_, **__: None))
    monkeypatch.setattr(training, "_fit", lambda *_: None)
    given = [
        command for page in PAGES[1:] for command in commands(page) if command[0] not in ("make", "pip", "tensorboard")
    ]
    for command in given:
        assert main(command[command.index("vaelab") + 1 :]) == 0, command
    assert {"doctor", "explore", "export", "refit", "train"} <= {word for command in given for word in command}


def test_python_of_the_other_pages_names_what_there_is():
    checked = 0
    for block in itertools.chain.from_iterable(blocks("python", page) for page in PAGES[1:]):
        tree, names = ast.parse(block), {}
        imports = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
        exec(compile(ast.Module(imports, []), "<imports>", "exec"), names)
        dotted = [ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
        for name in dotted:
            module, _, path = name.partition(".")
            if re.fullmatch(r"[\w.]+", name) and module in names:
                try:
                    found = operator.attrgetter(path)(names[module])
                except AttributeError:
                    found = None
                assert found is not None, f"there is no {name}"
                checked += 1
    assert checked > 0


def test_the_citation_is_of_this_version():
    assert f"\nversion: {__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_set_up_names_the_remedy(tmp_path):
    """An interpreter that is missing, too old, or without venv."""

    def fake(name, body):
        path = tmp_path / name
        path.write_text(f"#!/bin/sh\n{body}\n")
        path.chmod(0o755)
        return str(path)

    cases = [
        ("/nowhere/python", "install Python 3.11 or newer"),
        (fake("old", 'case "$*" in *version_info*) exit 1;; *) echo Python 3.8.1;; esac'), "Python 3.8.1 is too old"),
        (fake("bare", 'case "$*" in *ensurepip*) exit 1;; *) exit 0;; esac'), "lacks the venv module"),
    ]
    for python, message in cases:
        script = [str(ROOT / "tools" / "setup.sh"), python, str(tmp_path / "venv")]
        result = subprocess.run(["sh", *script], capture_output=True, text=True, cwd=ROOT, env={**os.environ})
        assert result.returncode != 0
        assert message in result.stderr

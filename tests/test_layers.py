"""A module imports only from its own layer or an earlier one, and never in a circle."""

import ast
from pathlib import Path

import vaelab

ROOT = Path(vaelab.__file__).parent

LAYERS = [
    {"errors", "schedules", "runtime", "divergences", "specs", "samplers", "processes", "labels"},
    {"distribution", "networks", "flows", "likelihoods", "priors", "posteriors"},
    {"models", "objectives"},
    {"config", "slots", "data", "progress", "training", "runs", "train"},
    {"evaluate", "diagnose", "figures", "export"},
    {
        "recipes",
        "own",
        "trackers",
        "estimator",
        "drawing",
        "measuring",
        "studies",
        "refit",
        "report",
        "explorer",
        "cli",
        "__main__",
        "__init__",
    },
]


def modules():
    return {str(path.relative_to(ROOT).with_suffix("")).replace("/", "."): path for path in ROOT.rglob("*.py")}


def imported(path: Path) -> set[str]:
    """Modules of vaelab that a file imports when it runs, inside functions too; not those for type checking alone."""
    tree = ast.parse(path.read_text())
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    found = set()
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vaelab":
            inside = node.module.partition(".")[2]
            names = {inside} if inside else {alias.name for alias in node.names}
            if inside == "data":  # from vaelab.data import load: the package itself
                names = {"data.__init__"}
            found |= names
        elif isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[2] for alias in node.names if alias.name.startswith("vaelab.")}
    return found - {"__version__"}


def layer(module: str) -> int:
    top = module.split(".")[0]
    return next(number for number, names in enumerate(LAYERS) if top in names)


def test_every_module_has_a_layer():
    assert {name.split(".")[0] for name in modules()} == set().union(*LAYERS)


def test_imports_go_down():
    for name, path in modules().items():
        for other in imported(path):
            assert layer(other) <= layer(name), f"{name} (layer {layer(name)}) imports {other} (layer {layer(other)})"


def test_imports_make_no_circle():
    graph = {name: imported(path) & modules().keys() for name, path in modules().items()}
    done: set[str] = set()

    def visit(name, trail):
        assert name not in trail, f"circle: {' -> '.join([*trail, name])}"
        if name not in done:
            for other in graph[name]:
                visit(other, [*trail, name])
            done.add(name)

    for name in graph:
        visit(name, [])


def test_mathematics_never_touches_the_disk():
    """Layers 0 to 2, evaluation and figures open no file (the processor's name in /proc excepted)."""
    for name, path in modules().items():
        if layer(name) > 2 and name.split(".")[0] not in ("evaluate", "diagnose", "figures"):
            continue
        text = path.read_text().replace('Path("/proc/cpuinfo")', "")
        for word in ("open(", "write_", "savefig(", "torch.save", "torch.load", "Path("):
            assert word not in text, f"{name} uses {word}"


def test_files_and_functions_stay_readable():
    for name, path in modules().items():
        source = path.read_text()
        assert source.count("\n") <= 450, f"{name} is too long to be one idea"
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef):
                assert (node.end_lineno or 0) - node.lineno < 70, f"{name}.{node.name} is too long"

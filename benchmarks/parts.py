"""The tables of docs/parts.md: every part and objective with formula, source, recipes and numbers, from the code."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, get_type_hints

from vaelab.config import flat, override
from vaelab.recipes import RECIPES, recipe
from vaelab.slots import kinds_by_word

RESULTS = Path(__file__).parent / "results" / "mnist"
SLOTS = ("likelihood", "prior", "posterior", "objective", "encoder", "decoder")


def parts_table(slot: str) -> str:
    """A row for each part that a slot of a run may hold."""
    rows = ["| part | what it is | source | recipes: published → measured |", "|---|---|---|---|"]
    for word, spec in kinds_by_word(slot).items():
        what, sources = described(documented(spec))
        name = "<br>".join([f"`{word}`", *settings(slot, word)])
        rows.append(f"| {name} | {what} | {'<br>'.join(sources) or '–'} | {'<br>'.join(used(slot, word)) or '–'} |")
    return "\n".join(rows)


def settings(slot: str, word: str) -> Iterator[str]:
    """A part's settings, as flags with their defaults; networks beside others of their kind, as they mostly are."""
    slots = ("encoder", "decoder") if slot in ("encoder", "decoder") else (slot,)
    run = override(recipe("mlp"), **dict.fromkeys(slots, word))
    for name, leaf in flat(run).items():
        if leaf.slot == slot:
            flag, values = "--" + name.replace("_", "-"), leaf.value
            if isinstance(values, bool):
                yield f"`{flag}` ({'on' if values else 'off'})"
            else:
                values = values if isinstance(values, tuple) else () if values is None else (values,)
                yield f"`{' '.join([flag, *map(str, values)])}`"


def documented(spec: type) -> type:
    """The class that says what a part is: the part that a spec builds; an objective says it itself."""
    if not hasattr(spec, "part"):
        return spec
    module, name = spec.part.split(":")
    return getattr(import_module(module), name)


def described(kind: type) -> tuple[str, list[str]]:
    """What the docstring of a class says first, with a formula where there is one, and its references, as Markdown."""
    paragraphs = _paragraphs(kind)
    first = paragraphs[0]
    if ":math:" not in first:  # the distribution that the part makes may say it in a formula, or the next words
        rest = [*_paragraphs(made_by(kind))[:1], *(p for p in paragraphs[1:3] if not p.startswith(("Args", "Note")))]
        first = f"{first} {next((p for p in rest if 'math:' in p), '')}".strip()
    found = re.search(r"Reference:\n((?:    .*\n?)+)", (inspect.getdoc(kind) or "") + "\n")
    sources: list[str] = []
    for line in found[1].splitlines() if found else ():
        if re.match(r"[A-Z].{2,80}\(\d{4}\)", line.strip()) or not sources:  # authors and year: a reference begins
            sources.append(line.strip())
        else:
            sources[-1] += " " + line.strip()
    return markdown(first), [linked(source) for source in sources]


def made_by(kind: type) -> type | None:
    """The class of distribution that a part's ``forward`` returns, if it says one of ours."""
    forward: Any = getattr(kind, "forward", None)
    made = get_type_hints(forward).get("return") if forward else None
    return made if isinstance(made, type) and made.__module__.startswith("vaelab") else None


def _paragraphs(kind: type | None) -> list[str]:
    return [" ".join(paragraph.split()) for paragraph in (inspect.getdoc(kind) or "").split("\n\n")]


def markdown(text: str) -> str:
    """A line of a docstring as a cell: formulas between dollars, bars that do not end the cell."""
    bars, norm, one = r"\|", r"\Vert", r"\vert "
    text = re.sub(r":math:`(.*?)`", lambda m: f"${m[1].strip().replace(bars, norm).replace('|', one)}$", text)
    return text.replace("``", "`").replace("|", r"\|")


def linked(source: str) -> str:
    """A reference with its address behind its name."""
    found = re.search(r"\s*\(?(https?://\S+?)[).,]*(\s|$)", source)
    name = (source[: found.start()] if found else source).strip().rstrip(".,")
    return f"[{markdown(name)}]({found[1]})" if found else markdown(name)


def used(slot: str, word: str) -> Iterator[str]:
    """The recipes that are made of it and, of those that have one, the published number and ours."""
    for name, entry in RECIPES.items():
        part: Any = getattr(entry.make(), slot)
        if part is None or part.word != word:
            continue
        yield f"`{name}`" + numbers(name, entry.published)


def numbers(name: str, published: dict[str, float]) -> str:
    """A recipe's first published number and what was measured under the same protocol."""
    path = RESULTS / f"{name}.json"
    if not published:
        return ""
    metric, value = next(iter(published.items()))
    if not path.exists():
        return f": {metric} {value:.2f} → not measured"
    result = json.loads(path.read_text())
    ours = result["test"][result["data"]["protocol"]]["metrics"].get(metric)
    return f": {metric} {value:.2f} → " + (f"{ours['value']:.2f} ± {ours['stderr']:.2f}" if ours else "not measured")

# Every target sets itself up: a virtual environment in .venv with the pinned requirements and this package, editable.
#
#   make demo    train a VAE on embedded digits and draw its pictures (no download beyond pip)
#   make test    the test suite
#   make lint    ruff and pyright
#   make docs    the documentation as a web site in site/
#   make bench   speed of training beside peers and limits, in one run (about 30 minutes)
#
# PYTHON=python3.12      the interpreter to build the environment from
# TORCH_INDEX=URL        where torch is taken from (default: PyTorch's CPU wheels on Linux without an NVIDIA GPU)

PYTHON ?= python3
VENV ?= .venv
TORCH_INDEX ?=
BIN = $(VENV)/bin

.PHONY: demo test lint docs bench clean

$(VENV)/.ready: requirements.txt requirements-dev.txt pyproject.toml tools/setup.sh
	@sh tools/setup.sh "$(PYTHON)" "$(VENV)" "$(TORCH_INDEX)"

demo: $(VENV)/.ready
	@sh tools/demo.sh "$(BIN)"

test: $(VENV)/.ready
	@echo "== pytest: the whole suite, warnings are errors"
	@$(BIN)/python -m pytest -q -n auto --dist worksteal --durations=5

lint: $(VENV)/.ready
	@echo "== ruff: style and common mistakes"
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .
	@echo "== pyright: types"
	@$(BIN)/pyright --pythonpath $(BIN)/python

docs: $(VENV)/.ready
	@echo "== mkdocs: docs/ into site/"
	@$(BIN)/mkdocs build --strict --quiet && echo "open site/index.html"

bench: $(VENV)/.ready
	@echo "== speed of training, ours and the peers in one run (they get environments of their own in .bench)"
	@$(BIN)/python benchmarks/training.py && $(BIN)/python benchmarks/training.py --scaling
	@$(BIN)/python benchmarks/time_to_quality.py && $(BIN)/python benchmarks/streaming.py
	@$(BIN)/python benchmarks/explorer.py
	@$(BIN)/python benchmarks/tables.py render

clean:
	rm -rf $(VENV) .bench site

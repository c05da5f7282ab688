# What CI runs, one command each; `make attack SEED=7` draws other cases than CI does.
PYTHON ?= .venv/bin/python
SEED ?= 0
DRAWN = tests/test_counting_drawn.py tests/test_exactness.py tests/test_contracts.py tests/test_planner.py tests/test_atlas.py

.PHONY: setup check test golden docs bench attack

setup:  ## an environment with everything below
	python3 -m venv .venv
	.venv/bin/pip install -q -c constraints.txt -e ".[dev,docs,peers]"

check:  ## format, lint, import contracts, types
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m ruff check .
	$(PYTHON) -c 'from importlinter.cli import lint_imports_command; lint_imports_command()'
	$(PYTHON) -m mypy

test:  ## the whole suite
	$(PYTHON) -m pytest -q -n 2

golden:  ## rewrite tests/golden from the present emitter; look at the difference before you commit it
	$(PYTHON) -m pytest -q tests/test_emitted_source.py tests/test_emitted_training.py --update-golden

docs:  ## the site, notebooks executed
	NO_MKDOCS_2_WARNING=1 $(PYTHON) -m mkdocs build --strict -q -d site

bench:  ## against the reference, an MLP and other libraries, about ten minutes
	$(PYTHON) benchmarks/blocks.py

attack:  ## drawn cases with a fresh seed
	env -u CI $(PYTHON) -m pytest -q -n 2 --hypothesis-seed=$(SEED) $(DRAWN)

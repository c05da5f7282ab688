# What CI runs, one command each; `make attack SEED=7` draws other cases than CI does.
PYTHON ?= .venv/bin/python
SEED ?= 0
DRAWN = tests/autodiff/test_chunks.py tests/counting/test_counting_drawn.py tests/costing/test_exactness.py \
	tests/emission/test_contracts.py tests/planners/test_planner.py tests/planners/test_atlas.py

.PHONY: setup check test quick golden docs bench attack coverage changelog

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

quick:  ## what takes a second or two: under two minutes on two cores
	$(PYTHON) -m pytest -q -n 2 -m "not slow"

golden:  ## rewrite tests/golden from the present emitter; look at the difference before you commit it
	$(PYTHON) -m pytest -q tests/emission tests/house/test_recorded.py --update-golden

docs:  ## the site, with the picture of the rooms drawn anew and the notebooks executed
	$(PYTHON) docs/rooms.py
	NO_MKDOCS_2_WARNING=1 $(PYTHON) -m mkdocs build --strict -q -d site

bench:  ## against the reference, an MLP and other libraries, about ten minutes
	$(PYTHON) benchmarks/blocks.py

attack:  ## drawn cases with a fresh seed
	env -u CI $(PYTHON) -m pytest -q -n 2 --hypothesis-seed=$(SEED) $(DRAWN)

coverage:  ## what the quick tests run of the package; the last figure is the whole
	$(PYTHON) -m pytest -q -n 2 -m "not slow" --cov --cov-report=term

changelog:  ## what the fragments in changelog.d/ will say
	$(PYTHON) -m towncrier build --draft --version next

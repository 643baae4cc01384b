# Two commands: `make demo` and `make test` set everything up in .venv first. `make check` lints, `make docs` builds the
# site, `make bench` measures.
# `make test` leaves out the tests marked slow; `make test SLOW=1` runs all of them, as CI does.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test browser check docs bench results drills clean

demo: $(READY)
	$(BIN)/halfstep demo --out runs/demo

test: $(READY)
	$(BIN)/python -m pytest -n auto --dist loadfile $(if $(SLOW),-m "")

# The studio's page and a report in a headless Chromium, by keyboard and mouse and under axe-core; of a system without one,
# `$(BIN)/playwright install --with-deps chromium` brings it
browser: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[browser]'
	$(BIN)/python -m pytest -m "" tests/app/test_studio.py tests/report/test_report.py

check: $(READY)
	$(BIN)/ruff check src tests benchmarks runner examples docs
	$(BIN)/ruff format --check src tests benchmarks runner examples docs
	$(BIN)/mypy

# The site, into site/: it is built without the network, and what is built asks nothing of it (docs/outside.py)
docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

bench: $(READY)
	$(BIN)/python benchmarks/train_overhead.py
	$(BIN)/python benchmarks/fashion.py

# The ledger of the papers' claims: each row's command, and the minutes that it took
results: $(READY)
	$(BIN)/python benchmarks/results.py

# Damaged files, hostile commands and commands that are killed, from fresh seeds, each for HALFSTEP_DRILLS seconds and on
# from HALFSTEP_SEED
drills: $(READY)
	HALFSTEP_DRILLS=$${HALFSTEP_DRILLS:-600} $(BIN)/python -m pytest -m "" -s tests/app/test_mutations.py -k for_a_while
	HALFSTEP_DRILLS=$${HALFSTEP_DRILLS:-600} $(BIN)/python -m pytest -m "" -s tests/app/test_kills.py -k for_a_while
	$(BIN)/python -m pytest -m "" tests/app/test_hostile.py
	HALFSTEP_DRILLS=1 $(BIN)/python -m pytest -m hypothesis

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Halfstep needs Python 3.11 or newer; use make PYTHON=...")'
	$(PYTHON) -m venv $(VENV) \
	  || { test "$$(id -u)" = 0 && apt-get install -y -qq python3-venv && $(PYTHON) -m venv $(VENV); } \
	  || { echo "python3 -m venv failed; on Debian: apt install python3-venv"; exit 2; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test,docs]'
	touch $(READY)

clean:
	rm -rf $(VENV) build dist src/*.egg-info

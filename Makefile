# make        sets up .venv, trains a small world model twice on embedded data, told its actions and
#             not, probes both, and shows what the paper claims
# make test   sets up .venv, runs ruff and the tests
# make gpu    everything worth measuring on one GPU, into runs/gpu
PYTHON ?= python3
BIN = .venv/bin

# Goes on where it was interrupted; when all is done, it prints the table again.
first: .venv/run
	$(BIN)/python claims.py --first
	@echo "Look at claims.png in runs/first, and at views.png, maps.png and path.png in runs/first/saccade-0."

test: .venv/test
	$(BIN)/python -m ruff check --quiet .
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 tests

gpu: .venv/test
	PYTHON=$(BIN)/python sh benchmarks/gpu.sh

.venv/run: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

.venv/test: requirements-test.txt .venv/run
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-test.txt
	touch $@

.PHONY: first test gpu

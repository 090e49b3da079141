# make        sets up .venv, trains a small world model on embedded data, probes it, draws figures
# make test   sets up .venv, runs ruff and the tests
# make gpu    everything worth measuring on one GPU, into runs/gpu
PYTHON ?= python3
BIN = .venv/bin
FIRST = runs/first

first: $(FIRST)/curves.png
	$(BIN)/python evaluate.py $(FIRST)/last.pt --samplings 1 --figures
	@echo "Look at $(FIRST)/views.png, maps.png, curves.png and the table above ($(FIRST)/probes.json)."

# curves.png is written when training is done; an interrupted run is resumed.
$(FIRST)/curves.png: | .venv/run
	$(BIN)/python train.py --dataset solids --mode saccade --quick --name first $(if $(wildcard $(FIRST)/last.pt),--resume)

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
.PRECIOUS: $(FIRST)/curves.png

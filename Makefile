# Two commands: `make demo` trains all three stages, `make test` runs the tests. Both make .venv first if it is missing.
# `make soak` runs the long tier of the reliability tests, for hours; SOAK="--kills=50 --seed=1" on the command line changes the counts.
PYTHON ?= python3
BIN := .venv/bin

TWO := -n 2 --dist loadfile --no-loadscope-reorder
BENCH := --rows=C1,C2,C3
SOAK := --kills=500 --terms=200 --pairs=200 --hosts=4 --stages=3 --lost=10 --faults=2000 --every=1 --errors=1 --native=120 --fuzz=20000 --races=50 --disks=8 --strikes=200

.PHONY: .venv demo chat demo-control test coverage soak bench check lock clean

# The lock names every package, so pip resolves nothing: a release of tomorrow can't change what is installed. `installed` is
# there only when all of it went well.
.venv: .venv/installed

.venv/installed: requirements.lock pyproject.toml setup.py
	rm -rf .venv
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --require-hashes --no-deps -r requirements.lock
	$(BIN)/pip install --quiet --no-deps --no-build-isolation -e .
	$(BIN)/pip check
	touch $@

demo: .venv  ## all three stages on the embedded small world, in runs/demo
	$(BIN)/jaxstages run --config=configs/demo.py --workdir=runs/demo

chat: .venv  ## a page to talk to the stages of runs/demo
	$(BIN)/jaxstages serve --workdir=runs/demo

demo-control: .venv  ## the demo's fine-tuning from scratch with the same budget, in runs/demo-control
	$(BIN)/jaxstages finetune --config=configs/demo.py:control --workdir=runs/demo-control

test: .venv check
	$(BIN)/python -m pytest $(TWO)

coverage: .venv  ## which lines no test reaches; tracing takes Python two to three times as long
	$(BIN)/python -m pytest $(TWO) --cov --cov-report=term:skip-covered

soak: .venv  ## the reliability tests, with counts for days of trust
	JAXSTAGES_TEST_FIGURES=soak.txt $(BIN)/python -m pytest tests/reliability $(TWO) $(SOAK)
	cat soak.txt

bench:  ## side by side with the peers, on an idle machine; PYTHON has the extra `bench`, BENCH may name --nanogpt=DIR
	$(PYTHON) benchmarks/run.py $(BENCH)
	$(PYTHON) benchmarks/report.py

check: .venv  ## lint and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

lock:  ## make requirements.lock again from pyproject.toml (needs uv)
	uv pip compile --universal --python-version 3.11 --extra dev --generate-hashes --no-emit-index-url \
	  --no-header --no-annotate pyproject.toml -o requirements.lock

clean:  ## remove what was built; the trained models in runs/ stay
	rm -rf .venv build *.egg-info .pytest_cache .ruff_cache .coverage*

# Two commands: `make demo` trains all three stages, `make test` runs the tests. Both make .venv first if it is missing.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo demo-control test check lock clean

.venv: requirements.lock pyproject.toml
	rm -rf .venv
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --require-hashes -r requirements.lock
	$(BIN)/pip install --quiet --no-deps --no-build-isolation -e .
	touch .venv

demo: .venv  ## all three stages on the embedded small world, in runs/demo
	$(BIN)/jaxstages run --config=configs/demo.py --workdir=runs/demo

demo-control: .venv  ## the demo's fine-tuning from scratch with the same budget, in runs/demo-control
	$(BIN)/jaxstages finetune --config=configs/demo.py:control --workdir=runs/demo-control

test: .venv check
	$(BIN)/python -m pytest -n 2 --dist loadfile --cov --cov-report=term:skip-covered

check: .venv  ## lint and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

lock:  ## make requirements.lock again from pyproject.toml (needs uv)
	uv pip compile --universal --python-version 3.11 --extra dev --generate-hashes --no-emit-index-url \
	  --no-header --no-annotate pyproject.toml -o requirements.lock

clean:
	rm -rf .venv runs build *.egg-info .pytest_cache .ruff_cache .coverage*

# The fast loop.
BIN ?= .venv/bin

.PHONY: check test test-all bench
check:
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

test:
	$(BIN)/pytest -q -n auto --dist worksteal -m 'not slow'

test-all:
	$(BIN)/pytest -q -n auto --dist worksteal

bench:
	$(BIN)/python tests/benchmarks/bench.py --profile instant-64 --only batchrun naive --pairs 5

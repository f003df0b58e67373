# `make bench` measures, `make test` tests; both set everything up on a fresh machine. A second call goes straight to work.
VENV   ?= .venv
PYTHON ?= python3
BIN    := $(VENV)/bin
NAME   ?= bench
STAMP  := $(VENV)/.installed

.PHONY: bench test lint proof proof-harness proof-models clean

bench: $(STAMP)
	$(BIN)/pytest benchmarks/ --benchmark-save=$(NAME)

test: $(STAMP)
	$(BIN)/pytest tests/

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Longer proofs: the harness measured by itself, then real sizes. Their output is committed under reports/proof/.
# LORAMETER_DOLLY names databricks-dolly-15k.jsonl.gz for the last one; without it that one is skipped.
proof: proof-harness proof-models

proof-harness proof-models: proof-%: $(STAMP)
	mkdir -p reports/proof
	$(BIN)/pytest benchmarks/selftest/test_$*.py -m selftest -q --no-header -rs > reports/proof/$*.txt; \
	status=$$?; cat reports/proof/$*.txt; exit $$status

$(STAMP): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "lorameter needs Python 3.11 or newer")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) .benchmarks .pytest_cache .mypy_cache .ruff_cache

# `make bench` measures, `make test` tests; both set everything up on a fresh machine. A second call starts at once.
VENV   ?= .venv
PYTHON ?= python3
BIN    := $(VENV)/bin
NAME   ?= bench
STAMP  := $(VENV)/.installed
# Packed libraries are for a machine where nothing is installed, not for the one that packed them.
GPU_PACKED := $(if $(wildcard $(STAMP)),,$(wildcard .gpu/site))

PROOFS := verdicts_ab harness_overhead noise_coverage own_scripts random_models memory_estimate real_models reading methods

.PHONY: bench test test-quick lint study reports proof $(PROOFS:%=proof-%) proof-long test-lower-bound gpu gpu-pack gpu-take clean

bench: $(STAMP)
	$(BIN)/pytest benchmarks/ --benchmark-save=$(NAME)

# Three processes for two cores, since many tests wait for processes that they start; each file in one process, so that
# its module fixtures are made once. In the order of the tree: the first files
# start real processes and take longest.
# LORAMETER_TRACES names a folder with recordings of GPU runs (of torch.profiler or nsys), whose sums must agree with the
# published ones; without it that test is skipped.
test: $(STAMP)
	$(BIN)/pytest tests/ -n 3 --dist loadfile --no-loadscope-reorder

# The tests that need neither torch nor a process of their own.
test-quick: $(STAMP)
	$(BIN)/pytest tests/stats tests/studies tests/records tests/verdicts tests/results -n 2 --dist loadfile

# The study of LoRA parameters that this project began with, and its claims, on a small real model: 75 minutes on two
# cores. LORAMETER_DOLLY names databricks-dolly-15k.jsonl(.gz); without it embedded records are used.
study: $(STAMP)
	$(BIN)/lorameter model fetch smollm2-135m
	$(BIN)/lorameter run llama2-lora-parameters --profile cpu --data "$(or $(LORAMETER_DOLLY),synthetic)" --max-minutes 75

# Write the committed reports again from their runs: as text, as Markdown and as a page for a browser.
reports: $(STAMP)
	for run in reports/2*/; do \
	$(BIN)/lorameter report $${run%/} --html $${run}report.html > $${run}report.txt; \
	$(BIN)/lorameter report $${run%/} --markdown > $${run}report.md; done

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/zizmor --offline --quiet .github

# Measurements of the harness itself; each prints machine and commit and ends with 1 where a bound does not hold. The
# output is committed under reports/proof/. Minutes on two idle cores: verdicts_ab 25, harness_overhead 10,
# noise_coverage 12, own_scripts 20, random_models 15, memory_estimate 3, real_models 24, reading 4, methods 20.
# memory_estimate and real_models need smollm2-135m (lorameter model fetch smollm2-135m). Skipped without their data: recorded noise
# (LORAMETER_NOISE names a folder) and Gemma 3 270M (LORAMETER_GEMMA names a GGUF file).
proof: $(PROOFS:%=proof-%)

$(PROOFS:%=proof-%): proof-%: $(STAMP)
	@$(BIN)/python benchmarks/selftest/$*.py > $(VENV)/$*.txt; \
	status=$$?; cat $(VENV)/$*.txt; mkdir -p reports/proof; cp $(VENV)/$*.txt reports/proof/; exit $$status

# The tests that take long (hours): injected faults (tests/faults/README.md), then real clusters, ranks, profiles and
# timings, which need an idle machine. Tests that need Ray, TRL or SLURM are skipped without them:
# pip install -e '.[ray,proof]', apt-get install slurm-wlm.
proof-long: $(STAMP)
	$(BIN)/pytest tests -m faults -n 3 --dist loadfile -rs --disable-warnings
	$(BIN)/pytest tests -m selftest -rs --disable-warnings

# Tests that the oldest supported libraries have broken, and those that depend most on the build of torch: Python 3.12,
# torch 2.11 built for CUDA, transformers 5.17.
LOWER := $(VENV)/lower
test-lower-bound: $(STAMP)
	$(BIN)/python -m uv venv --quiet --clear --python 3.12 $(LOWER)
	$(BIN)/python -m uv pip install --quiet --python $(LOWER) -e '.[dev]' torch==2.11.0 'transformers==5.17.*' \
	scikit-learn pandas pyarrow
	$(LOWER)/bin/pytest tests/contract tests/attach tests/kernels_check tests/models/costs tests/trial/test_trial.py \
	tests/run/workers/test_local.py tests/profile tests/machine tests/gpu -n 3 --dist loadfile --no-loadscope-reorder

# All claims about GPUs, in steps that are resumed where they were stopped; writes a report under reports/, with the
# device in its name, and docs/gpu.md. Without a GPU all steps are rehearsed. GPU_OPTIONS: --minutes, --only, --again,
# --list. With the packages of `make gpu-pack`, nothing is installed.
gpu: $(if $(GPU_PACKED),,$(STAMP))
	$(if $(GPU_PACKED),$(PYTHON),$(BIN)/python) -m benchmarks.gpu $(GPU_OPTIONS)

# Pack libraries into .gpu for a machine without a network; unpack the results of a call there for the next call.
gpu-pack: $(STAMP)
	$(BIN)/python -m benchmarks.gpu.pack $(GPU_OPTIONS)

gpu-take: $(STAMP)
	$(BIN)/python -m benchmarks.gpu.pack --take $(FILE)

$(STAMP): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "lorameter needs Python 3.11 or newer")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) .benchmarks .pytest_cache .mypy_cache .ruff_cache

# `make bench` measures, `make test` tests; both set everything up on a fresh machine. A second call goes straight to work.
VENV   ?= .venv
PYTHON ?= python3
BIN    := $(VENV)/bin
NAME   ?= bench
STAMP  := $(VENV)/.installed
# What was packed is for a machine where nothing is installed, not for the one that has packed it.
GPU_PACKED := $(if $(wildcard $(STAMP)),,$(wildcard .gpu/site))

# For the proofs whose program is pytest, which does not say on what it ran.
SAY_MACHINE := PYTHONPATH=benchmarks/selftest $(BIN)/python -c "import reading; print(reading.machine_line())"

# A proof's name, and what prints it. Its output takes its place when all of it is there: while it runs the tree is as it
# was committed, and one that was stopped has overwritten nothing.
prove = ($(2)) > $(VENV)/$(1).txt; \
	status=$$?; mkdir -p reports/proof; cp $(VENV)/$(1).txt reports/proof/; cat $(VENV)/$(1).txt; exit $$status

.PHONY: bench test lint study reports proof proof-harness proof-models proof-real proof-statistics proof-levels proof-ab proof-examples proof-attach proof-meter proof-meter-pages proof-profile proof-kernels proof-memory proof-reading proof-fuzz proof-faults proof-portable proof-history proof-lower-bound test-lower-bound proof-ranks proof-ray proof-slurm proof-gpu gpu gpu-pack gpu-take clean

bench: $(STAMP)
	$(BIN)/pytest benchmarks/ --benchmark-save=$(NAME)

# Three processes for two cores, as many tests wait for what they have started; each file in one of them, so that what a
# file shares is made once. In the order of the tree: its first files start real processes and take longest.
# LORAMETER_TRACES names a folder with recordings of GPU runs (of torch.profiler or nsys), each of which is judged as its
# own sums say; without it that test is skipped.
test: $(STAMP)
	$(BIN)/pytest tests/ -n 3 --dist loadfile --no-loadscope-reorder

# The study of LoRA parameters that this project began with, on a small real model, and what becomes of its claims: about
# an hour on two cores. LORAMETER_DOLLY names databricks-dolly-15k.jsonl(.gz); without it embedded records are used.
study: $(STAMP)
	$(BIN)/lorameter model fetch smollm2-135m
	$(BIN)/lorameter run llama2-lora-parameters --profile cpu --data "$(or $(LORAMETER_DOLLY),synthetic)" --max-minutes 88

# The committed reports anew, from the runs beside them: as text, as Markdown and as a page for a browser.
reports: $(STAMP)
	for run in reports/2*/; do \
	$(BIN)/lorameter report $${run%/} --html $${run}report.html > $${run}report.txt; \
	$(BIN)/lorameter report $${run%/} --markdown > $${run}report.md; done

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/zizmor --offline --quiet .github

# Longer proofs: the harness measured by itself, real sizes, the statistics, the levels of interleaving, the A/B. Their
# output is committed under reports/proof/. Two need data that the project does not hold and are skipped without it:
# LORAMETER_DOLLY names databricks-dolly-15k.jsonl.gz, LORAMETER_NOISE a folder with the recorded noise
# (lockstep.csv.gz, one_process.csv.gz, processes.csv.gz). proof-ab takes an hour and wants the machine to itself.
proof: proof-harness proof-models proof-real proof-statistics proof-levels proof-ab proof-examples proof-attach proof-meter proof-meter-pages proof-profile proof-kernels proof-memory proof-reading proof-fuzz proof-faults proof-portable proof-history proof-lower-bound proof-ranks proof-ray proof-slurm proof-gpu

proof-harness: BESIDE = tests/trial/test_planted.py tests/run/test_ab.py tests/profile/test_remedy.py \
	tests/profile/test_measure.py tests/profile/requests/test_measure.py tests/run/executors/test_local.py \
	tests/run/executors/test_shared_pages.py tests/run/sites/test_here.py tests/parity/test_measure.py \
	tests/test_cli.py tests/test_pytest_plugin.py tests/trial/building/test_shared.py tests/docs/test_extending.py \
	tests/run/executors/test_live_peaks.py tests/run/executors/test_sides.py tests/run/executors/test_host.py \
	tests/run/executors/test_script_trainer.py tests/trial/building/test_base_model.py tests/docs/test_own_script.py \
	tests/docs/test_own_step.py
proof-harness proof-models: proof-%: $(STAMP)
	$(call prove,$*,$(BIN)/pytest benchmarks/selftest/test_$*.py $(BESIDE) -m selftest -q --no-header -rs \
	--disable-warnings)

# Six variants of real models in the minutes that they are given, with what is promised of them (fetch smollm2-135m first;
# LORAMETER_GEMMA names a GGUF file of Gemma 3 270M, and without it that model is skipped; 25 minutes on two cores that
# have nothing else to do).
proof-real: $(STAMP)
	$(call prove,real_models,$(BIN)/python benchmarks/selftest/real_models.py)

proof-statistics: $(STAMP)
	$(call prove,coverage,$(BIN)/python benchmarks/selftest/coverage.py)
	$(call prove,claims,$(BIN)/python benchmarks/selftest/claims_null.py)
	if test -z "$(LORAMETER_NOISE)"; then echo "recorded noise: skipped, LORAMETER_NOISE is not set"; else \
	$(call prove,noise,$(BIN)/python benchmarks/selftest/noise.py "$(LORAMETER_NOISE)"); fi

# The examples as users have them, TRL's SFTTrainer on a real model among them (fetch smollm2-135m first): with a meter,
# wrapped, and two of them taking turns; and what other programs start (`trl sft`, `accelerate launch`, `torchrun`).
# A quarter of an hour. TRL comes into an environment of its own in front of the project's, which stays as it is.
EXAMPLES := tests/docs/test_examples.py tests/run/executors/test_script_launchers.py tests/attach/test_wrapped.py
PROOF ?= $(VENV)/proof
$(PROOF)/.installed: pyproject.toml $(STAMP)
	test -x $(PROOF)/bin/python || $(BIN)/python -m venv $(PROOF)
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > "$$($(PROOF)/bin/python -c \
	'import sysconfig; print(sysconfig.get_path("purelib"))')/present.pth"
	$(PROOF)/bin/python -m pip install --quiet --disable-pip-version-check -e '.[proof]'
	touch $@

SAY_TRL := PYTHONPATH=benchmarks/selftest $(PROOF)/bin/python -c "import reading; import trl; print(reading.machine_line() + '; trl ' + trl.__version__)"
proof-examples: $(PROOF)/.installed
	$(call prove,examples,$(SAY_TRL) && PATH="$(abspath $(PROOF)/bin):$(abspath $(BIN)):$$PATH" \
	$(PROOF)/bin/python -m pytest $(EXAMPLES) -m faults -v --no-header -rs -p no:cacheprovider --disable-warnings)

proof-levels proof-ab: proof-%: $(STAMP)
	$(call prove,$*,$(BIN)/python benchmarks/selftest/$*_live.py)

# Two scripts in lockstep: a script against itself and against one with 4 % more work, alone and beside load, forty times
# each (three hours on a machine to itself; what was stopped goes on where it was). Before them the studies about engines
# that need no GPU, on a small model and on a script (a quarter of an hour).
proof-attach: $(STAMP)
	$(call prove,engines,$(SAY_MACHINE) && $(BIN)/pytest benchmarks/selftest/test_engines.py tests/commands/test_claims.py tests/docs/test_engines.py -m selftest -q --no-header -rs)
	$(call prove,attach,$(BIN)/python benchmarks/selftest/attach_live.py --keep reports/proof/attach.jsonl)

# What a meter costs a step: a training with it and without, taking turns, with a step of 10 ms and with a real model
# (fetch smollm2-135m first; 45 minutes on a machine to itself).
proof-meter: $(STAMP)
	$(call prove,meter,$(BIN)/python benchmarks/selftest/meter_live.py; small=$$?; \
	$(BIN)/python benchmarks/selftest/meter_live.py --replicates 12 --rounds 60 --turn 1 --model "$${LORAMETER_CACHE:-$$HOME/.cache/lorameter}/models/smollm2-135m" && exit $$small)
	$(call prove,agreement,$(BIN)/python benchmarks/selftest/agreement.py)

# What a meter leaves in a process when it is off: instructions and pages, counted by valgrind (from the system's packages;
# five minutes, on a machine as busy as it likes).
proof-meter-pages: $(STAMP)
	$(call prove,meter_pages,$(BIN)/python benchmarks/selftest/meter_pages.py)

# A step taken apart, and the remedy of a finding measured beside it; whether profiles explain a step and its memory, and
# their rules find what was planted, in steps (fetch smollm2-135m first; about six minutes) and in requests; what each meter
# takes; whether the cost of a finding is what its remedy gains, of a step and of a copied head; and whether what is counted
# of every causal family is what its step multiplies.
proof-profile: $(STAMP)
	$(call prove,profiles,$(BIN)/python benchmarks/selftest/profiles.py)
	$(call prove,request-profiles,$(BIN)/python benchmarks/selftest/request_profiles.py)
	$(call prove,meters,$(BIN)/python benchmarks/selftest/meters_cost.py)
	$(call prove,profile,$(BIN)/lorameter profile lora-or-qlora:qlora-nf4-r16 --effort standard --try dropout)
	$(call prove,forecasts,$(BIN)/python benchmarks/selftest/forecasts.py)
	$(call prove,copied-head,$(BIN)/python benchmarks/selftest/copied_head.py)
	$(call prove,counted-families,$(BIN)/python benchmarks/selftest/counted_families.py)

# The negative controls, verified and watched; the absence of false alarms on real trials (fetch smollm2-135m first) and
# on healthy twins, of which some need the extra [proof]; every rule and comparison of the judges broken in turn (hours;
# what was stopped goes on where it was); runs drawn at random that must be after a check what they were before; models
# drawn at random of which it is known what is true (half an hour); every small family of transformers against the step
# on flash alone (a quarter); and what a check costs against an earlier revision (a quarter).
proof-kernels: $(STAMP)
	$(call prove,selftest,$(BIN)/python -m kernels_check selftest)
	$(call prove,watch_agrees,$(SAY_MACHINE) && $(BIN)/pytest tests/kernels_check/test_watch_agrees.py -m selftest -q --no-header)
	$(call prove,false_alarms,$(BIN)/python benchmarks/selftest/false_alarms.py)
	$(call prove,mutation,$(BIN)/python benchmarks/selftest/mutation.py --keep $(VENV)/mutation.jsonl)
	$(call prove,restoration,$(BIN)/python benchmarks/selftest/restoration.py --many)
	$(call prove,random_models,$(BIN)/python benchmarks/selftest/random_models.py --many 2000)
	$(call prove,oracle,$(BIN)/python benchmarks/selftest/oracle.py)
	$(call prove,verify_cost,$(BIN)/python benchmarks/selftest/verify_cost.py)

# Estimates of memory against real trials and published figures; what taking a prepared base takes beside making it (fetch
# smollm2-135m first; a few minutes).
proof-memory: $(STAMP)
	$(call prove,estimate,$(BIN)/python benchmarks/selftest/estimate.py)
	$(call prove,base-loads,$(BIN)/python benchmarks/selftest/base_loads.py)

# Time and memory of reading a run of a hundred thousand trials, of its report, and of its comparison to another (a few
# minutes, 1 GB in a temporary folder).
proof-reading: $(STAMP)
	$(call prove,reading,$(BIN)/python benchmarks/selftest/reading.py)

# A hundred thousand inputs at every door and two thousand command lines, that nobody should be able to do harm with, and
# all that ever failed (about an hour). What fails is kept under reports/proof/failed: put it into tests/corpus.
proof-fuzz: $(STAMP)
	$(call prove,fuzz,$(BIN)/python benchmarks/selftest/fuzz.py --again tests/corpus --keep reports/proof/failed)

# The long half of the fault matrix (tests/faults/README.md): each signal at each phase of each door and to each process, a
# disk that is full at each write, in a cache, under a training process and a profile, every kind of broken hub and index
# (an hour and a quarter on two cores); and five hundred trials, a third of them broken (a quarter). What needs the right to
# mount a disk is skipped without it.
proof-faults: $(STAMP)
	$(call prove,faults,$(SAY_MACHINE) && $(BIN)/pytest tests -m faults -n 3 --dist loadfile -q --no-header -rs --disable-warnings)
	$(call prove,soak,$(BIN)/python benchmarks/selftest/soak.py)

# The tests as narrower CPUs would run them, and all of them with nothing beside them and beside two busy loops, three
# times each (hours; what was stopped goes on where it was, as long as no file has changed).
proof-portable: $(STAMP)
	$(call prove,portable,$(BIN)/python benchmarks/selftest/portable.py --keep reports/proof/portable.jsonl)

# What a history finds in constructed years with the recorded noise, and what it invents (ten minutes); the index of a
# thousand runs; and a planted commit among sixteen, looked for three times (a quarter of an hour on a machine to itself).
proof-history: $(STAMP)
	if test -z "$(LORAMETER_NOISE)"; then echo "recorded noise: skipped, LORAMETER_NOISE is not set"; else \
	$(call prove,history,$(BIN)/python benchmarks/selftest/history.py "$(LORAMETER_NOISE)" --keep $(VENV)/history.jsonl); fi
	$(call prove,index,$(BIN)/python benchmarks/selftest/index_cost.py)
	$(call prove,bisect,$(BIN)/python benchmarks/selftest/bisect_live.py --keep $(VENV)/bisect)

# All tests at both ends of the supported versions: Python 3.12 with torch 2.11 built for CUDA, transformers 5.17,
# scikit-learn, pandas and pyarrow, and the newest of everything (an hour, and 6 GB for each environment in $(VENV)/bounds;
# what was stopped goes on where it was, as long as no file has changed). BOUNDS_OPTIONS: --only NAME, --slice.
proof-lower-bound: $(STAMP)
	$(call prove,bounds,$(BIN)/python benchmarks/selftest/bounds.py --keep $(VENV)/bounds.jsonl $(BOUNDS_OPTIONS))

# The tests of the lower bound that it has ever broken, in minutes.
test-lower-bound: $(STAMP)
	$(BIN)/python benchmarks/selftest/bounds.py --only lower --slice

# Everything that only a card can say, in steps that go on where they were stopped; the report is written under reports/,
# with the device in its name, and docs/gpu.md anew. Without a card all steps are rehearsed. GPU_OPTIONS: --minutes,
# --only, --again, --list. Where `make gpu-pack` has laid what a machine without a network lacks, nothing is installed.
gpu: $(if $(GPU_PACKED),,$(STAMP))
	$(if $(GPU_PACKED),$(PYTHON),$(BIN)/python) -m benchmarks.gpu $(GPU_OPTIONS)

# What travels to such a machine, in .gpu; what a call there has handed back, laid where the next one goes on.
gpu-pack: $(STAMP)
	$(BIN)/python -m benchmarks.gpu.pack $(GPU_OPTIONS)

gpu-take: $(STAMP)
	$(BIN)/python -m benchmarks.gpu.pack --take $(FILE)

# The rehearsal's output, which says what no card has confirmed yet; with a card, what it says.
proof-gpu: $(STAMP)
	$(call prove,gpu,$(BIN)/python -m benchmarks.gpu)

# Two ranks over gloo on this CPU: that each sabotage of theirs is found, and a rank that is lost told of; and that they
# train what one rank trains, by DDP and FSDP2, with LoRA and QLoRA, on a tiny model and on one of 135M with random
# weights. Half an hour on two cores.
proof-ranks: $(STAMP)
	$(call prove,rank-trials,$(SAY_MACHINE) && $(BIN)/pytest tests/trial/ranks tests/run/executors/test_ranks.py -m selftest -q --no-header -rs)
	$(call prove,ranks,for model in tiny-llama random:smollm2-135m; do \
	$(BIN)/python benchmarks/selftest/ranks_live.py --model $$model || exit $$?; done)

# Replicates on a Ray cluster of three nodes on this machine, of which one is killed, as is the driver (a quarter of an
# hour on two cores). It needs the extra [ray] and is skipped without it.
proof-ray: $(STAMP)
	$(call prove,ray,$(SAY_MACHINE) && $(BIN)/pytest tests/run/sites/test_ray.py -m selftest -q --no-header -rs)

# Replicates in jobs of SLURM: slurmctld and two slurmd on this machine, whose jobs are requeued, preempted, cancelled and
# at the end of their time, and whose driver is killed (half an hour on two cores). It needs Debian's slurm-wlm (apt-get install slurm-wlm) and root, and is
# skipped without.
proof-slurm: $(STAMP)
	$(call prove,slurm,$(SAY_MACHINE) && $(BIN)/pytest tests/run/sites/test_slurm_cluster.py -m selftest -q --no-header -rs)

$(STAMP): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "lorameter needs Python 3.11 or newer")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) .benchmarks .pytest_cache .mypy_cache .ruff_cache

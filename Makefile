# Everything here is also a plain command: `python -m experiments.train NAME key=value ...`, `pytest`, `ruff check`.
# The first use of any target makes .venv from the pins of requirements.txt. `make python=/usr/bin/python3 ...` uses an
# environment of your own instead; `make PYTHON=python3.11 ...` says which Python .venv is made with.

SHELL := bash
.DEFAULT_GOAL := start
.PHONY: start train replay list show doctor pack check-shards cache-latents evaluate sets compare report vote index decode reconstruct export generate fixed-seed vbench bench-pipeline docs bench bench-all bench-gate bench-train quantise profile tb test test-slow test-gpu lint flash-attn setup help
PORT ?= 6006
JOBS ?= $(shell n=$$(nproc 2>/dev/null || echo 2); echo $$((n < 8 ? n : 8)))
RUNS_ROOT ?= runs
# Capitals are environment variables, which make hands on by itself.
RESERVED := exp exps do python args PYTHON PORT JOBS RUNS_ROOT DATA_ROOT WEIGHTS_ROOT ASSETS_ROOT CUDA_VISIBLE_DEVICES OMP_NUM_THREADS

# Variables typed after `make` other than our own are dotted overrides. They are read by name and quoted one by one, so
# that lists, braces, blanks, quotes and $ reach Python as typed.
typed = $(strip $(foreach v,$(filter-out $(RESERVED),$(.VARIABLES)),$(if $(findstring command line,$(origin $v)),$v)))
quote = '$(subst ','\'',$1)'
overrides = $(foreach v,$(sort $(typed)),$(call quote,$v=$(value $v)))
need_exp = $(if $(exp),,$(error which experiment? make $@ exp=NAME; make list shows the names))
need_exps = $(if $(exps),,$(error which runs? make $@ exps="a b c"; runs are the folders under RUNS_ROOT))
runs = $(foreach name,$(exps),$(call quote,$(name)))

ifdef python
venv :=
else
python := .venv/bin/python
venv := setup
endif

start: $(if $(exp),train,$(if $(typed),nothing-to-train,help))

.PHONY: nothing-to-train
nothing-to-train:
	@echo "error: which experiment? make exp=NAME $(foreach v,$(typed),$v=...); make list shows the names" >&2; exit 2

train: $(venv) ## Train, or resume where it stopped: make exp=flashdecoder_demo [trainer.devices=2 optim.lr=1e-4 ...]
	$(need_exp)
	@$(python) -m experiments.train $(call quote,$(exp)) $(overrides)

replay: $(venv) ## Compute a step that the guard left out again: make replay exp=NAME [step=N rank=R]
	$(need_exp)
	@$(python) -m experiments.replay $(call quote,$(exp)) $(overrides)

list: $(venv) ## Every experiment, with the first line of its header
	@$(python) -m experiments.show --list

show: $(venv) ## What a run would be, without running it: make show exp=NAME (config, parameters, tokens, clips, memory)
	$(need_exp)
	@$(python) -m experiments.show $(call quote,$(exp)) $(overrides)

doctor: $(venv) ## Is this machine fit: make doctor [exp=NAME json=FILE steps_per_s=2.5 only=[films,loader]]; exit status 1 where not
	@$(python) -m experiments.doctor $(if $(exp),$(call quote,$(exp))) $(overrides)

pack: $(venv) ## A folder into tar shards: make pack in=FOLDER out=DIR [shard_mb=1000 kind=video]
	@$(python) -m experiments.pack $(overrides)

check-shards: $(venv) ## Are shards whole, readable, safe? make check-shards check=DIR [accept=true]
	@$(python) -m experiments.pack $(overrides)

cache-latents: $(venv) ## Encode an experiment's training clips once: make cache-latents exp=NAME out=FOLDER [views=2 dtype=float32]
	$(need_exp)
	@$(python) -m experiments.cache_latents $(call quote,$(exp)) $(overrides)

evaluate: $(venv) ## Score a trained experiment: make evaluate exp=NAME [sets=[davis] weights=start|ema|last|best]
	$(need_exp)
	@$(python) -m experiments.evaluate $(call quote,$(exp)) $(overrides)

sets: $(venv) ## Evaluation sets by name, and whether their clips are here
	@$(python) -m experiments.evaluate --sets

compare: $(venv) ## Runs side by side, tables and plots: make compare exps="a b c" [train=true sets=[davis] baseline=a out=FOLDER speed=false]
	$(need_exps)
	@$(python) -m experiments.compare $(runs) $(overrides)

report: $(venv) ## A page to look at runs with: make report exps="a b c" [sets=[davis] out=FOLDER clips=3 max_mb=100]
	$(need_exps)
	@$(python) -m experiments.report $(runs) $(overrides)

vote: $(venv) ## A blind vote in the browser: make vote exps="a b" [port=8000]; then make vote results=true db=FILE
	$(if $(results)$(db),,$(need_exps))
	@$(python) -m experiments.vote $(runs) $(overrides)

index: $(venv) ## Write results/REPRODUCTION.md: the papers' tables and figures, and what reproduces them here
	@$(python) -m experiments.reproduction

decode: $(venv) ## Saved latents to mp4 with a run's weights: make decode exp=NAME in=FOLDER out=FOLDER
	$(need_exp)
	@$(python) -m experiments.decode $(call quote,$(exp)) $(overrides)

reconstruct: $(venv) ## Videos encoded and decoded, chunk by chunk: make reconstruct exp=NAME in=VIDEOS out=FOLDER
	$(need_exp)
	@$(python) -m experiments.reconstruct $(call quote,$(exp)) $(overrides)

export: $(venv) ## A run as a folder for decoders.load: make export exp=NAME [out=FOLDER weights=best dtype=bfloat16 licence=apache-2.0 hub=user/name]
	@$(python) -m experiments.export $(if $(exp),$(call quote,$(exp))) $(overrides)

generate: $(venv) ## Latents of a diffusers pipeline, with their seeds: make generate pipeline=FOLDER prompts=FILE out=FOLDER [samples=5 num_frames=17]
	@$(python) -m experiments.generate $(overrides)

fixed-seed: $(venv) ## The same latents, several decoders: make fixed-seed in=latents/latents.csv decoders=[own,exports/mine] pipeline=FOLDER out=FOLDER
	@$(python) -m experiments.fixed_seed $(overrides)

vbench: $(venv) ## Decoded pairs through VBench's scorers: make vbench do=layout|score|table in=FOLDER [suite=i2v scorer=CLONE scorer_python=FILE]
	$(if $(do),,$(error do what? make vbench do=layout|score|table in=FOLDER ...))
	@$(python) -m experiments.vbench $(call quote,$(do)) $(overrides)

bench-pipeline: $(venv) ## Shares of text, denoising and decoding, decoders swapped: make bench-pipeline pipeline=FOLDER decoders=[own,exports/mine]
	@$(python) -m experiments.bench_pipeline $(overrides)

bench: $(venv) ## Speed and memory of decoding, beside its peers: make bench exp=NAME
	$(need_exp)
	@$(python) -m experiments.bench $(call quote,$(exp)) $(overrides)

bench-all: $(venv) ## All decoders, plain and optimised, and peers: make bench-all [profile=cpu|gpu only=['FlashDecoder-*'] sizes=[[480,832]] num_frames=[25] out=FOLDER fresh=true]
	@$(python) -m experiments.bench_all $(overrides)

bench-gate: $(venv) ## Has anything become slower? make bench-gate base=FILE [run=FILE tolerance=0.1]; ratios, not seconds; exit status 1 where so
	@$(python) -m experiments.bench_gate $(overrides)

bench-train: $(venv) ## Speed of training: steps, shares, MFU: make bench-train exp=NAME [bench.variants=[base,latents,latents+compile]]
	$(need_exp)
	@$(python) -m experiments.bench_train $(call quote,$(exp)) $(overrides)

quantise: $(venv) ## What eight bits cost in dB, on a run's weights: make quantise exp=NAME [bits8=mlp|linear|mlp,linear latents=8 out=results scales=FOLDER]
	$(need_exp)
	@$(python) -m experiments.quantise $(call quote,$(exp)) $(overrides)

profile: $(venv) ## Where a decoder's time goes, by stage and operator, beside its teacher's: make profile exp=NAME
	$(need_exp)
	@$(python) -m experiments.profile $(call quote,$(exp)) $(overrides)

docs: $(venv) ## The reference from the docstrings, docs/api.md and HTML: make docs [out=FOLDER write=false]
	@$(python) -m experiments.api_docs $(overrides)

tb: $(venv) ## TensorBoard on all runs: make tb [PORT=6006]
	@$(python) -m tensorboard.main --logdir $(call quote,$(RUNS_ROOT)) --port $(PORT)

test: $(venv) ## Fast tests, minutes on a CPU, a process per core: make test [args="-k dct" JOBS=0]
	@$(python) -m pytest -n $(JOBS) --dist loadfile $(args)

test-slow: $(venv) ## Slow tests: full-size layouts, soak, repeated kills; up to an hour
	@$(python) -m pytest -m slow $(args)

test-gpu: $(venv) ## Tests that need a CUDA device; skipped, with the reason, where there is none
	@$(python) -m pytest -m gpu $(args)

lint: $(venv) ## Style: ruff check and ruff format
	@$(python) -m ruff check .
	@$(python) -m ruff format --check .

flash-attn: $(venv) ## Optional, for experiments of your own: build flash-attn (needs nvcc); our models use torch's attention
	@command -v nvcc >/dev/null || { echo "error: flash-attn is compiled here and needs nvcc (the CUDA toolkit)" >&2; exit 1; }
	$(python) -m pip install packaging ninja psutil
	$(python) -m pip install --no-build-isolation flash-attn==2.8.3.post2

setup: ## Make or update .venv from requirements.txt (the other targets do this by themselves)
	@[ ! -e .venv/incomplete ] && cmp -s requirements.txt .venv/installed.txt && .venv/bin/python -c '' 2>/dev/null || $(MAKE) --no-print-directory .venv-install

# .venv/incomplete is there while pip works: an installation that was interrupted is thrown away, not repaired.
.PHONY: .venv-install
.venv-install:
	@if [ -e .venv/incomplete ] || ! .venv/bin/python -c '' 2>/dev/null; then rm -rf .venv; fi; \
	fits='import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))'; \
	found=; \
	for candidate in $(if $(PYTHON),$(call quote,$(PYTHON)),python3.12 python3.11 python3 python); do \
		if "$$candidate" -c "$$fits" 2>/dev/null; then found=$$candidate; break; fi; \
	done; \
	if [ ! -x .venv/bin/python ] && [ -z "$$found" ]; then \
		echo "error: $(or $(PYTHON),python3.12/python3.11/python3) is not a Python 3.11 or 3.12;" \
			"install one, or name one: make PYTHON=/path/to/python3.12 ..." >&2; exit 1; \
	fi; \
	set -e; mkdir -p .venv; touch .venv/incomplete; \
	[ -x .venv/bin/python ] || { echo "making .venv with $$("$$found" --version) (once, some minutes)"; "$$found" -m venv .venv; }; \
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt; \
	cp requirements.txt .venv/installed.txt; rm .venv/incomplete

help: ## This text
	@echo 'make exp=NAME [key=value ...]   trains, and resumes when typed again'
	@grep -hE '^[a-z-]+:.*## ' $(firstword $(MAKEFILE_LIST)) | sed -E 's/^([a-z-]+):.*## (.*)/  \1\t\2/' | expand -t 14

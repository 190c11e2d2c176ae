"""Fixtures that many tests share: the two models a machine without a network has, and a data cache of their own."""

import os
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="spl-tests-")

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from real_model import smollm2

from spl.evaluation.policies import EvaluatedPolicy
from spl.models import load_tokenizer

SHARED = Path(__file__).parents[2] / "shared"


@pytest.fixture(scope="session", autouse=True)
def own_cache() -> Iterator[None]:
    yield
    shutil.rmtree(os.environ["HF_DATASETS_CACHE"], ignore_errors=True)


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Two threads on tiny tensors wait for each other more than they work."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Any:
    return load_tokenizer("tiny")


@pytest.fixture(scope="session")
def smollm2_tokenizer() -> Any:
    return load_tokenizer(smollm2())


@pytest.fixture(scope="session")
def smollm2_policy() -> EvaluatedPolicy:
    """Loaded once, since that takes longer than what is asked of it."""
    return EvaluatedPolicy.load(smollm2(), device="cpu")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    if not (SHARED / "data").is_dir():
        pytest.skip("the real data sets do not lie beside this clone")
    return SHARED / "data"

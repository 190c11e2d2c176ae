"""The real model on real pairs, against figures that TRL 1.16 and plain transformers give."""

from pathlib import Path
from typing import Any

import pytest
import torch
from real_model import smollm2

from spl.data.collate import collate
from spl.data.encode import Report, RowEncoder
from spl.data.source import Source
from spl.data.tokenization import Encoder
from spl.logprobs.score import prepare, score
from spl.models import load_model

PAIRS = 8


def test_logps_of_real_pairs(shared_data: Path, smollm2_tokenizer: Any) -> None:
    rows = Source(str(shared_data / "hh_harmless.jsonl.gz")).rows()
    encoder = RowEncoder(Encoder(smollm2_tokenizer), bad_rows="skip")
    examples = [encoded for _, (_, encoded) in zip(range(PAIRS), encoder.examples(rows, Report()), strict=False)]
    model = load_model(smollm2())
    prepare(model, "forest")
    with torch.no_grad():
        logps = score(model, collate(examples)).logps.reshape(PAIRS, 2)
    assert logps.mean(0).tolist() == pytest.approx([-124.448, -124.667], abs=2e-3)

    # One response of the third pair by transformers alone.
    ids, start = examples[2].sequences[1], examples[2].starts[1]
    with torch.no_grad():
        log_probs = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    alone = sum(log_probs[k - 1, ids[k]].item() for k in range(start, len(ids)))
    assert logps[2, 1].item() == pytest.approx(alone, abs=1e-3)

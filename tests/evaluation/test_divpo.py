"""DivPO's pairs: the choice by enumeration, the criteria by hand, and rows that a run reads."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from spl.cli import main
from spl.data.formats import parse_row
from spl.data.source import Source
from spl.evaluation.divpo import choose_pair, diversities, divpo, word_frequencies
from spl.evaluation.rewards import RewardScorer
from spl.evaluation.sample_files import Reply
from spl.models import load_model, load_tokenizer
from spl.results import header, write
from spl.types import UserError

PROMPT = [{"role": "user", "content": "Name a fruit."}]


@pytest.mark.parametrize(
    ("rewards", "diversity", "rho", "expected"),
    [
        # Range 10: good from 7.5 up (2 and 3), bad up to 2.5 (0 and 1); of these the most and the least diverse.
        ([0.0, 2.0, 8.0, 10.0, 5.0], [3.0, 1.0, 7.0, 6.0, 99.0], 0.25, (2, 1)),
        ([0.0, 2.0, 8.0, 10.0, 5.0], [3.0, 1.0, 7.0, 6.0, 99.0], 0.1, (3, 0)),
        ([-1.0, 1.0, 0.0], [5.0, 2.0, 4.0], 0.5, (2, 0)),  # the middle one is good, and so not bad as well
        ([1.0, 1.0], [0.0, 5.0], 0.25, None),
        ([1.0], [0.0], 0.25, None),
        ([], [], 0.25, None),
    ],
)
def test_the_most_diverse_good_one_over_the_least_diverse_bad_one(
    rewards: list[float], diversity: list[float], rho: float, expected: tuple[int, int] | None
) -> None:
    assert choose_pair(rewards, diversity, rho) == expected


def test_criteria() -> None:
    replies = [
        Reply("An apple", 3, "stop", -2.0),
        Reply("A pear", 2, "stop", -3.0),
        Reply("An apple pie", 6, "stop", -9.0),
    ]
    assert diversities(replies, "probability") == [2.0, 3.0, 9.0]
    assert diversities(replies, "probability", per_token=True) == pytest.approx([2 / 3, 1.5, 1.5])
    # "an" and "apple" stand in one of the two others, "a" and "pear" in none, "pie" in none.
    assert word_frequencies([reply.text for reply in replies]) == pytest.approx([0.5, 0.0, 1 / 3])
    assert diversities(replies, "word_frequency") == pytest.approx([-0.5, 0.0, -1 / 3])
    with pytest.raises(UserError, match="needs each reply's log-probability"):
        diversities([Reply("An apple", 3, "stop", None)], "probability")


def test_an_embedding_s_criterion_is_the_mean_distance_to_the_others() -> None:
    class Encoder:
        """Vectors of unit and of other lengths."""

        def encode(self, texts: list[str], device: torch.device) -> torch.Tensor:
            return torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 3.0]])

    replies = [Reply(text, 1, "stop", None) for text in "abc"]
    half = 0.5**0.5
    expected = [1 - (0 + half) / 2, 1 - (0 + half) / 2, 1 - half]
    assert diversities(replies, "embedding", encoder=Encoder()) == pytest.approx(expected)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("reward")
    torch.manual_seed(0)
    tokenizer = load_tokenizer("tiny")
    config = load_model("tiny", torch.float32).config
    config.num_labels, config.pad_token_id = 1, tokenizer.pad_token_id or tokenizer.eos_token_id
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def sample_file(path: Path, replies: list[tuple[str, str, float | None]]) -> Path:
    records: list[dict[str, Any]] = [{"kind": "prompt", "item": "1", "messages": PROMPT}]
    records += [
        {"kind": "sample", "item": "1", "index": k, "text": text, "num_tokens": 4, "finish": finish, "logp": logp}
        for k, (text, finish, logp) in enumerate(replies)
    ]
    write(path, header("sample", {}, policy="dpo", setting="t 1", train_seed=None), records)
    return path


def test_pairs_by_the_command_line_are_rows_of_a_run(tmp_path: Path, reward_model: str) -> None:
    """Cut, empty and repeated replies take no part, however rare or good they are."""
    texts = ["Apples", "Pears", "Plums", "Figs"]
    samples = sample_file(
        tmp_path / "samples.jsonl",
        [
            *((text, "stop", -float(k)) for k, text in enumerate(texts)),
            ("Cherries and", "length", -99.0),
            (" ", "stop", -99.0),
            ("Apples", "stop", 0.0),
        ],
    )
    output = tmp_path / "pairs.jsonl"
    main(["pairs", "divpo", str(samples), "--reward_model", reward_model, "--output", str(output), "--rho", "0.5"])
    (row,) = [json.loads(line) for line in output.read_text().splitlines()]
    rewards = RewardScorer.load(reward_model).score([PROMPT], [texts])[0]
    middle = (max(rewards) + min(rewards)) / 2
    good = [text for text, reward in zip(texts, rewards, strict=True) if reward >= middle]
    bad = [text for text in texts if text not in good]
    assert row["chosen"] == good[-1] and row["rejected"] == bad[0]  # the least and the most probable
    example = parse_row(row)
    assert example.prompt == tuple(PROMPT) and example.responses == (good[-1], bad[0])
    assert row["chosen_reward"] == pytest.approx(rewards[texts.index(good[-1])], abs=1e-5)


def test_pairs_are_packed_where_their_name_says_so(tmp_path: Path, reward_model: str) -> None:
    samples = sample_file(tmp_path / "samples.jsonl", [("Apples", "stop", -1.0), ("Pears", "stop", -2.0)])
    for name in ("pairs.jsonl", "pairs.jsonl.gz"):
        divpo([str(samples)], reward_model, tmp_path / name)
    plain, packed = (
        [row for _, row in Source(str(tmp_path / name)).rows()] for name in ("pairs.jsonl", "pairs.jsonl.gz")
    )
    assert plain == packed and len(plain) == 1
    with pytest.raises(UserError, match=r"must be named \.jsonl or \.jsonl\.gz, but is pairs\.csv"):
        divpo([str(samples)], reward_model, tmp_path / "pairs.csv")


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"rho": 0.7}, "rho is a share"),
        ({"criterion": "embedding"}, "needs an encoder"),
        ({"encoder": "some"}, "have no use for one"),
        ({}, "no prompt has two different whole replies"),
    ],
)
def test_what_makes_no_pairs_is_one_sentence(
    tmp_path: Path, reward_model: str, settings: dict[str, Any], named: str
) -> None:
    samples = sample_file(tmp_path / "samples.jsonl", [("Apples", "stop", -1.0), ("Pears", "length", -2.0)])
    with pytest.raises(UserError, match=named):
        divpo([str(samples)], reward_model, tmp_path / "pairs.jsonl", **settings)
    assert not (tmp_path / "pairs.jsonl").exists()

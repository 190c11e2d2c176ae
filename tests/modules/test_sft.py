"""Supervised fine-tuning against transformers' own loss with labels, and that no way of batching changes it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_preference import Losses, trainer

from spl.callbacks.checkpoints import Checkpoints
from spl.data.base import PreferenceDataModule
from spl.data.collate import collate
from spl.data.demonstrations import encode_demonstrations, parse_demonstration
from spl.data.tokenization import Encoder
from spl.models import load_model
from spl.modules.sft import SFTModule
from spl.types import Demonstration, PreferenceBatch, UserError


def talk(number: int) -> dict[str, Any]:
    """Two turns of each side, of lengths that differ."""
    replies = ["a" * (1 + number % 7), "more " * (1 + number % 3)]
    words = ["Tea?", replies[0], "And?" * number, replies[1]]
    return {"messages": [{"role": ("user", "assistant")[k % 2], "content": w} for k, w in enumerate(words)]}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "talks.jsonl"
    file.write_text("".join(json.dumps(talk(k)) + "\n" for k in range(8)))
    return file


def configured(**options: Any) -> SFTModule:
    module = SFTModule("tiny", **{"lora_rank": 4, **options})
    module.configure_model()
    return module


def batch_of(tokenizer: Any, numbers: list[int]) -> PreferenceBatch:
    talks = [parse_demonstration(talk(k)) for k in numbers]
    found = encode_demonstrations(Encoder(tokenizer), [t for t in talks if isinstance(t, Demonstration)])
    return collate([f[0] for f in found if not isinstance(f, UserError)])


def labelled(tokenizer: Any, numbers: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Padded token ids and labels, -100 outside of what the assistant says and the end of its turns."""
    rows = []
    for number in numbers:
        ids, labels = tokenizer("<|bos|>")["input_ids"], [-100]
        for turn in talk(number)["messages"]:
            head = tokenizer(f"<|{turn['role']}|>")["input_ids"]
            said = tokenizer(turn["content"] + "<|end|>")["input_ids"]
            ids, labels = ids + head + said, labels + [-100] * len(head)
            labels += said if turn["role"] == "assistant" else [-100] * len(said)
        rows.append((torch.tensor(ids), torch.tensor(labels)))
    pad = torch.nn.utils.rnn.pad_sequence
    return (
        pad([ids for ids, _ in rows], batch_first=True, padding_value=258),
        pad([labels for _, labels in rows], batch_first=True, padding_value=-100),
    )


@pytest.mark.parametrize("scorer", ["forest", "plain"])
def test_the_loss_is_that_of_masked_labels(tiny_tokenizer: Any, scorer: str) -> None:
    """Value and gradient, on conversations of several turns padded to one length."""
    ids, labels = labelled(tiny_tokenizer, [0, 3, 5])
    plain = load_model("tiny")
    expected = plain(input_ids=ids, attention_mask=(ids != 258).long(), labels=labels).loss
    expected.backward()
    module = configured(lora_rank=0, scorer=scorer)
    loss = module.loss_of(batch_of(tiny_tokenizer, [0, 3, 5]))
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
    for (name, own), theirs in zip(module.policy.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(own.grad, theirs.grad, atol=1e-6, rtol=1e-4, msg=name)


def fit(folder: Path, path: Path, batch_size: int, accumulate: int, **options: Any) -> tuple[Any, list[float]]:
    torch.manual_seed(0)
    module, losses = SFTModule("tiny", lora_rank=4, lr=5e-3, **options), Losses()
    run = trainer(folder, 5, losses, accumulate_grad_batches=accumulate)
    run.fit(module, PreferenceDataModule(str(path), batch_size=batch_size))
    return module, losses.losses


@pytest.mark.parametrize("gem", [None, 0.7])
def test_the_mean_over_tokens_is_a_steps_whatever_its_micro_batches(
    tmp_path: Path, path: Path, gem: float | None
) -> None:
    """A mean of micro-batches' means would be another: their numbers of tokens differ."""
    whole, losses = fit(tmp_path, path, 8, 1, gem_temperature=gem)
    parts, micro = fit(tmp_path, path, 2, 4, gem_temperature=gem)
    unweighted = [sum(micro[k : k + 4]) / 4 for k in range(0, 20, 4)]
    assert losses != pytest.approx(unweighted, abs=1e-3)
    assert losses[-1] < losses[0]
    for (name, one), other in zip(whole.named_parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(other, one, atol=1e-5, rtol=1e-4, msg=name)


def test_the_mean_over_examples_is_the_responses_sum(tiny_tokenizer: Any) -> None:
    batch = batch_of(tiny_tokenizer, [0, 3])
    module = configured(weighting="response")
    logps = module.score(batch).logps
    assert module.loss_of(batch).item() == pytest.approx(-logps.view(2, 2).mean(1).mean().item(), abs=1e-5)


def test_held_out_figures_are_cross_entropies(tmp_path: Path, path: Path, tiny_tokenizer: Any) -> None:
    """Over all tokens, however they are batched, and with GEM too."""
    ids, labels = labelled(tiny_tokenizer, list(range(8)))
    expected = load_model("tiny")(input_ids=ids, attention_mask=(ids != 258).long(), labels=labels).loss.item()
    run = trainer(tmp_path, 1)
    run.limit_val_batches = 1.0
    data = PreferenceDataModule(str(path), val_path=str(path), batch_size=3)
    (found,) = run.validate(SFTModule("tiny", gem_temperature=0.7), data, verbose=False)
    assert found["val/loss"] == pytest.approx(expected, abs=1e-5)
    assert found["val/perplexity"] == pytest.approx(2.718281828**expected, rel=1e-4)
    assert 0 < found["val/token_entropy"] < 6


@pytest.mark.parametrize("gem", [None, 0.7])
def test_no_entropy_of_gem_s_law_is_shown_as_the_policy_s(tiny_tokenizer: Any, gem: float | None) -> None:
    """GEM's law at 0.7 is sharper than the policy, whose entropy the same figure is elsewhere."""
    batch, module = batch_of(tiny_tokenizer, [0, 3]), configured(gem_temperature=gem)
    figures = module.figures_of(module.evaluate(batch, "train")[0], batch, "train")
    assert ("token_entropy" in figures) == (gem is None)
    assert "token_entropy" in module.figures_of(module.evaluate(batch, "val")[0], batch, "val")


def test_an_interrupted_run_goes_on_bit_for_bit(tmp_path: Path, path: Path) -> None:
    def run(steps: int, *callbacks: Any, **options: Any) -> Any:
        torch.manual_seed(0)
        module = SFTModule("tiny", lora_rank=4, lr=5e-3, schedule="constant", warmup=0.0, gem_temperature=0.7)
        made = trainer(tmp_path, steps, *callbacks, accumulate_grad_batches=2)
        made.fit(module, PreferenceDataModule(str(path), batch_size=2), **options)
        return module

    whole = run(6)
    run(3, Checkpoints())
    resumed = run(6, ckpt_path=tmp_path / "checkpoints" / "last.ckpt")
    for (name, one), other in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other), name


@pytest.mark.parametrize("options", [{"weighting": "row"}, {"gem_temperature": 0.0}])
def test_settings_out_of_range(options: dict[str, Any]) -> None:
    name, value = next(iter(options.items()))
    with pytest.raises(UserError, match=rf"model\.{name} .*{value}"):
        SFTModule("tiny", **options)

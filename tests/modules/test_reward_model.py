"""A reward model against transformers' own classifier on padded rows, and its loss by hand."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from test_preference import Losses, trainer
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from spl.callbacks.checkpoints import Checkpoints
from spl.data.base import PreferenceDataModule
from spl.data.collate import collate
from spl.data.tokenization import Encoder
from spl.evaluation.rewards import RewardScorer
from spl.models import load_model
from spl.modules.figures import reward_figures
from spl.modules.reward import RewardModule
from spl.reward_models import as_classifier
from spl.types import Comparison, PreferenceBatch, PreferenceExample, UserError

ASK = ({"role": "user", "content": "Which season do you like best?"},)
REPLIES = ("Summer", "Spring, since it is warm", "Autumn")
COMPARISONS = (Comparison(0, 1, 0.7), Comparison(1, 2, 1.0), Comparison(0, 2, 0.5))


def configured(**options: Any) -> RewardModule:
    """With a head that tells replies apart; before training it does not."""
    module = RewardModule("tiny", **{"lora_rank": 4, **options})
    module.configure_model()
    draw = torch.Generator().manual_seed(0)
    for name, parameter in module.policy.named_parameters():
        if "lm_head" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=draw))
    return module


def batch_of(module: RewardModule, *examples: PreferenceExample) -> PreferenceBatch:
    encoder = Encoder(module.tokenizer, reads_end=True)
    return collate([encoder.encode(example)[0] for example in examples])


def by_transformers(module: RewardModule, replies: tuple[str, ...]) -> torch.Tensor:
    """Rewards [N] of padded rows by AutoModelForSequenceClassification around the same network; LoRA's B is 0."""
    head = torch.randn(1, 64, generator=torch.Generator().manual_seed(0))
    model = as_classifier(load_model("tiny"), head, 258)
    texts = [f"<|bos|><|user|>{ASK[0]['content']}<|end|><|assistant|>{reply}<|end|>" for reply in replies]
    with torch.no_grad():
        return model(**module.tokenizer(texts, padding=True, return_tensors="pt")).logits[:, 0]


@pytest.mark.parametrize("scorer", ["forest", "plain"])
@pytest.mark.parametrize("lora_rank", [4, 0])
def test_rewards_are_those_of_padded_rows(scorer: str, lora_rank: int) -> None:
    module = configured(scorer=scorer, lora_rank=lora_rank)
    batch = batch_of(module, PreferenceExample(ASK, REPLIES, COMPARISONS), PreferenceExample(ASK, REPLIES[:2], ()))
    expected = by_transformers(module, REPLIES)
    found = module.rewards(batch)
    torch.testing.assert_close(found, torch.cat([expected, expected[:2]]), atol=1e-4, rtol=1e-4)
    assert expected.unique().numel() == 3


def test_bradley_terry_on_shares_by_hand() -> None:
    module = configured(label_smoothing=0.1, centring=0.01)
    r = by_transformers(module, REPLIES).tolist()
    expected = 0.0
    for i, j, share in COMPARISONS:
        p, m = 0.9 * share + 0.1 * (1 - share), r[i] - r[j]
        expected += p * math.log1p(math.exp(-m)) + (1 - p) * math.log1p(math.exp(m)) + 0.01 * (r[i] + r[j]) ** 2
    loss = module.loss_of(batch_of(module, PreferenceExample(ASK, REPLIES, COMPARISONS)))
    assert loss.item() == pytest.approx(expected / 3, rel=1e-4)


def test_gradients_are_those_of_padded_rows() -> None:
    module = configured(lora_rank=0)
    module.loss_of(batch_of(module, PreferenceExample(ASK, REPLIES[:2], (Comparison(0, 1, 0.7),)))).backward()
    model = as_classifier(load_model("tiny"), torch.randn(1, 64, generator=torch.Generator().manual_seed(0)), 258)
    texts = [f"<|bos|><|user|>{ASK[0]['content']}<|end|><|assistant|>{reply}<|end|>" for reply in REPLIES[:2]]
    r = model(**module.tokenizer(texts, padding=True, return_tensors="pt")).logits[:, 0]
    m = r[0] - r[1]
    (-0.7 * torch.nn.functional.logsigmoid(m) - 0.3 * torch.nn.functional.logsigmoid(-m)).backward()
    own = dict(module.policy.named_parameters())
    for name, parameter in model.named_parameters():
        found = own["lm_head.weight" if name == "score.weight" else name].grad
        torch.testing.assert_close(found, parameter.grad, atol=1e-5, rtol=1e-3, msg=name)


def test_the_first_loss_is_log_2_and_the_head_trains_beside_adapters() -> None:
    module = RewardModule("tiny", lora_rank=4)
    module.configure_model()
    batch = batch_of(module, PreferenceExample(ASK, REPLIES, COMPARISONS))
    assert module.start_check(batch).expected_loss == pytest.approx(math.log(2), abs=1e-6)
    trained = {name for name, p in module.policy.named_parameters() if p.requires_grad}
    assert any("lm_head" in name for name in trained) and all("lora_" in n or "lm_head" in n for n in trained)


def fit(folder: Path, batch_size: int, accumulate: int, **options: Any) -> tuple[RewardModule, list[float]]:
    torch.manual_seed(0)
    module, losses = RewardModule("tiny", **{"lora_rank": 4, "lr": 5e-3, **options}), Losses()
    run = trainer(folder, 4, losses, accumulate_grad_batches=accumulate)
    run.fit(module, PreferenceDataModule("survey", batch_size=batch_size))
    return module, losses.losses


def test_accumulation_traces_the_whole_batch(tmp_path: Path) -> None:
    whole, losses = fit(tmp_path, 8, 1)
    parts, micro = fit(tmp_path, 2, 4)
    assert losses == pytest.approx([sum(micro[k : k + 4]) / 4 for k in range(0, 16, 4)], abs=1e-5)
    assert losses[-1] < losses[0] == pytest.approx(math.log(2), abs=1e-6)
    for (name, one), other in zip(whole.named_parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(other, one, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("options", [{}, {"lora_rank": 0}, {"dtype": "bfloat16"}], ids=str)
def test_the_export_is_anyones_reward_model(tmp_path: Path, options: dict[str, Any]) -> None:
    module, _ = fit(tmp_path, 8, 1, **options)
    gap = module.export(tmp_path / "export", "merged")
    assert gap is not None and gap < (1e-4 if not options.get("dtype") else 0.1)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "export")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "export")
    assert (model.config.num_labels, model.config.pad_token_id, tokenizer.pad_token) == (1, 258, "<|pad|>")
    texts = [f"<|bos|><|user|>{ASK[0]['content']}<|end|><|assistant|>{reply}<|end|>" for reply in REPLIES]
    with torch.no_grad():
        theirs = model(**tokenizer(texts, padding=True, return_tensors="pt")).logits[:, 0].float()
        ours = module.rewards(batch_of(module, PreferenceExample(ASK, REPLIES, COMPARISONS)))
    close = 1e-4 if not options.get("dtype") else 0.1
    torch.testing.assert_close(theirs, ours, atol=close, rtol=close)
    assert theirs.unique().numel() == 3
    (scored,) = RewardScorer.load(str(tmp_path / "export"), device="cpu").score([list(ASK)], [list(REPLIES)])
    assert scored == pytest.approx(theirs.tolist(), abs=close)


def test_an_interrupted_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    def run(steps: int, *callbacks: Any, **options: Any) -> Any:
        torch.manual_seed(0)
        module = RewardModule("tiny", lora_rank=4, lr=5e-3, schedule="constant", warmup=0.0)
        trainer(tmp_path, steps, *callbacks).fit(module, PreferenceDataModule("survey", batch_size=2), **options)
        return module

    whole = run(6)
    run(3, Checkpoints())
    resumed = run(6, ckpt_path=tmp_path / "checkpoints" / "last.ckpt")
    for (name, one), other in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other), name


def test_figures_by_hand() -> None:
    batch = batch_of(configured(), PreferenceExample(ASK, REPLIES, COMPARISONS))
    # Preferred: 0 of (0, 1), 1 of (1, 2); (0, 2) is a tie, whose first counts as chosen.
    found = reward_figures(torch.tensor([3.0, 1.0, 2.0]), torch.tensor([2.0, -1.0, 1.0]), batch)
    expected = {"margins": 2 / 3, "accuracies": 1 / 2, "chosen": 7 / 3, "rejected": 5 / 3}
    assert {name: value.item() for name, (value, _) in found.items()} == pytest.approx(
        {f"rewards/{name}": value for name, value in expected.items()}
    )
    assert [count for _, count in found.values()] == [3, 2, 3, 3]


@pytest.mark.parametrize("options", [{"label_smoothing": 0.5}, {"centring": -1.0}])
def test_settings_out_of_range(options: dict[str, Any]) -> None:
    name, value = next(iter(options.items()))
    with pytest.raises(UserError, match=rf"model\.{name} .*{value}"):
        RewardModule("tiny", **options)

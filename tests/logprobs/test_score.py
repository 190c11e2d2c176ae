"""Forest scoring against the plain definition: values, entropies and gradients, for many families of models."""

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from tiny_models import EXAMPLES, FAMILIES, KeepFloat64, build, checkpoint_activations, example, unpadded_logps
from torch import Tensor, nn

from spl.data.collate import EncodedExample, collate
from spl.logprobs.score import base_of, first_examples, gap_to_plain, plain_attention, prepare, score
from spl.types import Comparison, PreferenceBatch, ResponseLogps

BATCH = collate(EXAMPLES)
Gradients = dict[str, Tensor]


def weigh(logps: Tensor) -> Tensor:
    """A sum in which every response has its own weight, of either sign."""
    return (logps * torch.linspace(-1, 2, len(logps), dtype=logps.dtype)).sum()


def run(model: Any, batch: PreferenceBatch, scorer: str, **options: Any) -> tuple[ResponseLogps, Gradients]:
    """Scores, and the gradients of their weighted sum by parameter."""
    prepare(model, scorer)
    model.zero_grad()
    result = score(model, batch, scorer, **options)
    weigh(result.logps).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return ResponseLogps(*(x.detach() for x in result)), gradients


def assert_same(
    actual: tuple[ResponseLogps, Gradients], expected: tuple[ResponseLogps, Gradients], tolerance: float
) -> None:
    for name, a, e in zip(ResponseLogps._fields, actual[0], expected[0], strict=True):
        torch.testing.assert_close(a, e, rtol=0, atol=tolerance, msg=lambda text, n=name: f"{n}: {text}")
    assert actual[1].keys() == expected[1].keys() and actual[1]
    largest = max(g.abs().max().item() for g in expected[1].values())
    assert largest > 0.1
    for name, gradient in expected[1].items():
        torch.testing.assert_close(
            actual[1][name],
            gradient,
            rtol=0,
            atol=tolerance * max(1.0, largest),
            msg=lambda text, n=name: f"{n}: {text}",
        )


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)], ids=["f64", "f32"])
@pytest.mark.parametrize("family", FAMILIES)
def test_forest_equals_plain(family: str, dtype: torch.dtype, tolerance: float) -> None:
    model = build(family, dtype)
    with KeepFloat64():
        assert_same(run(model, BATCH, "forest", chunk=5), run(model, BATCH, "plain"), tolerance)


@pytest.mark.parametrize("family", ["llama", "llama_tied", "gemma2_window_4"])
def test_with_a_frozen_head(family: str) -> None:
    model = build(family, torch.float64)
    model.get_output_embeddings().requires_grad_(False)
    with KeepFloat64():
        assert_same(run(model, BATCH, "forest"), run(model, BATCH, "plain"), 1e-9)


def test_bfloat16_stays_near_plain() -> None:
    model = build("llama", torch.bfloat16)
    exact = build("llama", torch.float64)
    exact.load_state_dict(model.state_dict())
    with torch.no_grad():
        prepare(model, "forest")
        fast = score(model, BATCH)
        plain = score(exact, BATCH, "plain")
    assert fast.logps.dtype == fast.entropies.dtype == torch.float32
    torch.testing.assert_close(fast.per_token_logps.double(), plain.per_token_logps, rtol=0, atol=0.1)
    assert 0 < gap_to_plain(model, BATCH) < 0.1


def test_bfloat16_multiplies_in_bfloat16_and_adds_up_in_float32() -> None:
    model = build("llama", torch.bfloat16)
    found: dict[str, torch.dtype] = {}
    layer = model.model.layers[1]
    for name, module in {"product": layer.self_attn.q_proj, "sum": layer}.items():
        module.register_forward_hook(lambda _, __, output, name=name: found.update({name: output.dtype}))
    prepare(model, "forest")
    score(model, BATCH).logps.sum().backward()
    assert found == {"product": torch.bfloat16, "sum": torch.float32}
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.bfloat16}


# Few words, so that responses often begin alike, repeat, or begin one another.
TOKENS = st.integers(3, 5)
RESPONSES = st.lists(st.lists(TOKENS, min_size=1, max_size=6), min_size=2, max_size=5)
FORESTS = st.lists(
    st.builds(lambda p, rs: example(p, *rs), st.lists(TOKENS, min_size=1, max_size=5), RESPONSES),
    min_size=1,
    max_size=3,
)
MODELS = {name: build(name, torch.float64) for name in ("llama", "mistral_window_4")}


@pytest.mark.parametrize("family", MODELS)
@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(examples=FORESTS)
def test_any_forest_equals_unpadded_sequences(family: str, examples: list[EncodedExample]) -> None:
    model = MODELS[family]
    with KeepFloat64():
        result, gradients = run(model, collate(examples), "forest", chunk=4)
    prepare(model, "plain")
    model.zero_grad()
    with KeepFloat64():
        logps, entropies = unpadded_logps(model, examples)
    weigh(torch.stack([x.sum() for x in logps])).backward()

    torch.testing.assert_close(result.per_token_logps, torch.cat(logps).detach(), rtol=0, atol=1e-9)
    torch.testing.assert_close(result.logps, torch.stack([x.sum() for x in logps]).detach(), rtol=0, atol=1e-9)
    torch.testing.assert_close(result.entropies, torch.stack([x.sum() for x in entropies]), rtol=0, atol=1e-9)
    assert result.num_tokens.tolist() == [len(x) for x in logps]
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-9, atol=1e-9)


class TestPeft:
    @pytest.fixture
    def model(self) -> Any:
        """A LoRA model whose adapters do something, in training as by default."""
        torch.manual_seed(1)
        lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(build("llama", torch.float64), lora)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.3)
        return model.double()

    def test_base_of(self, model: Any) -> None:
        assert type(base_of(model)).__name__ == "LlamaForCausalLM"
        assert base_of(base_of(model)) is base_of(model)

    def test_adapters_on(self, model: Any) -> None:
        with KeepFloat64():
            forest, plain = run(model, BATCH, "forest"), run(model, BATCH, "plain")
        assert all("lora" in name for name in forest[1])
        assert_same(forest, plain, 1e-9)

    def test_adapters_off_is_the_model_they_were_put_on(self, model: Any) -> None:
        prepare(model, "forest")
        with torch.no_grad():
            with model.disable_adapter():
                off = score(model, BATCH)
            on = score(model, BATCH)
            start = score(build("llama", torch.float64), BATCH, "plain")
        torch.testing.assert_close(off.per_token_logps, start.per_token_logps, rtol=0, atol=1e-9)
        assert (on.per_token_logps - off.per_token_logps).abs().max() > 0.1

    def test_gap(self, model: Any) -> None:
        assert gap_to_plain(model, BATCH) < 1e-9

    def test_gradient_checkpointing(self, model: Any) -> None:
        expected = run(model, BATCH, "forest")
        checkpoint_activations(base_of(model))
        assert_same(run(model.train(), BATCH, "forest"), expected, 1e-12)


@pytest.mark.parametrize("scorer", ["forest", "plain"])
def test_gradient_checkpointing(scorer: str) -> None:
    model = build("mistral_window_4", torch.float64).train()
    calls = []
    model.model.layers[0].self_attn.register_forward_hook(lambda *_: calls.append(1))
    expected = run(model, BATCH, scorer)
    calls_without, calls[:] = len(calls), []
    checkpoint_activations(model)
    assert_same(run(model, BATCH, scorer), expected, 1e-12)
    assert len(calls) == 2 * calls_without, "nothing was computed again"


def test_scoring_with_an_unprepared_model_is_refused() -> None:
    with pytest.raises(RuntimeError, match="prepare"):
        score(build("llama"), BATCH)


@pytest.mark.parametrize(
    ("family", "implementation"), [("llama", "sdpa"), ("gemma2_window_4", "eager"), ("gpt_oss", "eager")]
)
def test_plain_scoring_takes_an_attention_that_the_model_has(family: str, implementation: str) -> None:
    model = build(family)
    assert plain_attention(model) == implementation
    prepare(model, "plain")
    assert model.config._attn_implementation == implementation
    assert score(model, BATCH, "plain").logps.isfinite().all()


class TestGap:
    @pytest.mark.parametrize("family", FAMILIES)
    def test_small_where_the_forest_works(self, family: str) -> None:
        model = build(family)
        before = model.config._attn_implementation
        assert gap_to_plain(model, first_examples(BATCH, 2)) < 1e-4
        assert model.config._attn_implementation == before

    def test_a_recurrent_model_is_refused(self) -> None:
        with pytest.raises(TypeError, match="linear_attention"):
            gap_to_plain(build("mamba"), BATCH)

    def test_large_for_a_recurrent_model_that_does_not_say_so(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model = build("mamba")
        monkeypatch.setattr(type(model.config), "layer_types", None)
        assert gap_to_plain(model, first_examples(BATCH, 1)) > 0.1

    def test_large_where_the_forest_is_dropped_on_the_way(self) -> None:
        model = build("llama")
        forward = model.model.forward
        model.model.forward = lambda forest=None, **kwargs: forward(**kwargs)
        assert gap_to_plain(model, first_examples(BATCH, 1)) > 0.1

    def test_large_where_the_model_does_more_to_its_logits_than_its_config_says(self) -> None:
        model = build("llama")
        forward = model.lm_head.forward
        model.lm_head.forward = lambda hidden: forward(hidden) / 3
        assert gap_to_plain(model, first_examples(BATCH, 1)) > 0.1

    def test_attention_sinks_are_refused(self) -> None:
        with pytest.raises(ValueError, match="s_aux"):
            gap_to_plain(build("gpt_oss"), BATCH)

    def test_a_kind_of_layer_that_shows_on_long_texts_only_is_refused(self) -> None:
        model = build("llama")
        model.config.layer_types = ["full_attention", "chunked_attention"]
        with pytest.raises(TypeError, match="chunked_attention"):
            gap_to_plain(model, BATCH)

    def test_infinite_where_a_number_is_missing(self) -> None:
        model = build("llama")
        nn.init.constant_(model.lm_head.weight[3:4], math.nan)
        assert gap_to_plain(model, BATCH) == math.inf

    def test_dropout_does_not_widen_it_and_every_mode_is_put_back(self) -> None:
        model = build("llama", torch.float64, attention_dropout=0.5).train()
        model.model.norm.eval()
        assert gap_to_plain(model, BATCH) < 1e-9
        assert model.training and model.model.layers[0].training and not model.model.norm.training


class TestFirstExamples:
    examples = (
        EncodedExample(((1, 4, 5), (1, 4, 6, 7)), (2, 2), (Comparison(0, 1, 0.75),), None, "a"),
        EncodedExample(((1, 4), (1, 5, 6), (1, 5)), (1, 1, 1), (), 2.0, "b"),
        EncodedExample(((1, 4, 5), (1, 4)), (2, 1), (Comparison(1, 0, 1.0), Comparison(0, 1, 0.5)), None, "c"),
    )

    @pytest.mark.parametrize("n", [1, 2, 3, 5])
    def test_is_the_batch_of_those_examples(self, n: int) -> None:
        actual, expected = first_examples(collate(list(self.examples)), n), collate(list(self.examples[:n]))
        for name, a, e in zip(PreferenceBatch._fields, actual, expected, strict=True):
            if name == "nodes":  # a run may stand in two parts where a branch is gone
                assert {t for node in a for t in range(node.start, node.end)} == set(range(expected.num_tokens))
            elif isinstance(e, Tensor):
                torch.testing.assert_close(a, e, equal_nan=True, msg=lambda text, n=name: f"{n}: {text}")
            else:
                assert a == e, name

    def test_their_scores_are_a_prefix_of_the_batch_s(self) -> None:
        model = build("llama", torch.float64)
        prepare(model, "forest")
        few, all_of_them = score(model, first_examples(BATCH, 2)), score(model, BATCH)
        assert len(few.logps) == 7
        torch.testing.assert_close(few.logps, all_of_them.logps[:7], rtol=0, atol=1e-12)


def test_every_response_at_once_costs_each_distinct_token_once() -> None:
    lengths: list[int] = []
    model = build("llama")
    prepare(model, "forest")
    model.get_input_embeddings().register_forward_hook(lambda _, ids, __: lengths.append(ids[0].numel()))
    score(model, collate([example([1, 5, 6], [7, 8, 9], [7, 8, 10, 11])]))
    assert lengths == [len([1, 5, 6, 7, 8, 10])]


def test_sharded_layers_give_the_same(tmp_path: Path) -> None:
    """Two processes under FSDP2, with LoRA and recomputed activations, against one that shards nothing."""
    found = []
    for processes in (1, 2):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        command += [str(Path(__file__).with_name("fsdp_run.py")), str(tmp_path / f"{processes}.pt")]
        done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        found.append(torch.load(tmp_path / f"{processes}.pt"))
    alone, sharded = found
    torch.testing.assert_close(sharded["logps"], alone["logps"], rtol=0, atol=1e-4)
    assert sharded["gradients"].keys() == alone["gradients"].keys()
    assert len(alone["gradients"]) == 2 * 2 * 7  # A and B of seven layers in each of two blocks
    for name, gradient in alone["gradients"].items():
        assert gradient.abs().max() > 1e-3
        torch.testing.assert_close(sharded["gradients"][name], gradient, rtol=1e-4, atol=1e-4)

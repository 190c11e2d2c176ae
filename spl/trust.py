"""What comes with a model and is not simply data: code of its own, and files that it names."""

import json
from pathlib import Path

from torch import nn
from transformers import PretrainedConfig
from transformers.models.auto.tokenization_auto import get_tokenizer_config
from transformers.utils.hub import cached_file

from spl.types import UserError


def check_trust(trust_remote_code: object, model: str) -> None:
    """Trust in a model's code is trust in one model, by its name.

    Raises:
        UserError: `trust_remote_code` is given, and is not the name of the model, or of an adapter's base.
    """
    if trust_remote_code is None:
        return
    if isinstance(trust_remote_code, bool) or str(trust_remote_code).lower() in ("true", "false"):
        raise UserError(
            f"model.trust_remote_code is {trust_remote_code}, but takes the name of the model whose code you have read "
            f"and trust, such as {model!r}; null trusts none."
        )
    adapter = (Path(model) / "adapter_config.json").is_file()
    if trust_remote_code not in ((model, base_of_adapter(model)) if adapter else (model,)):
        raise UserError(
            f"model.trust_remote_code is {trust_remote_code!r}, but the model is {model!r}: give that name, or null."
        )


def runs_own_code(model: nn.Module) -> bool:
    """Whether the model is of a class that came with it."""
    return any(type(module).__module__.startswith("transformers_modules") for module in model.modules())


def base_of_adapter(folder: str) -> str:
    try:
        return str(json.loads((Path(folder) / "adapter_config.json").read_text())["base_model_name_or_path"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{folder}/adapter_config.json has no base_model_name_or_path, as peft writes it.") from error


def check_shards(name: str, path: str, revision: str | None) -> None:
    """An index of safetensors may name any file, and transformers would unpickle it.

    Raises:
        UserError: it names one of another kind.
    """
    config, _ = PretrainedConfig.get_config_dict(path, revision=revision)
    for index in {"model.safetensors.index.json", str(config.get("transformers_weights"))}:
        try:
            file = cached_file(path, index, revision=revision) if index.endswith(".index.json") else None
        except OSError:  # there is none
            file = None
        shards: list[str] = list(json.loads(Path(file).read_text())["weight_map"].values()) if file else []
        if odd := sorted({shard for shard in shards if not shard.endswith(".safetensors")}):
            raise UserError(f"cannot load {name!r}: its {index} names {odd[0]}, which is no safetensors file.")


def owners_of_code(path: str, revision: str | None) -> set[str]:
    """Models on the Hub that a model's settings name for its code; a plain class name is its own."""
    config, _ = PretrainedConfig.get_config_dict(path, revision=revision)
    maps = (config.get("auto_map"), get_tokenizer_config(path, revision=revision).get("auto_map"))
    values = [value for given in maps for value in (given.values() if isinstance(given, dict) else given or ())]
    classes = [name for value in values for name in (value if isinstance(value, list | tuple) else [value])]
    return {name.split("--")[0] for name in classes if name and "--" in name}

"""A model as it would be trained, without its weights: on the meta device sizes take no memory."""

from collections.abc import Mapping
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from spl.models import Dtype, load_config, load_policy
from spl.modules.flops import matrix_sizes
from spl.modules.shape import shape_of
from spl.planning.architectures import ARCHITECTURES
from spl.planning.step import Model
from spl.types import UserError


def config_of(settings: Mapping[str, Any]) -> Any:
    """What a run's model is built from.

    Args:
        settings: of the module; `model` may also be a size that the planner knows by name.

    Raises:
        UserError: there is no such model at hand.
    """
    name = settings["model"]
    if name in ARCHITECTURES:
        return ARCHITECTURES[name].config()
    try:
        return load_config(name, settings["revision"], settings["trust_remote_code"])
    except UserError as error:
        known = ", ".join(ARCHITECTURES)
        raise UserError(f"{str(error).rstrip('.')}; sizes known without files: {known}.") from error


def model_of(config: Any, settings: Mapping[str, Any], lora_rank: int, dtype: Dtype) -> Model:
    """A plan's view of a model with adapters of a rank, or trained whole where it is 0.

    Raises:
        UserError: the adapters do not fit the model.
    """
    with torch.device("meta"):
        bare = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            config, dtype=getattr(torch, dtype), trust_remote_code=settings["trust_remote_code"] is not None
        )
        policy = load_policy(
            settings["model"],
            model=bare,
            lora_rank=lora_rank,
            lora_targets=settings["lora_targets"],
        )
    return Model(shape_of(policy), matrix_sizes(policy))

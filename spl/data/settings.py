"""Settings of the data module that cannot be, as far as that can be told without the data."""

import math
from collections.abc import Mapping
from typing import Any

from spl.data.files import is_local
from spl.data.shards import Retries
from spl.data.source import SURVEY
from spl.types import UserError


def retries_of(settings: Mapping[str, Any]) -> Retries:
    return Retries(settings["retries"], settings["retry_wait"])


def check_settings(hp: Mapping[str, Any]) -> None:
    """Refuse settings that cannot be, as far as they can be told without the data."""
    for name in ("batch_size", "max_tokens", "num_choice_questions", "buffer_size", "lanes"):
        if hp[name] is not None and hp[name] < 1:
            raise UserError(f"data.{name} must be 1 or more, but is {hp[name]}.")
    for name, most in (("max_bad_share", 1), ("retries", 100), ("retry_wait", 3600)):
        if not 0 <= hp[name] <= most:
            raise UserError(f"data.{name} must be from 0 to {most}, but is {hp[name]}.")
    _check_stream(hp)
    size, path = hp["val_size"], hp["path"]
    if size < 0 or (size > 1 and size != int(size)):
        raise UserError(f"data.val_size must be a share below 1 or a whole number of examples, but is {size}.")
    if hp["val_split"] and not hp["val_path"] and (path == SURVEY or is_local(path)):
        raise UserError("data.val_split names a split of a Hub data set; of files, set data.val_path or data.val_size.")
    if size and (hp["val_path"] or hp["val_split"]):
        raise UserError(
            "data.val_size sets a part apart where no held-out data are named: drop it, or val_path/val_split."
        )


def _check_stream(hp: Mapping[str, Any]) -> None:
    """What only a stream can do, or cannot."""
    mixture = hp["mixture"]
    if mixture is not None and not hp["streaming"]:
        raise UserError("data.mixture mixes streams without end: set data.streaming to true.")
    if mixture is not None and hp["path"] != SURVEY:
        raise UserError("data.mixture and data.path both name what is trained on: leave one out.")
    if mixture is not None and not (mixture and all(0 < weight < math.inf for weight in mixture.values())):
        raise UserError(f"data.mixture must give each source a weight above 0, but is {mixture}.")
    if not hp["streaming"]:
        return
    if hp["max_tokens"] or hp["group_by_length"]:
        raise UserError(
            "a stream does not tell its lengths ahead: with data.streaming leave out data.max_tokens and "
            "data.group_by_length, and lower data.batch_size (raising trainer.accumulate_grad_batches) instead."
        )

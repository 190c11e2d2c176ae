"""Log-probabilities of responses under one frozen model, kept on disk for every run that asks for them again.

A number's key is what it depends on: the weights, their dtype, and the token ids of prompt and response. Nothing of a
run is in it, so a sweep over alpha, beta or the learning rate scores its reference once.
"""

import math
import os
import uuid
from collections.abc import Iterable, Sequence
from hashlib import blake2b
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from spl.types import UserError

_KEY = 16  # bytes of a key, as of PreferenceBatch.response_keys


class LogpCache:
    """A folder of files, one for each process that added to it; a number that stands in one is never changed.

    Two runs at once may keep a number twice, rounded differently. Then the owner's own counts, or else the one in the
    older file, so that a run that goes on sees what it saw.

    Args:
        folder: of all models.
        weights: the fingerprint of the model.
        dtype: of its weights and products.
        owner: names the run and process that adds; the same when it goes on.

    Raises:
        UserError: the folder cannot be made, or a file in it is damaged.
    """

    def __init__(self, folder: Path, weights: str, dtype: str, owner: str = "") -> None:
        self.weights = weights
        self.folder = folder / f"{weights}-{dtype}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"the reference cache {folder} must be a folder, or a place for one: {error}.") from error
        self._owner = blake2b(owner.encode(), digest_size=4).hexdigest()
        self._known: dict[bytes, float] = {}
        self._added: dict[bytes, float] = {}
        self._written = 0
        self.refresh()
        self._path = self.folder / f"{len(self._files()):06d}-{self._owner}-{uuid.uuid4().hex}.safetensors"

    def __len__(self) -> int:
        return len(self._known)

    def _files(self) -> list[Path]:
        """Those of the owner first, the oldest first among each."""
        return sorted(self.folder.glob("*.safetensors"), key=lambda path: (self._owner not in path.name, path.name))

    def refresh(self) -> None:
        """Read what others have added."""
        for path in self._files():
            self._read(path)

    def _read(self, path: Path) -> None:
        try:
            tensors = load_file(path)
            keys, logps = tensors["keys"].numpy().tobytes(), tensors["logps"].tolist()
        except OSError as error:
            raise UserError(f"the reference cache's file {path} cannot be opened: {error}.") from error
        except (SafetensorError, KeyError) as error:
            raise UserError(f"the reference cache's file {path} is damaged ({error}): delete it.") from error
        for number, logp in enumerate(logps):
            self._known.setdefault(keys[number * _KEY : (number + 1) * _KEY], logp)

    def get(self, keys: Sequence[bytes]) -> list[float] | None:
        """The numbers of responses, nats; None where one is not known."""
        try:
            return [self._known[key] for key in keys]
        except KeyError:
            return None

    def add(self, keys: Sequence[bytes], logps: Iterable[float]) -> list[float]:
        """Keep float32 numbers where they are new and finite, and give those that count: a known one stays as it is."""
        counted = []
        for key, logp in zip(keys, logps, strict=True):
            if key not in self._known and math.isfinite(logp):
                self._known[key] = self._added[key] = logp
            counted.append(self._known.get(key, logp))
        return counted

    def write(self) -> None:
        """What this process added, in one file that is whole or not there.

        Raises:
            OSError: it cannot be written.
        """
        if len(self._added) == self._written:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        keys = torch.frombuffer(bytearray(b"".join(self._added)), dtype=torch.uint8).reshape(-1, _KEY)
        building = self._path.with_suffix(".building")
        try:
            with building.open("wb") as file:
                file.write(save({"keys": keys, "logps": torch.tensor(list(self._added.values()))}))
                file.flush()
                os.fsync(file.fileno())
            building.replace(self._path)
        finally:
            building.unlink(missing_ok=True)
        self._written = len(self._added)

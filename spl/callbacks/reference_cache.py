"""The reference's log-probabilities kept on disk, so that they are computed once for several epochs and many runs."""

import logging
from pathlib import Path
from typing import Any

import datasets
from lightning import Callback, LightningModule, Trainer

log = logging.getLogger(__name__)


class ReferenceCache(Callback):
    """Looks the reference's log-probabilities up before it computes them, and keeps those it computed.

    A number's key is the model's weights, their dtype and the token ids: a sweep over alpha, beta or the learning rate
    shares one cache, and a run whose numbers are all there does no reference pass and holds no reference model.

    Args:
        cache: the folder; "auto" is one for all runs beside the tokenised data, "none" computes every time.
    """

    def __init__(self, cache: str = "auto") -> None:
        self.cache = cache

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        module: Any = pl_module
        if self.cache != "none" and hasattr(module, "cache_folder"):
            shared = Path(datasets.config.HF_DATASETS_CACHE) / "spl" / "reference"
            module.cache_folder = shared if self.cache == "auto" else Path(self.cache).expanduser()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if (cache := self._cache(pl_module)) is None:
            return
        module: Any = pl_module
        module.reference.end_epoch()
        if trainer.world_size > 1:
            self._write(pl_module)
            trainer.strategy.barrier()
            cache.refresh()  # in the next epoch an example may come to another process

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._write(pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._write(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._write(pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._write(pl_module)

    def _cache(self, module: Any) -> Any:
        return getattr(getattr(module, "reference", None), "cache", None)

    def _write(self, module: Any) -> None:
        if (cache := self._cache(module)) is not None:
            try:
                cache.write()
            except OSError as error:  # a run is worth more than its cache
                log.warning("The reference cache could not be written: %s.", error)

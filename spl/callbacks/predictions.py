"""What `spl predict` writes."""

import logging
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet as parquet
import torch
from lightning import Callback, LightningModule, Trainer

from spl.secrets import redact
from spl.types import PreferenceBatch

log = logging.getLogger(__name__)

FIGURES = {  # by what a module's step calls them; what one does not have is left out
    "policy_logps": pyarrow.field("policy_logp", pyarrow.float32()),  # log pi(y|x), nats
    "reference_logps": pyarrow.field("reference_logp", pyarrow.float32()),  # log pi_ref(y|x), nats; NaN where beta is 0
    "rewards": pyarrow.field("reward", pyarrow.float32()),  # alpha log pi - beta log pi_ref, or a reward model's
    "entropies": pyarrow.field("entropy", pyarrow.float32()),  # token entropies summed over the response, nats
    "num_response_tokens": pyarrow.field("num_tokens", pyarrow.int32()),  # scored
}
ROW = pyarrow.field("row", pyarrow.string())  # where the example came from
RESPONSE = pyarrow.field("response", pyarrow.int32())  # its index within the example


class PredictionWriter(Callback):
    """Writes log-probabilities and rewards, a row for every response, to `predictions.parquet`.

    With several processes each writes its own file, `predictions-RANK.parquet`.
    """

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        suffix = f"-{trainer.global_rank}" if trainer.world_size > 1 else ""
        self.path = Path(trainer.default_root_dir) / f"predictions{suffix}.parquet"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.writer: parquet.ParquetWriter | None = None

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: dict[str, Any],
        batch: PreferenceBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        examples, found = batch.response_example.tolist(), {k: v for k, v in outputs.items() if k in FIGURES}
        schema = pyarrow.schema([ROW, RESPONSE, *(FIGURES[name] for name in found)])
        if self.writer is None:
            self.writer = parquet.ParquetWriter(self.path, schema)
        columns = [
            [redact(batch.rows[e]) for e in examples],
            [r - examples.index(e) for r, e in enumerate(examples)],
            *(
                values.to(torch.int32 if name == "num_response_tokens" else torch.float32).tolist()
                for name, values in found.items()
            ),
        ]
        self.writer.write_table(pyarrow.table(columns, schema=schema))

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.writer is not None:
            self.writer.close()
        log.info("Wrote %s.", self.path)

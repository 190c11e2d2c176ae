"""What `spl predict` writes."""

import logging
from pathlib import Path

import pyarrow
import pyarrow.parquet as parquet
from lightning import Callback, LightningModule, Trainer

from spl.secrets import redact
from spl.types import PreferenceBatch, StepOutput

log = logging.getLogger(__name__)

SCHEMA = pyarrow.schema(
    {
        "row": pyarrow.string(),  # where the example came from
        "response": pyarrow.int32(),  # its index within the example
        "policy_logp": pyarrow.float32(),  # log pi(y|x), nats
        "reference_logp": pyarrow.float32(),  # log pi_ref(y|x), nats; NaN where beta is 0
        "reward": pyarrow.float32(),  # alpha log pi - beta log pi_ref
        "entropy": pyarrow.float32(),  # token entropies summed over the response, nats
        "num_tokens": pyarrow.int32(),  # scored
    }
)


class PredictionWriter(Callback):
    """Writes log-probabilities and implicit rewards, a row for every response, to `predictions.parquet`.

    With several processes each writes its own file, `predictions-RANK.parquet`.
    """

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        suffix = f"-{trainer.global_rank}" if trainer.world_size > 1 else ""
        self.path = Path(trainer.default_root_dir) / f"predictions{suffix}.parquet"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.writer = parquet.ParquetWriter(self.path, SCHEMA)

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: StepOutput,
        batch: PreferenceBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        examples = batch.response_example.tolist()
        columns = {
            "row": [redact(batch.rows[e]) for e in examples],
            "response": [r - examples.index(e) for r, e in enumerate(examples)],
            "policy_logp": outputs["policy_logps"].float().tolist(),
            "reference_logp": outputs["reference_logps"].float().tolist(),
            "reward": outputs["rewards"].float().tolist(),
            "entropy": outputs["entropies"].float().tolist(),
            "num_tokens": outputs["num_response_tokens"].tolist(),
        }
        self.writer.write_table(pyarrow.table(columns, schema=SCHEMA))

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.writer.close()
        log.info("Wrote %s.", self.path)

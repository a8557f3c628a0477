"""Language-model loss on text that no one trained on."""

from __future__ import annotations

from dataclasses import dataclass

from megarlhf.batch import TextBatch
from megarlhf.config.sections import HeldOutTextConfig
from megarlhf.data.pretraining import held_out_rows
from megarlhf.engine.engine import Engine


def language_model_loss_on(engine: Engine, batch: TextBatch) -> float:
    """Mean negative log-likelihood in nats of the tokens that count in `batch`."""
    logprobs = engine.logprobs(batch, batch.loss_mask)
    return -float(logprobs[batch.loss_mask].double().mean())


@dataclass(frozen=True)
class HeldOutText:
    """Packed held-out rows, or none."""

    rows: TextBatch | None
    fingerprint: str | None = None
    """Of their corpus."""

    @staticmethod
    def of(data: HeldOutTextConfig | None, *, eos_id: int, vocab_size: int) -> HeldOutText:
        """The rows of valid_prefix, where there is one."""
        if data is None or data.valid_prefix is None:
            return HeldOutText(None)
        rows, fingerprint = held_out_rows(
            data.valid_prefix, seq_len=data.seq_len, max_rows=data.valid_rows, eos_id=eos_id, vocab_size=vocab_size
        )
        return HeldOutText(rows, fingerprint)

    def metrics(self, engine: Engine) -> dict[str, float]:
        """{"valid/text_loss": nats per token}, or nothing where there is no text."""
        return {} if self.rows is None else {"valid/text_loss": language_model_loss_on(engine, self.rows)}

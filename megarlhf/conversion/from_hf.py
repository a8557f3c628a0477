"""From a Hugging Face folder to a checkpoint of ours."""

from __future__ import annotations

from pathlib import Path

from megarlhf.conversion.hf_folder import CONFIG, read_hf_folder
from megarlhf.conversion.incoming import PART_BYTES, tokenizer_beside, write_incoming


def from_hf(source: Path, target: Path, *, eos_token: str | None = None, part_bytes: int = PART_BYTES) -> list[str]:
    """Convert the folder `source` to a checkpoint at `target`; returns what is to be said of it. See `write_incoming`."""
    model = read_hf_folder(source)
    return write_incoming(
        model,
        target,
        kind=model.family.model_type,
        tokenizer=tokenizer_beside(source),
        eos_token=eos_token,
        files=(CONFIG,),
        part_bytes=part_bytes,
    )

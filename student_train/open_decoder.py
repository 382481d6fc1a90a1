"""A checkpoint to a student that writes: `student` and `decoding` of a configuration -> tokenizer and `Decoder`.

Mask, block size and special tokens come from the checkpoint; the settings of a training are what names them where a
checkpoint (of another project) does not.
"""

from dataclasses import replace
from typing import NamedTuple

from ..shared.config import DecodingConfig, RunConfig
from ..shared.errors import ConfigError, DataError
from ..shared.models.loading import load_model, local_folder, read_config
from ..shared.models.specs import BIDIRECTIONAL, family_of
from ..shared.tokens import TextEncoder, load_tokenizer, published_mask
from .answer_text import AnswerReader
from .processes import join, own_device
from .sampling import Decoder


class Writer(NamedTuple):
    """Everything that turns messages into answers."""

    encoder: TextEncoder
    decoder: Decoder
    settings: DecodingConfig
    """With the block size filled in: what a result's cache key should hold."""


def open_writer(config: RunConfig) -> Writer:
    """Load a student for decoding, onto this process's device.

    Raises: ConfigError: no student named; no mask token, or no embedding for it; see `own_device`, `join`.
        DataError: not a student's architecture, damaged files. Unavailable: hub, or too little memory.
    """
    student = config.student
    if not student.path:
        raise ConfigError("student.path is empty: give --student, a checkpoint folder or hub id")
    device = own_device(config.decoding.device, "decoding.device")
    folder = local_folder(student.path, student.revision)
    described = read_config(folder)
    family = family_of(described, str(folder))
    if family.native != BIDIRECTIONAL or family.logit_shift or family.block_size is None:
        raise DataError(
            f"{folder}: a {described['model_type']} does not write block by block as a BD3LM student does; give a "
            "student that tide trained, or an a2d checkpoint"
        )
    block_size = described.get("block_size")
    if block_size is None:
        block_size = student.block_size
    elif type(block_size) is not int or block_size < 1:
        raise DataError(f"{folder}/config.json: block_size = {block_size!r}: expected a positive number, or nothing")
    tokenizer = load_tokenizer(student.tokenizer or folder)
    mask_token = student.mask_token
    mask_id = published_mask(tokenizer, described, str(folder)) if mask_token is None else None
    encoder = TextEncoder(
        tokenizer, block_size=block_size, max_length=block_size, mask_token=mask_token, mask_id=mask_id,
        eos_token=student.eos_token, template=student.template,
    )  # fmt: skip
    join(device)  # the processes of an evaluation meet there
    model = load_model(folder, device_map=None if device.type == "cpu" else {"": device})
    settings = replace(config.decoding, block_size=config.decoding.block_size or block_size)
    return Writer(encoder, Decoder(model, AnswerReader.of(encoder), block_size), settings)

"""One request, one reply: rows to bodies, bodies to answers. No I/O."""

from batchrun.chat.build import Builder, custom_id, without_surrogates
from batchrun.chat.identity import (
    HASH_VERSION,
    encode,
    format_hash,
    format_hashes,
    json_text,
    parse_hash,
)
from batchrun.chat.reply import (
    ANSWER_COLUMNS,
    NOTHING,
    answer,
    body_json,
    body_text,
    columns,
    parse,
    rebuild,
    request_id,
)
from batchrun.chat.shape import CUSTOM_ID, Built, Identity, Invalid, Layout, PromptSettings, detect
from batchrun.chat.stream import Assembler

__all__ = [
    "ANSWER_COLUMNS",
    "CUSTOM_ID",
    "HASH_VERSION",
    "NOTHING",
    "Assembler",
    "Builder",
    "Built",
    "Identity",
    "Invalid",
    "Layout",
    "PromptSettings",
    "answer",
    "body_json",
    "body_text",
    "columns",
    "custom_id",
    "detect",
    "encode",
    "format_hash",
    "format_hashes",
    "json_text",
    "parse",
    "parse_hash",
    "rebuild",
    "request_id",
    "without_surrogates",
]

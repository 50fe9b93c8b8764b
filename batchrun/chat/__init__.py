"""One request, one reply: rows to bodies, bodies to answers. No I/O."""

from batchrun.chat.api import CHAT, Api
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
    body_json,
    body_text,
    request_id,
)
from batchrun.chat.rows import (
    CUSTOM_ID,
    Body,
    Built,
    Identity,
    Invalid,
    Layout,
    PromptSettings,
    Unusable,
)
from batchrun.chat.schema import (
    AnswerSchema,
    Problem,
    asking,
    dialects,
    repairing,
    with_model,
)
from batchrun.chat.stream import Assembler
from batchrun.chat.text import is_utf8

__all__ = [
    "CHAT",
    "CUSTOM_ID",
    "HASH_VERSION",
    "AnswerSchema",
    "Api",
    "Assembler",
    "Body",
    "Builder",
    "Built",
    "Identity",
    "Invalid",
    "Layout",
    "Problem",
    "PromptSettings",
    "Unusable",
    "asking",
    "body_json",
    "body_text",
    "custom_id",
    "dialects",
    "encode",
    "format_hash",
    "format_hashes",
    "is_utf8",
    "json_text",
    "parse_hash",
    "repairing",
    "request_id",
    "with_model",
    "without_surrogates",
]

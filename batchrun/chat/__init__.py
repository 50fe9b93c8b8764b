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
from batchrun.chat.rows import CUSTOM_ID, Built, Identity, Invalid, Layout, PromptSettings, Unusable
from batchrun.chat.stream import Assembler
from batchrun.chat.text import is_utf8

__all__ = [
    "CHAT",
    "CUSTOM_ID",
    "HASH_VERSION",
    "Api",
    "Assembler",
    "Builder",
    "Built",
    "Identity",
    "Invalid",
    "Layout",
    "PromptSettings",
    "Unusable",
    "body_json",
    "body_text",
    "custom_id",
    "encode",
    "format_hash",
    "format_hashes",
    "is_utf8",
    "json_text",
    "parse_hash",
    "request_id",
    "without_surrogates",
]

"""Reads rows of preference data: the one reader of the service's commands, of the trainer and of the adapters.

    files          paths → rows: JSON lines, JSON arrays, CSV, Parquet, Arrow, folders, gzip
    pair_layouts   rows → pairs, in the layouts in which such data are published
    pair           prompt and answers with their whole context; messages: their roles and texts

Parquet and Arrow need pyarrow, which is imported when such a file is read; nothing else needs anything.
"""

from inward_client.rows.errors import DataError
from inward_client.rows.files import (
    FORMATS,
    Collected,
    Format,
    Row,
    Source,
    collect,
    collect_pairs,
    find,
    format_of,
)
from inward_client.rows.messages import Messages, Prompt, as_turns, messages, text
from inward_client.rows.pair import Pair, get, paired, read_item, read_prompt, transcript, which
from inward_client.rows.pair_layouts import (
    AUTO,
    COLUMNS,
    LAYOUTS,
    LOOKED_AT,
    Layout,
    PairReader,
    notes,
    read_pair,
    recognise,
)
from inward_client.rows.terminal import printable

__all__ = [
    "AUTO",
    "COLUMNS",
    "FORMATS",
    "LAYOUTS",
    "LOOKED_AT",
    "Collected",
    "DataError",
    "Format",
    "Layout",
    "Messages",
    "Pair",
    "PairReader",
    "Prompt",
    "Row",
    "Source",
    "as_turns",
    "collect",
    "collect_pairs",
    "find",
    "format_of",
    "get",
    "messages",
    "notes",
    "paired",
    "printable",
    "read_item",
    "read_pair",
    "read_prompt",
    "recognise",
    "text",
    "transcript",
    "which",
]

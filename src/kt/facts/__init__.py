"""Facts: the records that are traced, edited and judged, and the readers of their file formats."""

from .fact import Fact, Prompt, fill, template_of
from .formats import FORMATS, read_record, read_records
from .load import Loaded, Skips, fact_by_hand, facts_from, iter_facts, load_facts, parse_limit, read_facts

__all__ = [
    "FORMATS",
    "Fact",
    "Loaded",
    "Prompt",
    "Skips",
    "fact_by_hand",
    "facts_from",
    "fill",
    "iter_facts",
    "load_facts",
    "parse_limit",
    "read_facts",
    "read_record",
    "read_records",
    "template_of",
]

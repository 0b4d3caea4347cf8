"""Facts: the record that is traced, edited and judged, and the readers of its file formats."""

from .fact import Fact, Prompt, fill, template_of
from .formats import FORMATS, read_record
from .load import fact_by_hand, facts_from, load_facts, parse_limit

__all__ = [
    "FORMATS",
    "Fact",
    "Prompt",
    "fact_by_hand",
    "facts_from",
    "fill",
    "load_facts",
    "parse_limit",
    "read_record",
    "template_of",
]

"""The knowledge stream: readers of the published data sets of edits, and the order in which edits arrive."""

from rledit_env.knowledge.record import EditRecord, KnowledgeError, UnrelatedFact
from rledit_env.knowledge.stream import HELD_OUT, KnowledgeDataset, KnowledgeStream, held_out, load_knowledge

__all__ = [
    "HELD_OUT",
    "EditRecord",
    "KnowledgeDataset",
    "KnowledgeError",
    "KnowledgeStream",
    "UnrelatedFact",
    "held_out",
    "load_knowledge",
]

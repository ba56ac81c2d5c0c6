"""Edit records, the readers of data sets of edits, and the stream of records in batches."""

from rledit_env.knowledge.record import EditRecord, ImpliedFact, KnowledgeError, UnrelatedFact
from rledit_env.knowledge.stored import StoredRecords
from rledit_env.knowledge.stream import HELD_OUT, KnowledgeDataset, KnowledgeStream, held_out, load_knowledge

__all__ = [
    "HELD_OUT",
    "EditRecord",
    "ImpliedFact",
    "KnowledgeDataset",
    "KnowledgeError",
    "KnowledgeStream",
    "StoredRecords",
    "UnrelatedFact",
    "held_out",
    "load_knowledge",
]

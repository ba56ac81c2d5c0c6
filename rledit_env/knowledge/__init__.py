"""The knowledge stream: readers of the published data sets of edits, and the order in which edits arrive."""

from rledit_env.knowledge.record import EditRecord, ImpliedFact, KnowledgeError, UnrelatedFact
from rledit_env.knowledge.stream import KnowledgeDataset, KnowledgeStream, load_knowledge

__all__ = [
    "EditRecord",
    "ImpliedFact",
    "KnowledgeDataset",
    "KnowledgeError",
    "KnowledgeStream",
    "UnrelatedFact",
    "load_knowledge",
]

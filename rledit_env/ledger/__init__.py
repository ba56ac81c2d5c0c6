"""Every update of an editing run on disk before it takes effect."""

from rledit_env.ledger.folder import check_ledger
from rledit_env.ledger.format import HEADER, LEDGER, Entry, LedgerError, RunState, weights_hash
from rledit_env.ledger.recorder import Recorder
from rledit_env.ledger.replay import change_norm, original_weights
from rledit_env.ledger.store import EditLedger

__all__ = [
    "HEADER",
    "LEDGER",
    "EditLedger",
    "Entry",
    "LedgerError",
    "Recorder",
    "RunState",
    "change_norm",
    "check_ledger",
    "original_weights",
    "weights_hash",
]

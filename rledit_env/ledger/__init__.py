"""Every update of an editing run on disk before it takes effect."""

from rledit_env.ledger.folder import check_ledger
from rledit_env.ledger.format import HEADER, LEDGER, Entry, LedgerError, RunState, Update, weights_hash
from rledit_env.ledger.recorder import Recorder
from rledit_env.ledger.replay import change_norm, on_device, original_weights, updated
from rledit_env.ledger.store import EditLedger

__all__ = [
    "HEADER",
    "LEDGER",
    "EditLedger",
    "Entry",
    "LedgerError",
    "Recorder",
    "RunState",
    "Update",
    "change_norm",
    "check_ledger",
    "on_device",
    "original_weights",
    "updated",
    "weights_hash",
]

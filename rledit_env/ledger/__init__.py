"""Every update of an editing run on disk before it takes effect."""

from rledit_env.ledger.store import EditLedger, LedgerError, Recorder, check_ledger

__all__ = [
    "EditLedger",
    "LedgerError",
    "Recorder",
    "check_ledger",
]

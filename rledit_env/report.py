"""Another name of :mod:`rledit_env.reporting.report`."""

from rledit_env.reporting.report import bootstrap_interval

__all__ = ["bootstrap_interval"]

"""Another name of :func:`rledit_env.reporting.bootstrap_interval`."""

from rledit_env.reporting import bootstrap_interval

__all__ = ["bootstrap_interval"]

"""The small data sets that ship with the package, and what built them (`build.py`; sources in `SOURCES.md`)."""

"""The small data sets that ship with the package, and the program that builds them (`build.py`; see `SOURCES.md`)."""

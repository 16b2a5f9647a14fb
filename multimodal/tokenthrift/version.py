"""The version of this release. `pyproject.toml` reads it from here; a test compares CITATION.cff."""

__version__ = "0.1.0"

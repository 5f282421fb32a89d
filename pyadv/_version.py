"""The version, in this one place: packaging, `pyadv.__version__` and the reports read it here."""

__version__ = "0.1.0"

"""The version of the distribution: read by setup.py as text, so that this file must import nothing."""

__version__ = "0.1.0"

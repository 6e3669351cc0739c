"""The version of meshwright."""

__version__ = "0.1.0"

"""Folders, files and hosts that a person did not mean to give. Without a host."""

from tests.index.conftest import made, pictures, pixel  # noqa: F401

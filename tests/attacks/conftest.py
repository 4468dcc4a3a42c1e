"""Shared by the attacks: what somebody who means harm puts where this program reads. No host."""

from __future__ import annotations

import pytest

from tests.index.conftest import made, pictures, pixel  # noqa: F401
from tests.nodes.conftest import load_pack


@pytest.fixture(scope="session")
def pack(tmp_path_factory):
    """The nodes on a stand-in for the host, beside that of tests/nodes."""
    return load_pack(str(tmp_path_factory.mktemp("models")), "amg-attacked-pack")

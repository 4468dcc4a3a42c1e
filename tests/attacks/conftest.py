"""Shared by the attacks: what somebody who means harm puts where this program reads. No host."""

from __future__ import annotations

from tests.index.conftest import made, pictures, pixel  # noqa: F401
from tests.nodes.conftest import pack  # noqa: F401

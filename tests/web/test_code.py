"""The page's code as it lies there: small, on its own, and what it computes."""

from __future__ import annotations

import re

from tests.web.conftest import ROOT

WEB = ROOT / "web"
CODE = [*sorted(WEB.glob("*.js")), *sorted(WEB.glob("*.css"))]

# Bytes: what there is, rounded up. The page loads all of it at once. It has grown by the table of Strength
# Grid, verdicts outside subgraphs and in App mode, the nearest pictures, and lists that learn of a new
# index; look for what is there twice before you raise it.
MOST = 77 * 1024


def test_it_is_small():
    assert CODE
    assert sum(path.stat().st_size for path in CODE) < MOST


def test_it_asks_nobody_but_the_host():
    """No address of another place; imports are of the host's two scripts and of each other."""
    for path in CODE:
        text = path.read_text()
        found = set(re.findall(r"(?:https?:)?//[\w.-]+\.\w+[^\s\"']*", text))
        assert found <= {"http://www.w3.org/2000/svg"}, path.name
        imported = set(re.findall(r"from \"([^\"]+)\"", text))
        names = {f"./{other.name}" for other in CODE}
        assert imported <= names | {"../../scripts/app.js", "../../scripts/api.js"}, path.name


def test_text_is_never_read_as_markup():
    for path in CODE:
        assert not re.search(
            r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", path.read_text()
        )

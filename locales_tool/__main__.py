"""Writes locales/ from the nodes and the catalogues: `python -m locales_tool`. Needs no ComfyUI.

It writes every `nodeDefs.json`, and for English `main.json` too. The other files are written by hand.

What a catalogue lacks or has too much is printed, nothing is written for that language, and the exit
status is 1.
"""

from __future__ import annotations

import asyncio
import importlib.util
import sys
import tempfile

from . import (
    CATALOGUES,
    CODES,
    LOCALES,
    ROOT,
    as_text,
    catalogue,
    english,
    english_main,
    faults,
    lost_places,
    sentences,
    texts,
    translated,
)


def main() -> int:
    source = english(schemas())
    written, bad = {"en": source}, 0
    for code in CODES:
        if not (CATALOGUES / f"{code}.json").is_file():
            print(f"{code}: catalogue missing")
            bad += 1
            continue
        known = catalogue(code)
        wrong = faults(list(texts(source)), known)
        lost = lost_places(sentences("en"), sentences(code))
        wrong += [f"differs from amg_core/messages.json: {each}" for each in lost]
        bad += len(wrong)
        for line in wrong:
            print(f"{code}: {line}")
        if not wrong:
            written[code] = translated(source, known)
    for code, tree in written.items():
        path = LOCALES / code / "nodeDefs.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(as_text(tree), encoding="utf-8")
    (LOCALES / "en/main.json").write_text(as_text(english_main()), encoding="utf-8")
    print(f"{len(written)} of {1 + len(CODES)} languages written to {LOCALES}")
    return 1 if bad else 0


def schemas() -> list:
    """Of all nodes, in the stand-in for ComfyUI that the tests use."""
    place = ROOT / "tests/nodes/conftest.py"
    spec = importlib.util.spec_from_file_location("amg_stand_in", place)
    stand_in = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(stand_in)
    with tempfile.TemporaryDirectory() as models:
        sys.modules.update(stand_in.fakes(models))
        extension = asyncio.run(stand_in.load_entry("amg-locales").comfy_entrypoint())
        return [node.define_schema() for node in asyncio.run(extension.get_node_list())]


sys.exit(main())

"""Shared by all tests: a thread each, and what a saved workflow depends on."""

from __future__ import annotations

import os

import pytest

# Before torch is imported, here and in the processes that tests start: several tests run at once, and
# sums come out alike however many do.
os.environ["OMP_NUM_THREADS"] = "1"

FROM_HOST = ("sampler_name", "scheduler", "index_name")  # combos whose options are not ours


def describe(schema) -> dict:
    """What a saved workflow depends on: ids, types, order, defaults, ranges, options."""
    inputs = []
    for each in schema.inputs:
        entry = {"id": each.id, "type": each.io_type}
        if each.optional:
            entry["optional"] = True
        for name in ("default", "min", "max"):
            value = getattr(each, name, None)
            if value is not None:
                entry[name] = value
        if getattr(each, "options", None) is not None and each.id not in FROM_HOST:
            entry["options"] = list(each.options)
        inputs.append(entry)
    outputs = [{"id": each.id, "type": each.io_type} for each in schema.outputs]
    return {"inputs": inputs, "outputs": outputs, "output_node": bool(schema.is_output_node)}


@pytest.fixture(scope="session")
def describe_schema():
    return describe

"""Mitigations without an index: changes of the prompt, and of when guidance begins. Needs only torch."""

"""The tables of AMG (CVPR 2024) on small models that memorise. How to read them: docs/tables.md."""

"""Finds out from the model's predictions whether a prompt is memorised. Needs no index.

`predictions` holds a network's predictions, `statistics` measures them, `calibration` turns the
statistics into a probability by comparison with ordinary prompts, and `tokens` finds the trigger words.
The modules need only torch, and no host. docs/detection.md has figures and limits.
"""

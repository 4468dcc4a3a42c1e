"""Is this prompt a key to a training picture? Told from what the model predicts, without an index.

`predictions` (what a network was asked and said), `statistics` (what is measured in it),
`calibration` (what ordinary prompts measure: a probability), `tokens` (which words are the key).
Torch only; nothing here knows a host. docs/detection.md has figures and limits.
"""

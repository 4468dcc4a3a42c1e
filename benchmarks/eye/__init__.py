"""How well descriptors recognise edited copies of pictures: `python -m benchmarks.eye`."""

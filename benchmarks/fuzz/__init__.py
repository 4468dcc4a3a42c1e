"""Damages what the program reads, at random, and looks at what it does with it."""

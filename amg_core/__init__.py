"""Anti-Memorization Guidance: the host-neutral core (torch and numpy only). See ``guidance.py``."""

__version__ = "0.1.0"

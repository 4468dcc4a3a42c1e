"""Anti-Memorization Guidance: the core. It imports no host, only torch, numpy, safetensors and Pillow.

docs/architecture.md has the map.
"""

__version__ = "0.1.0"

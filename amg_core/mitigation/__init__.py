"""Mitigations that need no index: what is asked, and when guidance begins. Torch only, pure functions."""

"""What the guard costs: see `__main__`."""

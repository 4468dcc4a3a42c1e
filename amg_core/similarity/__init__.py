"""How alike two pictures are, and the verdict on a finished picture."""

"""How alike two pictures are, what that is worth, and what is said of a finished picture."""

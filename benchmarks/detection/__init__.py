"""How well detection without an index works, on the embedded model that memorises."""

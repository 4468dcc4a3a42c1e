"""How the networks in the box were trained. Nothing here is needed to use them."""

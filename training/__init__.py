"""The training of the networks that come with the plugin. It is not needed to use them."""

"""The command line for indexes: ``python -m index_tools --help``."""

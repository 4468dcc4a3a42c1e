"""The one exception a user is meant to read."""


class AMGError(RuntimeError):
    """Something the user can mend. The message names the file or widget and the next step."""

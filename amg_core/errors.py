"""The exception whose message is shown to users."""


class AMGError(RuntimeError):
    """An error that the user can fix. The message names the file or widget and the next step."""

"""Settings: frozen dataclasses, checked when they are made."""


class UserError(Exception):
    """Bad input that its user can mend: shown as one line, exit code 2, no traceback."""

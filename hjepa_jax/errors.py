"""Exceptions that end a command with one line. Any other exception is a bug."""

import signal


class InputError(Exception):
    """Input that the user can correct.

    The commands print it as one line on stderr and exit with status 2.

    Args:
      field: name of the config field, flag or argument ("mask.scale", "--workdir").
      value: the value that was given.
      rule: the rule that the value breaks, in words.

    Attributes:
      status: exit status of the command.
    """

    status = 2

    def __init__(self, field: str, value: object, rule: str):
        self.field, self.value, self.rule = field, value, rule
        super().__init__(f"{field}={_show(value)}: {rule}")

    def __reduce__(
        self,
    ) -> tuple[type, tuple[str, object, str]]:  # to cross processes
        return InputError, (self.field, self.value, self.rule)


class Interrupted(Exception):
    """A signal stopped the run; its state at `step` is saved.

    Attributes:
      status: exit status of the command.
    """

    def __init__(self, signum: int, step: int):
        self.status = 128 + signum
        super().__init__(f"{signal.Signals(signum).name} at step {step}")


def _show(value: object) -> str:
    try:
        return repr(value)
    except ValueError:  # an int with more digits than Python prints
        return f"<{type(value).__name__}>"


def first_line(error: BaseException) -> str:
    """Returns the first non-empty line of the message, or the name of the error."""
    lines = (line.strip() for line in str(error).splitlines())
    return next(filter(None, lines), type(error).__name__)

"""What agentctl's exit status says, whatever the output format, and the one exception that carries it."""

ANSWERED = 0
ERROR = 1
USAGE = 2
DAEMON_DOWN = 3
FORBIDDEN = 4
NO_SUCH_THING = 5
TIMED_OUT = 6
ATTENTION = 10
BAD = 11


class Failure(Exception):  # noqa: N818  not always an error: a watched job that failed is a good answer
    """Ends the command with `exit_code`; `code` is stable snake_case, `message` one sentence, `hint` what to do next."""

    def __init__(self, exit_code: int, code: str, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.exit_code = exit_code
        self.code = code
        self.message = message
        self.hint = hint

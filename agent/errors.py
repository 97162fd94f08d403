"""The error types of the agent; each instance carries a stable code, a sentence for a person, and what to do about it."""


class AgentError(Exception):
    """Base of all expected errors.

    `code` is stable snake_case, relied on by job status details, the API and the shadow; `message` is one sentence;
    `hint` says what to do next and may be empty.
    """

    def __init__(self, code: str, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.hint = hint


class SettingsError(AgentError):
    """agent.toml can't be used; the process exits with status 2."""


class RefusedError(AgentError):
    """What was asked for is not acceptable and nothing was touched: a job ends REJECTED, an API call 4xx."""


class FailedError(AgentError):
    """It was tried and did not succeed; unless `code` is `rollback_failed` the device is on what it had before."""


class CloudError(AgentError):
    """The cloud could not be reached, did not answer in time, or refused a request; `code` is AWS's where it gave one.

    `retryable` tells a passing fault (off-line, time-out, throttling) from one that stays until something changes.
    """

    def __init__(self, code: str, message: str, hint: str = "", *, retryable: bool = False) -> None:
        super().__init__(code, message, hint)
        self.retryable = retryable


class StoreError(AgentError):
    """The state database can't be opened, read or written."""

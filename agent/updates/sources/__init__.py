"""Where an artifact comes from, HTTP servers and file streams, and what an attempt on one of them can end with."""

from __future__ import annotations


class Broken(Exception):  # noqa: N818  a state of the way here rather than a program's error
    """The attempt is over; the next may go on where it stopped."""


class Expired(Exception):  # noqa: N818
    """The URL is not valid any more; a new one may be."""


class Strange(Exception):  # noqa: N818
    """The answer can't be used. A few of them in a row, and the URL is useless.

    `doubtful`: perhaps it is not the artifact's server that answered, but somebody between it and the camera, such as the
    login page of a network. That can pass, so a few answers are not enough to judge the URL; it takes time as well.
    """

    def __init__(self, why: str, *, code: str = "download_failed", doubtful: bool) -> None:
        super().__init__(why)
        self.code = code
        self.doubtful = doubtful


class Useless(Exception):  # noqa: N818
    """The URL certainly does not serve the artifact; `code` becomes the job's reason."""

    def __init__(self, code: str, why: str) -> None:
        super().__init__(why)
        self.code = code

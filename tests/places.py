"""Folders that nobody but their owner can change, all the way up to /; pytest's own are below /tmp, where everybody writes."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def own_folder() -> Iterator[Path]:
    """A new folder that everybody can look into, removed at the end."""
    folder = Path(tempfile.mkdtemp(prefix="camera-agent-test-", dir="/var/lib" if os.geteuid() == 0 else Path.home()))
    folder.chmod(0o755)
    try:
        yield folder
    finally:
        shutil.rmtree(folder)

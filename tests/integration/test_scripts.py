"""The scripts on machines where something is missing."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


def program(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """A checkout, and a `bin` in which the user is not root, Debian's packages are missing and Python has no venv."""
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    shutil.copytree(ROOT / "requirements", tmp_path / "requirements")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / "bin").mkdir()
    program(tmp_path / "bin" / "id", "echo 1000")
    program(tmp_path / "bin" / "dpkg-query", "exit 1")
    program(tmp_path / "bin" / "python-without-venv", 'case "$*" in *version_info*) exit 0;; *) exit 1;; esac')
    return tmp_path


@pytest.mark.parametrize("script", ["test", "lint", "demo"])
def test_without_venv_it_says_what_to_do(machine: Path, script: str) -> None:
    environment = os.environ | {"PATH": f"{machine / 'bin'}:{os.environ['PATH']}", "PYTHON": "python-without-venv"}
    done = subprocess.run(
        ["bash", machine / "scripts" / script],
        cwd=machine,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert "sudo apt-get install python3-venv" in done.stderr
    assert "PYTHON=/path/to/python" in done.stderr
    assert not (machine / ".venv").exists()

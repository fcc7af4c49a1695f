"""ruff and mypy, as pyproject.toml sets them up, have nothing to say."""
import subprocess
import sys

import pytest

from helpers import ROOT


@pytest.mark.parametrize("command", [["ruff", "check", "."], ["mypy"]], ids=lambda command: command[0])
def test_nothing_to_say(command):
    done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True)
    assert not done.returncode, done.stdout + done.stderr

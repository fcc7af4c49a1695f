"""Shared by the tests: run a command line of the project as a user would."""
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def run(*command, code=0, cwd=ROOT, env=None, timeout=300):
    """Run `python COMMAND...` from the project's root and return the finished process.

    Asserts the exit code (`code=None` accepts any) and that no traceback is shown where a wrong input (2) is expected.
    """
    done = subprocess.run([sys.executable, *map(str, command)], cwd=cwd, capture_output=True, text=True, timeout=timeout,
                          env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})})
    if code is not None:
        assert done.returncode == code, f"exit {done.returncode}, expected {code}\n{done.stdout}\n{done.stderr}"
    if code == 2:
        assert "Traceback" not in done.stderr, done.stderr
    return done

"""What command lines share: recipes as flags, errors in one line, kinds of numbers. Imports nothing heavy."""
import argparse
import shlex
import sys
from pathlib import Path


class Parser(argparse.ArgumentParser):
    """argparse that reads recipes: flags in @file, any number per line, # starts a comment."""

    def convert_arg_line_to_args(self, line):
        return shlex.split(line, comments=True)

    def error(self, message):
        fail(message)


def fail(message, code=2):
    """Tell what is wrong in one line on stderr and leave: 2 wrong usage or input, 1 failed while working."""
    print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr, flush=True)
    sys.exit(code)


def share(text):
    """Type of a flag: a number above 0, 1 at most."""
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return value

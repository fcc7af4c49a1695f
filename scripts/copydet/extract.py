"""The command copydet-extract, train.py --mode extract of the package alone; find_copies describes images by it too.

Run by its path it does not need the package to be installed.
"""
import os
import sys

if __name__ == "__main__":
    HERE = os.path.dirname(os.path.realpath(__file__))  # whose modules are no others' of the same name
    sys.path[:] = [path for path in sys.path if os.path.realpath(path) != HERE] + [os.path.dirname(HERE)]

from copydet.common import InputError, run_main
from copydet.machine import let_idle_threads_sleep
from copydet.options import parse_args


def main() -> int:
    about = "Describe the images in DIR: train.py --mode extract. Results go to exp/NAME/extract."
    args = parse_args(["--mode", "extract", *sys.argv[1:]], about)  # before the imports that take seconds
    let_idle_threads_sleep()

    def work() -> None:
        if args.mode != "extract":
            raise InputError(f"--mode {args.mode}: of train.py, which is in the project's repository")
        from copydet.extraction import run_extraction
        run_extraction(args)

    return run_main(work)


if __name__ == "__main__":
    sys.exit(main())

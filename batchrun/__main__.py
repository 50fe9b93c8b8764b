"""``python -m batchrun``, and what the installed command starts."""

import sys
from typing import NoReturn

from batchrun.process import interrupts_held


def main() -> NoReturn:
    try:
        with interrupts_held():
            from batchrun import cli
        cli.main()
    except KeyboardInterrupt:
        print("batchrun: interrupted", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()

"""`python -m llava_ft` is `llava-ft`."""

import sys

from llava_ft.cli import main

if __name__ == "__main__":
    sys.exit(main())

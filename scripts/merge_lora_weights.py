"""`llava-ft merge` under the name it has in original LLaVA, with the same flags."""

import sys

from llava_ft.cli import main

if __name__ == "__main__":
    sys.exit(main(["merge", *sys.argv[1:]]))

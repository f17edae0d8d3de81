"""Entry point for launchers: `deepspeed train.py --config lora.yaml`, `torchrun train.py ...`, `python train.py`."""

import sys

from llava_ft.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))

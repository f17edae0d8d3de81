"""`llava-ft plan`."""

import contextlib
import json
import os
import sys
from collections.abc import Sequence

from llava_ft.commands.parser import DONE, FAILED, Parser
from llava_ft.training.log_setup import set_up_ranks


def plan(argv: Sequence[str]) -> int:
    """Say what a run will take, and whether it fits."""
    parser = Parser(
        "llava-ft plan",
        "Say what a run will take - memory, disk, steps - before any weight is loaded. Takes the flags of "
        "`llava-ft train`, --config among them, and those below. Exits with 1 if the run does not fit.",
    )
    parser.add_argument(
        *("--gpus", "--gpus-per-node", "--gpus_per_node"),
        type=int,
        help="GPUs on each machine; those of this machine when absent, else one",
    )
    parser.add_argument("--nodes", type=int, default=1, help="machines")
    parser.add_argument("--gpu-memory", "--gpu_memory", help="of each GPU, such as 24GiB; this machine's when absent")
    parser.add_argument(
        "--fit",
        action="store_true",
        help="choose gradient_checkpointing: what costs least time among what fits; prints the flags to add",
    )
    parser.add_argument("--json", action="store_true", help="write JSON, sizes in bytes")
    options, flags = parser.parse_known_args(argv)
    set_up_ranks(0)
    output = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):  # some libraries write to it when they are imported
        import torch

        if not torch.cuda.is_available():
            os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed warns that there is no GPU
        from llava_ft.args import parse_args
        from llava_ft.planning.plan import make_plan
        from llava_ft.planning.report import as_dict, as_text
        from llava_ft.planning.request import plan_machine

        args = parse_args(flags, required=("model_name_or_path",))
        machine = plan_machine(args.inherited, gpus=options.gpus, nodes=options.nodes, gpu_memory=options.gpu_memory)
        made = make_plan(args, machine, fit=options.fit)
    output.write((json.dumps(as_dict(made), indent=1) if options.json else as_text(made)) + "\n")
    return FAILED if made.fits is False else DONE

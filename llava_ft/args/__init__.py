"""Arguments: dataclasses, YAML and command line, checks across fields.

parsed = parse_args(["--config", "lora.yaml", "--lora_r", "64"])
parsed.model, parsed.data, parsed.flags      # plain and checked; nothing has been opened
parsed.training                              # transformers.TrainingArguments; initialises devices
"""

from llava_ft.args.data import DataArguments
from llava_ft.args.flags import format_help
from llava_ft.args.model import ModelArguments
from llava_ft.args.parse import ParsedArgs, parse_args, resolved_config, to_yaml
from llava_ft.args.training import TrainingFlags

__all__ = [
    "DataArguments",
    "ModelArguments",
    "ParsedArgs",
    "TrainingFlags",
    "format_help",
    "parse_args",
    "resolved_config",
    "to_yaml",
]

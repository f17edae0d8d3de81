"""Making the configuration of an architecture from fields that a file gives."""

from typing import Any, TypeVar

from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig

from llava_ft.errors import UserError

Config = TypeVar("Config", bound=PreTrainedConfig)


def make_config(config_class: type[Config], fields: dict[str, Any], where: str) -> Config:
    """Make a configuration of one of transformers' classes; messages name `where` the fields are from.

    Raises:
        UserError: A field has a type that the architecture does not know.
    """
    try:
        return config_class(**fields)
    except StrictDataclassError as error:
        problem = str(error).splitlines()[-1].strip().partition(": ")[2]
        raise UserError(f"The configuration of {where} is damaged: {problem}. Get it from its origin again.") from None

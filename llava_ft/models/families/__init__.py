"""The families of language models, by the `model_type` of their `config.json`."""

from collections.abc import Mapping
from typing import Any

from llava_ft.models.config import LlavaModelConfig
from llava_ft.models.families.family import Family
from llava_ft.models.families.llama import LLAMA

_FAMILIES: dict[str, Family] = {}


def register_family(family: Family) -> None:
    """Make a family known, under its own `model_type` and that of LLaVA models on it.

    Raises:
        TypeError: Its attention does not go through transformers' attention interface, and would take no notice of
            where samples begin.
    """
    if not family.model_class._supports_attention_backend:
        raise TypeError(
            f"{family.model_class.__name__} has attention of its own. Allowed are models whose attention goes through "
            "transformers' attention interface (_supports_attention_backend). Derive it from one of those."
        )
    _FAMILIES.update(dict.fromkeys((family.model_type, *family.llava_types), family))


def find_family(fields: Mapping[str, Any]) -> Family | None:
    """Return the family of a `config.json`; None if it is of another kind or of no known one."""
    return _FAMILIES.get(str(fields.get("model_type"))) if "text_config" not in fields else None


def family_of(config: LlavaModelConfig) -> Family:
    """Return the family of a model's configuration."""
    return _FAMILIES[config.model_type]


def known_families() -> list[Family]:
    """Return every family once, in the order in which they were registered."""
    return list(dict.fromkeys(_FAMILIES.values()))


for _family in (LLAMA,):
    register_family(_family)

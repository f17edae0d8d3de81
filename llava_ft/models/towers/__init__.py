"""The vision towers, by the `model_type` of their `config.json`."""

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedConfig

from llava_ft.errors import UserError
from llava_ft.models.architecture import make_config
from llava_ft.models.towers.clip import CLIP
from llava_ft.models.towers.tower import TowerFacts, TowerType, VisionTower

_TOWERS: dict[str, TowerType] = {}


def register_tower(tower: TowerType) -> None:
    """Make a type of tower known, under its own `model_type` and those of the models it is a part of."""
    _TOWERS.update(dict.fromkeys((tower.model_type, *tower.whole_types), tower))


def find_tower(fields: Mapping[str, Any]) -> TowerType | None:
    """Return the type of tower that a `config.json` or `mm_vision_config` describes; None if it is no known one."""
    # The first one is not named by the `mm_vision_config` of a checkpoint.
    return _TOWERS.get(str(fields.get("model_type", CLIP.model_type)))


def tower_fields(fields: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the architecture of a vision tower, as `mm_vision_config` holds it.

    Args:
        fields: Content of its `config.json`, or of that of a model it is a part of.
        where: The directory, for messages.

    Raises:
        UserError: It is of no known type.
    """
    inner: Mapping[str, Any] | None = fields.get("vision_config")
    if inner:
        fields = {"model_type": fields.get("model_type"), **inner}
    tower = find_tower(fields)
    if tower is None:
        raise UserError(f"The vision tower {where} is a {fields.get('model_type')!r} model. {_supported()}")
    full = make_config(tower.config_class, {key: fields[key] for key in tower.fields if key in fields}, where)
    named = {} if tower is CLIP else {"model_type": tower.model_type}
    return named | {key: getattr(full, key) for key in tower.fields}


def describe_tower(fields: Mapping[str, Any]) -> tuple[TowerType, PreTrainedConfig, TowerFacts]:
    """Return type, configuration and sizes of the tower that `mm_vision_config` describes."""
    tower = find_tower(fields)
    if tower is None:
        raise UserError(f"mm_vision_config describes a {fields.get('model_type')!r} model. {_supported()}")
    named = {key: value for key, value in fields.items() if key != "model_type"}
    config = make_config(tower.config_class, named, "the vision tower")
    return tower, config, tower.facts(config)


def build_tower(
    fields: Mapping[str, Any], select_layer: int, select_feature: str, s2_scales: tuple[int, ...] = ()
) -> VisionTower:
    """Build the tower that `mm_vision_config` describes; see `VisionTower`."""
    tower, config, _ = describe_tower(fields)
    return VisionTower(tower, config, select_layer, select_feature, s2_scales)


def _supported() -> str:
    known = (f"{each.model_type} (such as {each.example})" for each in dict.fromkeys(_TOWERS.values()))
    return f"Supported vision towers: {', '.join(known)}."


for _tower in (CLIP,):
    register_tower(_tower)

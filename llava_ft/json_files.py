"""The JSON files of models, adapters and checkpoints: objects whose fields have the types and ranges they must have."""

import json
from pathlib import Path
from typing import Annotated, Any, Final, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from llava_ft.errors import CheckpointError

_MOST_BYTES: Final = 100 * 10**6

Count = Annotated[int, Field(gt=0, le=10**12)]
Amount = Annotated[float, Field(allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]


class Fields(BaseModel):
    """Fields that are read of a file. Types are not converted; fields that are not described may hold anything."""

    model_config = ConfigDict(strict=True, extra="allow", protected_namespaces=())


def read_json(path: Path, schema: type[Fields] | None = None) -> dict[str, Any]:
    """Read a JSON object, as it is in the file.

    Args:
        path: The file.
        schema: What its fields must be.

    Raises:
        CheckpointError: It is missing, is not JSON, is no object, is too large to be one of these, gives one name
            twice, or has a field that cannot be what it is.
    """
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise ValueError(f"it has {path.stat().st_size:,} bytes, and {_MOST_BYTES:,} are read")
        content = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=_without_duplicates)
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON ({error}). Is the file complete?") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a JSON {type(content).__name__}; an object is needed.")
    fields = cast("dict[str, Any]", content)
    if schema is not None:
        check_fields(fields, schema, str(path))
    return fields


def check_fields(fields: dict[str, Any], schema: type[Fields], where: str) -> None:
    """Check fields that were read; messages name `where` they are from.

    Raises:
        CheckpointError: One cannot be what it is.
    """
    try:
        schema.model_validate(fields)
    except ValidationError as error:
        problem = error.errors()[0]
        name = ".".join(str(step) for step in problem["loc"] if step in fields or isinstance(step, int))
        name = name or ".".join(map(str, problem["loc"]))
        value = repr(problem["input"])
        shown = value if len(value) <= 60 else value[:57] + "..."
        message = problem["msg"].removeprefix("Value error, ")
        said = f"{name} is {shown}. {message.replace('Input should', 'It should')}" if name else message
        raise CheckpointError(f"{where}: {said}. Get the file from its origin again.") from None


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"it gives {next(name for name in names if names.count(name) > 1)!r} twice")
    return fields

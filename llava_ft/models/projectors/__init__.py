"""The projectors, from vision features to word-embedding space, by `mm_projector_type`."""

from llava_ft.errors import UserError
from llava_ft.models.projectors.mlp import IDENTITY, LINEAR, MLP
from llava_ft.models.projectors.projector import ProjectorType

_PROJECTORS: list[ProjectorType] = []


def register_projector(projector: ProjectorType) -> None:
    """Make a type of projector known."""
    _PROJECTORS.append(projector)


def find_projector(name: str) -> ProjectorType:
    """Return the type that `mm_projector_type` names.

    Raises:
        UserError: There is none of that name.
    """
    for projector in _PROJECTORS:
        if projector.pattern.fullmatch(name):
            return projector
    known = ", ".join(projector.name for projector in _PROJECTORS)
    raise UserError(f"mm_projector_type={name}: unknown projector. Allowed: {known}. LLaVA v1.5 uses mlp2x_gelu.")


for _projector in (LINEAR, IDENTITY, MLP):
    register_projector(_projector)

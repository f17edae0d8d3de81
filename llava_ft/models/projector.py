"""The projector: from vision features to word-embedding space.

Source: `llava/model/multimodal_projector/builder.py`; the two-layer MLP is LLaVA 1.5's (arXiv:2310.03744, section 3).
"""

from torch import nn

from llava_ft.models.config import projector_depth


def build_projector(projector_type: str, mm_hidden_size: int, hidden_size: int) -> nn.Module:
    """Make a projector from width `mm_hidden_size` to width `hidden_size`.

    `linear` is one layer named `mm_projector`; `mlpNx_gelu` has its layers at the even positions 0, 2, ... of a
    sequence, with GELU between them.

    Raises:
        UserError: The type is unknown. (That `identity` joins equal widths is checked with the configuration.)
    """
    depth = projector_depth(projector_type)
    if projector_type == "linear":
        return nn.Linear(mm_hidden_size, hidden_size)
    if depth == 0:
        return nn.Identity()
    layers: list[nn.Module] = [nn.Linear(mm_hidden_size, hidden_size)]
    for _ in range(depth - 1):
        layers += [nn.GELU(), nn.Linear(hidden_size, hidden_size)]
    return nn.Sequential(*layers)

"""The original's projectors: linear layers with GELU between them, one alone, or none.

Source: `llava/model/multimodal_projector/builder.py`; the two-layer MLP is LLaVA 1.5's (arXiv:2310.03744, section 3).
"""

import re

from torch import nn

from llava_ft.models.projectors.projector import ProjectorType

_MLP = re.compile(r"mlp([1-9]\d?)x_gelu")


def _linear(name: str, width_in: int, width_out: int) -> nn.Module:
    return nn.Linear(width_in, width_out)


def _identity(name: str, width_in: int, width_out: int) -> nn.Module:
    return nn.Identity()


def _mlp(name: str, width_in: int, width_out: int) -> nn.Module:
    match = _MLP.fullmatch(name)
    assert match is not None
    layers: list[nn.Module] = [nn.Linear(width_in, width_out)]
    for _ in range(int(match[1]) - 1):  # layers are at the even positions, as in the original's files
        layers += [nn.GELU(), nn.Linear(width_out, width_out)]
    return nn.Sequential(*layers)


LINEAR = ProjectorType("linear", re.compile("linear"), _linear)
IDENTITY = ProjectorType("identity", re.compile("identity"), _identity, keeps_width=True)
MLP = ProjectorType("mlpNx_gelu with N from 1 to 99", _MLP, _mlp)

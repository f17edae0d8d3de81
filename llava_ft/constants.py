"""Names and sentinel values shared by data and models. Spelled as in LLaVA (`llava/constants.py`)."""

import re
from collections.abc import Mapping
from typing import Any, Final

IGNORE_INDEX: Final = -100
"""Label of a position that the loss does not count."""

IMAGE_TOKEN_INDEX: Final = -200
"""Entry of `input_ids` whose embedding is taken from an image feature, not from the vocabulary."""

IMAGE_TOKEN: Final = "<image>"
"""Where an image stands in the text of a record."""

IM_START_TOKEN: Final = "<im_start>"
IM_END_TOKEN: Final = "<im_end>"
"""Vocabulary entries put around each image with `mm_use_im_start_end`."""

IM_PATCH_TOKEN: Final = "<im_patch>"
"""Vocabulary entry that `mm_use_im_patch_token` adds. It is never put into a prompt; old checkpoints have its row."""

ORIGINAL_DEFAULTS: Final[Mapping[str, Any]] = {
    "mm_projector_type": "linear",
    "mm_vision_select_layer": -1,
    "mm_vision_select_feature": "patch",
    "mm_patch_merge_type": "flat",
    "mm_use_im_start_end": False,
    "mm_use_im_patch_token": False,
    "image_aspect_ratio": "square",
}
"""What holds when neither the user nor a LLaVA checkpoint says otherwise.

The values are original LLaVA's but for `mm_use_im_patch_token`: true there, and switched off in every published command
since v1, because the entry it adds to the vocabulary is never used.
"""

CHECKPOINT_FIELDS: Final = (*ORIGINAL_DEFAULTS, "image_grid_pinpoints", "s2_scales")
"""What a LLaVA checkpoint settles where the user does not. The last two follow from the vision tower by default."""

ASPECT_RATIO_PATTERN: Final = re.compile(r"square|pad|anyres|anyres_max_([1-9]\d*)")
"""Every way to bring an image into the tower's shape; the number of `anyres_max_N` bounds its tokens."""

"""Names and sentinel values shared by data and models. Spelled as in LLaVA (`llava/constants.py`)."""

from typing import Final

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

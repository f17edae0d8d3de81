"""Placing image features among word embeddings.

The idea, with one image of three tokens: the data side has already written one `IMAGE_TOKEN_INDEX` (-200) per image
token, so placing the features is one masked scatter and the sequence keeps its length::

    input_ids       [ 1, -200, -200, -200, 57,  9 ]
    inputs_embeds   [ e1,  f1,   f2,   f3, e57, e9 ]

Source: `prepare_inputs_labels_for_multimodal` of `llava/model/llava_arch.py`, which instead splices sequences of
different lengths inside the model.

Shapes: B samples, T positions, D width, S image positions in the batch.
"""

import torch

from llava_ft.constants import IMAGE_TOKEN_INDEX


def image_positions(input_ids: torch.Tensor) -> torch.Tensor:
    """Return a `(B, T)` bool mask of the positions that take an image feature."""
    return input_ids == IMAGE_TOKEN_INDEX


def scatter_image_features(
    inputs_embeds: torch.Tensor, image_features: torch.Tensor, image_mask: torch.Tensor
) -> torch.Tensor:
    """Put image features at the image positions.

    Args:
        inputs_embeds: `(B, T, D)` word embeddings; what stands at image positions is ignored.
        image_features: `(S, D)` in reading order: sample by sample, left to right.
        image_mask: `(B, T)` bool with S true entries.

    Returns:
        `(B, T, D)` in the dtype of `inputs_embeds`.

    Raises:
        ValueError: The number of features is not the number of image positions.
    """
    num_positions = int(image_mask.sum())
    if num_positions != image_features.shape[0]:
        raise ValueError(
            f"{image_features.shape[0]} image features for {num_positions} image positions. input_ids must hold one "
            f"{IMAGE_TOKEN_INDEX} for each image token, in the order of the images."
        )
    mask_BT1 = image_mask.unsqueeze(-1)
    return inputs_embeds.masked_scatter(mask_BT1, image_features.to(inputs_embeds.dtype))

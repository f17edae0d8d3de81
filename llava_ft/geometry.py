"""How many positions of the language model an image takes: the one fact that data and models share."""

from llava_ft.errors import UserError

SELECT_FEATURES = ("patch", "cls_patch")
"""Known values of `mm_vision_select_feature`: patches only, or the class token and the patches."""


def num_image_tokens(image_size: int, patch_size: int, select_feature: str = "patch") -> int:
    """Count the features that a vision tower gives for one image of `image_size` x `image_size` pixels.

    Args:
        image_size: Side of the square that goes into the tower, in pixels.
        patch_size: Side of one patch, in pixels. Pixels beyond the last whole patch are not seen, as in CLIP.
        select_feature: "patch", or "cls_patch" to count the class token too.

    Returns:
        The number of features, each of which takes one position of the language model.

    Raises:
        UserError: A size is not positive, the patch is larger than the image, or `select_feature` is unknown.
    """
    if select_feature not in SELECT_FEATURES:
        known = " or ".join(map(repr, SELECT_FEATURES))
        raise UserError(f"mm_vision_select_feature is {select_feature!r}; it can be {known}.")
    if patch_size < 1 or image_size < patch_size:
        raise UserError(
            f"A vision tower with image_size {image_size} and patch_size {patch_size} has no patches; "
            "patch_size must be at least 1 and at most image_size."
        )
    patches = (image_size // patch_size) ** 2
    return patches + 1 if select_feature == "cls_patch" else patches

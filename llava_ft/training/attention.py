"""The attention kernel of a run, once its model is known."""

import logging
from typing import Any

from llava_ft.args import ParsedArgs
from llava_ft.errors import UserError
from llava_ft.models.attention.limits import limit

logger = logging.getLogger(__name__)


def settle_attention(args: ParsedArgs, config: Any) -> ParsedArgs:
    """Check that the kernel goes with the model; where `auto` took one that does not, use sdpa.

    Args:
        args: The request.
        config: The model's configuration.

    Returns:
        The request, with a kernel that goes with the model.

    Raises:
        UserError: A kernel was named that does not.
    """
    kernel = args.attn_implementation
    reason = limit(kernel, config)
    if reason is None:
        return args
    if args.model.attn_implementation != "auto":
        raise UserError(
            f"attn_implementation={kernel} does not go with this model: {reason}. sdpa and eager go with every model. "
            "Use auto, which takes sdpa here."
        )
    logger.info("attn_implementation=auto takes sdpa instead of %s for this model: %s.", kernel, reason)
    return args.with_attention("sdpa")

"""In which dtype matrix products are computed."""

import torch


def compute_dtype(tensor: torch.Tensor) -> torch.dtype:
    """Return the dtype of products with a tensor: autocast's where it is on for the tensor's device, else its own."""
    device = tensor.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else tensor.dtype

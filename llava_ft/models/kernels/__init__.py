"""Faster ways to compute what a family's decoder layers compute, each written for one form of layer.

A family names the form of its layers (`Family.layer_form`). Without one its layers run as transformers has them.
"""


class ReadsChosenPositions:
    """A decoder layer whose output can be asked for at chosen positions, `read_positions`."""

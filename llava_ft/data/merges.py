"""The order in which SentencePiece puts pieces together, for tokenizers that know merges and no scores."""

from collections.abc import Mapping
from typing import Any, Final

SPIECE_BLANK: Final = "▁"
"""How SentencePiece writes a space."""

_META_BLANKS: Final = 259
"""Id of two blanks in the vocabulary of LLaMA and LLaMA 2, which Vicuna has too."""


def merges_by_score(scores: Mapping[str, float]) -> list[tuple[str, str]]:
    """List every way to put two pieces together, in the order in which SentencePiece prefers them.

    SentencePiece joins the neighbours whose union has the highest score, the leftmost on a tie. Scores tie
    among runs of blanks, where "leftmost" means that the run grows from its left end: longer left part first.
    """
    merges = [
        (-score, -position, piece[:position], piece[position:])
        for piece, score in scores.items()
        for position in range(1, len(piece))
        if piece[:position] in scores and piece[position:] in scores
    ]
    merges.sort(key=lambda merge: merge[:2])
    return [(left, right) for _, _, left, right in merges]


def order_merges_of_meta(model: Any) -> None:
    """Put the merges of Meta's vocabulary into SentencePiece's order, in place; any other model is left as it is.

    transformers 5 writes them in the order of their ids, which is that of the scores but for runs of blanks: these have
    the lowest score of all, and grow from their left end. The file does not hold the scores.
    """
    try:
        if model["vocab"][SPIECE_BLANK * 2] != _META_BLANKS:
            return
        merges = [tuple(each.split(" ")) if isinstance(each, str) else tuple(each) for each in model["merges"]]
        rank = {left + right: index for index, (left, right) in reversed(list(enumerate(merges)))}
    except (KeyError, TypeError, ValueError):
        return  # `Tokenizer.from_str` says what is wrong with it
    runs = [merge for merge in merges if not "".join(merge).strip(SPIECE_BLANK)]
    others = [merge for merge in merges if "".join(merge).strip(SPIECE_BLANK)]
    others.sort(key=lambda merge: (rank["".join(merge)], -len(merge[0])))
    model["merges"] = [list(merge) for merge in others + sorted(runs, key=lambda merge: -len(merge[0]))]

"""Lengths shaped like those of the instruction mixture that LLaVA v1.5 is trained on.

The sources and how many records each has are those of table 7 of the paper (arXiv:2310.03744), and so is whether there
are images. Turns per record follow from the questions per image of each source (VQAv2 5.4, GQA 13, OCR-VQA 10, Visual
Genome and RefCOCO regions joined to one conversation of about 10); how many tokens a turn has is an estimate from the
answer formats (a word, a box of four numbers, a sentence). 40 tokens of system prompt stand before each record.
"""

import numpy as np

SYSTEM_PROMPT = 40

# Source: thousands of records, has images, mean turns, tokens per turn. A spread instead of turns means free text.
SOURCES = {
    "LLaVA": (158, True, None, (230, 0.55)),
    "ShareGPT": (40, False, None, (900, 1.1)),
    "VQAv2": (83, True, 5.4, 18),
    "GQA": (72, True, 13, 18),
    "OKVQA": (9, True, 1.1, 30),
    "OCR-VQA": (80, True, 10, 24),
    "A-OKVQA": (66, True, 1, 65),
    "TextCaps": (22, True, 1, 85),
    "RefCOCO": (48, True, 7.5, 45),
    "Visual Genome": (86, True, 10, 45),
}


def mixture_lengths(num_samples, *, max_length, tokens_per_image=576, seed=0, signed=False):
    """Draw lengths in tokens, cut off at `max_length`; with `signed` negative for a sample without images."""
    rng = np.random.default_rng(seed)
    shares = np.array([size for size, *_ in SOURCES.values()], dtype=float)
    sources = rng.choice(len(SOURCES), num_samples, p=shares / shares.sum())
    lengths = np.empty(num_samples, dtype=np.int64)
    for number, (_, has_images, num_turns, tokens) in enumerate(SOURCES.values()):
        chosen = np.flatnonzero(sources == number)
        if num_turns is None:
            median, spread = tokens
            text = rng.lognormal(np.log(median), spread, len(chosen))
        else:
            turns = 1 + rng.poisson(num_turns - 1, len(chosen))
            text = turns * tokens * rng.lognormal(0, 0.15, len(chosen))
        lengths[chosen] = SYSTEM_PROMPT + has_images * tokens_per_image + text
    lengths = np.minimum(lengths, max_length)
    text_only = [number for number, (_, has_images, *_) in enumerate(SOURCES.values()) if not has_images]
    return np.where(np.isin(sources, text_only), -lengths, lengths) if signed else lengths

"""Where records come from. `open_source` opens one source, `open_mixture` reads what several are mixed by."""

from llava_ft.data.sources.base import RecordSource
from llava_ft.data.sources.mixture import Mixture, MixtureEntry, open_mixture, with_prompt_prefix
from llava_ft.data.sources.open import is_mixture, open_source
from llava_ft.data.sources.selection import Selection, select_rows

__all__ = [
    "Mixture",
    "MixtureEntry",
    "RecordSource",
    "Selection",
    "is_mixture",
    "open_mixture",
    "open_source",
    "select_rows",
    "with_prompt_prefix",
]

"""Where records come from. `open_source` is the one entry."""

from llava_ft.data.sources.base import RecordSource
from llava_ft.data.sources.open import open_source

__all__ = ["RecordSource", "open_source"]

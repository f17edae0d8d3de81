"""Where records come from. `open_source` opens one source, `open_mixture` several that are mixed."""

from llava_ft.data.sources.base import RecordSource
from llava_ft.data.sources.open import is_mixture, open_source

__all__ = ["RecordSource", "is_mixture", "open_source"]

"""How a run reads its data: what looking at data takes of a request. No weights."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from llava_ft.data.image_files import ImagePlace
from llava_ft.data.preparation.image_facts import ImageChecks
from llava_ft.data.preparation.prepare import PreparationSettings
from llava_ft.data.preparation.samples import lay_out
from llava_ft.data.preparation.truncation import Limits, TokenLayout
from llava_ft.data.records import Sample
from llava_ft.data.sources.base import RecordSource
from llava_ft.data.tokenize import SampleTokenizer, TokenizedSample
from llava_ft.geometry import SizeWH


@dataclass(frozen=True)
class DataPlan:
    """How a run reads its data.

    Attributes:
        tokenize: Makes ids and labels of a record.
        limits: How long a record may be, and how many tokens an image has.
        checks: What the run finds out about images before it trains.
        image_folder: Folder of images, for sources without one of their own.
        preparation: Where prepared records are kept, and how many processes work.
    """

    tokenize: SampleTokenizer
    limits: Limits
    checks: ImageChecks
    image_folder: str | None = None
    preparation: PreparationSettings = field(default_factory=PreparationSettings)

    def place_of(self, source: RecordSource) -> ImagePlace:
        """Say where the images of a source are."""
        return ImagePlace(source.image_folder or self.image_folder, source)

    def layout(self, sample: Sample, tokens: TokenizedSample, sizes_wh: Sequence[SizeWH | None]) -> TokenLayout:
        """Lay out one record, to be judged; sizes of images may be None where nothing depends on them."""
        geometry = self.limits.geometry
        return lay_out(sample, tokens, [geometry.num_tokens(size) if geometry else 0 for size in sizes_wh])

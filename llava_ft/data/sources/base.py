"""What every source of records can do: name its state, be prepared once, and give records and images by number.

A source yields raw records, as they are written; `llava_ft.data.records.parse_record` checks them. It is small when
pickled, so that processes which read different parts of it each get their own copy.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path

from llava_ft.data.records import DataUri, EmbeddedImage, decode_content, embedded_name, image_values


class RecordSource(ABC):
    """Records in a fixed order, with the images that are stored beside them.

    Attributes:
        name: Path or name of the data set, for messages.
        image_folder: Folder of the images that the records name by path; None means the run's.
    """

    name: str
    image_folder: str | None

    def __init__(self, name: str, image_folder: str | None = None):
        self.name = name
        self.image_folder = image_folder

    @abstractmethod
    def fingerprint(self) -> str:
        """Give a short text that changes whenever a record or an image in the source may have changed.

        Raises:
            UserError: The source is missing or cannot be read.
        """

    @abstractmethod
    def prepare(self, cache_dir: Path) -> None:
        """Build what reading by number needs, once, and keep it in `cache_dir` under the fingerprint.

        Raises:
            UserError: The source is missing, damaged or empty.
        """

    @abstractmethod
    def __len__(self) -> int:
        """Number of records. Only known after `prepare`."""

    @abstractmethod
    def read(self, start: int, stop: int) -> Iterator[object]:
        """Give the raw records `start` to `stop - 1` in order, with only a few of them in memory at a time.

        Raises:
            UserError: The source changed since it was prepared.
        """

    def image_bytes(self, index: int, position: int) -> bytes:
        """Give the file content of an image that the source holds itself.

        Args:
            index: Number of the record.
            position: Which of the record's images, counted from 0; both numbers as in `embedded_name`.

        Raises:
            ImageError: The image is damaged or not there any more.
            UserError: The source changed since it was prepared.
        """
        (record,) = self.read(index, index + 1)
        value = image_values(record, index)[position]
        assert not isinstance(value, str), "an image given by path is not in the source"
        name = f"{embedded_name(index, position)} of {self.name}"
        return self._image_content(index, value, name)

    def _image_content(self, index: int, value: EmbeddedImage | bytes | DataUri, name: str) -> bytes:
        """Give the content of a record's image. A source whose `read` leaves images where they are reads those here."""
        assert not isinstance(value, EmbeddedImage), "this source gives its images with the records"
        return decode_content(value, name)

"""What a check found, in the order of how bad it is, with what to do about it."""

from dataclasses import dataclass
from typing import Final, Literal, get_args

from llava_ft.data.records import parse_embedded
from llava_ft.data.report import BadSamplePolicy
from llava_ft.inspection.check_source import LONG_RATIO, NUM_EXAMPLES, TINY_SIDE, Example, SourceCheck

Severity = Literal["error", "warning", "note"]
SEVERITIES: Final[tuple[Severity, ...]] = get_args(Severity)
"""Would stop or spoil a run; probably not meant; good to know."""


@dataclass(frozen=True)
class Finding:
    """Records with one thing in common, and what to do about it; the keys are those of the JSON report."""

    severity: Severity
    kind: str  # a short, stable name
    title: str
    advice: str
    num_records: int  # for `same-image` images instead
    examples: list[Example]  # the first of them


_RECORD: Final = "Correct the records; docs/reference/data-format.md has the format."
_FILE: Final = "Replace the files, or leave the records out."
_LONG: Final = "Raise model_max_length or shorten the records."

UNUSABLE: Final[dict[str, tuple[str, str]]] = {
    "not-an-object": ("the record is not an object", _RECORD),
    "bad-member": ("a sample of a tar shard is incomplete or cannot be read", "Write the shard again."),
    "bad-id": ("the id is neither a string nor a number", _RECORD),
    "bad-image": ("the image is not given as a path or as content", _RECORD),
    "missing-conversations": ("there are no turns", _RECORD),
    "bad-conversations": ("the turns are not a list, or given twice", _RECORD),
    "empty-conversation": ("the list of turns is empty", _RECORD),
    "bad-turn": ("a turn is incomplete or not an object", _RECORD),
    "bad-part": ("a part of a message is neither text nor an image", _RECORD),
    "tool-turn": ("a turn calls a tool or is from one", "Leave the records out: nothing trains on tools here."),
    "unknown-media": (
        "a record has video, sound, or another program's mark for a picture",
        "Leave the records out, or write <image> and the picture's path: as they are they would be learnt as text.",
    ),
    "bad-weight": ("a weight is neither 0 nor 1, or not on an answer", _RECORD),
    "bad-text": ("a text is not a string, or holds half a character", _RECORD),
    "unknown-role": ("a turn is from nobody known", "Write human, gpt or system; --fix does it where it is clear."),
    "roles-not-alternating": ("two turns of one role follow each other", "Join the two, or leave one out."),
    "misplaced-system": ("a system turn is not the first", "Move it to the front, or leave it out."),
    "no-human-turn": ("nobody asks anything", _RECORD),
    "placeholder-mismatch": (
        "not as many <image> as images",
        "Write one <image> for each image; --fix does it for one image without any.",
    ),
    "image-in-answer": ("<image> stands in an answer", "Move it into a question, or leave it out."),
    "image-in-system": ("<image> stands in the system text", "Move it into a question, or leave it out."),
    "no-supervised-token": ("there is nothing to learn", "Give answers, or leave the records out."),
    "truncated-answer": ("model_max_length cuts off every answer", _LONG),
    "too-long": ("longer than model_max_length", f"{_LONG[:-1]}, or pass --truncation truncate."),
    "empty-first-question": ("the first question is empty, which the template cannot write", _RECORD),
    "plain-format": ("not one question with <image> and one answer", "Leave it out or choose another --version."),
    "image-missing": ("an image file is not there", "Check --image_folder, or bring the files."),
    "image-not-a-file": ("an image is a directory, pipe or device", "Give the path of the file."),
    "image-empty": ("an image file is empty", _FILE),
    "image-unreadable": ("an image file cannot be read", "Check its permissions and its disk."),
    "image-corrupt": ("an image is damaged or no image at all", _FILE),
    "image-format": ("an image is in a format that is not read", "Convert the files to PNG or JPEG."),
    "image-truncated": ("an image ends too early", _FILE),
    "image-too-large": ("an image has too many pixels to be decoded", "Make it smaller."),
    "image-crash": ("an image ends the process that decodes it", _FILE),
    "image-outside-folder": ("a path leaves the image folder", "Give an absolute path if that is meant."),
    "image-without-folder": ("a relative path without image folder", "Pass --image_folder."),
    "image-is-url": ("an image is an address", "Download it and give the path of the file."),
}
"""What makes a record unusable: what it is, and what to do."""

REMARKS: Final[dict[str, tuple[Severity, str, str]]] = {
    "empty-answer": ("warning", "an answer is empty", "Write it, or leave the exchange out: it teaches nothing."),
    "answer-repeats-question": ("warning", "an answer is its question, word for word", "Look at them."),
    "stop-marker-in-answer": (
        "warning",
        "an answer holds the marker that ends answers",
        "Take it out: the model would learn to stop there.",
    ),
    "duplicate-record": (
        "warning",
        "the same texts and images as an earlier record",
        "Leave it out, unless it is meant to count twice.",
    ),
    "long-image": (
        "warning",
        f"an image is more than {LONG_RATIO} times as long as wide",
        "Look at it: little of it is left at the size that the model sees.",
    ),
    "tiny-image": ("note", f"an image has a side of less than {TINY_SIDE} pixels", "Look at it."),
    "repeated-id": ("note", "the id of an earlier record", "Nothing has to be done; messages name both by it."),
    "dropped": ("warning", "records longer than model_max_length are left out", _LONG),
    "cut-off": (
        "warning",
        "records are cut off at model_max_length",
        "Raise model_max_length if the answers at the end matter.",
    ),
    "same-image": ("note", "one picture under several names", "Nothing has to be done."),
}
"""What is remarked upon in other records."""


def find_all(check: SourceCheck, on_bad_sample: BadSamplePolicy) -> list[Finding]:
    """List what was found, the worst first, then by number of records.

    With `on_bad_sample` "skip" errors that the run finds before training are warnings, if some records are left.
    """
    findings: list[Finding] = []
    for kind, tally in check.errors.items():
        title, advice = UNUSABLE.get(kind, (kind.replace("-", " "), _RECORD))
        is_left_out = on_bad_sample == "skip" and not tally.num_late and len(check.columns["index"]) > 0
        if tally.num_late:
            advice += " A run notices it before training only with --check_images decode."
        severity: Severity = "warning" if is_left_out else "error"
        findings.append(Finding(severity, kind, title, advice, len(tally.indices), tally.examples))
    others = {kind: (len(tally.indices), tally.examples) for kind, tally in check.remarks.items()}
    others["dropped"] = len(check.dropped.indices), check.dropped.examples
    others["cut-off"] = _cut_off(check)
    others["same-image"] = _same_images(check)
    for kind, (count, examples) in others.items():
        if count:
            severity, title, advice = REMARKS[kind]
            findings.append(Finding(severity, kind, title, advice, count, examples))
    return sorted(findings, key=lambda each: (SEVERITIES.index(each.severity), -each.num_records, each.kind))


def _cut_off(check: SourceCheck) -> tuple[int, list[Example]]:
    """Count the records that are cut off; name those that lose most."""
    columns = check.columns
    lost = columns["tokens"] - columns["kept_tokens"]
    cut = lost.nonzero()[0]
    examples: list[Example] = []
    for row in cut[lost[cut].argsort(kind="stable")[::-1]][:NUM_EXAMPLES].tolist():
        values = {name: int(column[row]) for name, column in columns.items()}
        reason = (
            f"{values['kept_tokens']} of {values['tokens']} tokens, {values['kept_answers']} of {values['answers']} "
            f"answers and {values['kept_images']} of {values['images']} images stay."
        )
        examples.append(Example(values["index"], check.rows.sample_id(values["index"]), reason))
    return len(cut), examples


def _same_images(check: SourceCheck) -> tuple[int, list[Example]]:
    """Count the names of images whose content has an earlier name."""
    names: dict[int, list[str]] = {}
    for name, decoded in zip(check.images.names, check.images.decoded, strict=True):
        if decoded.content_key and parse_embedded(name) is None:
            names.setdefault(decoded.content_key, []).append(name)
    several = [paths for paths in names.values() if len(paths) > 1]
    return sum(len(paths) - 1 for paths in several), [Example(-1, "", " = ".join(paths[:4])) for paths in several[:5]]

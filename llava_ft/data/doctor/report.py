"""What a check says about each data set of a run, as one value, and as JSON."""

from dataclasses import asdict, dataclass
from typing import Any, Final

from llava_ft.data.doctor.check import SourceCheck
from llava_ft.data.doctor.findings import SEVERITIES, Finding
from llava_ft.data.doctor.statistics import Epoch, Statistics

JSON_FORMAT: Final = 1


@dataclass(frozen=True)
class DataSetReport:
    """What was found in one data set.

    Attributes:
        name: Its path or name.
        use: What the run uses it for: "training" or "validation".
        check: What was found, record by record.
        findings: The same in words, the worst first.
        statistics: The same in numbers.
    """

    name: str
    use: str
    check: SourceCheck
    findings: list[Finding]
    statistics: Statistics


@dataclass(frozen=True)
class FixReport:
    """What was written by a repair.

    Attributes:
        path: The file.
        written: Records in it.
        left_out: Unusable records that are not, by kind.
        repaired: Records that were changed, by repair; the positions of the first ones.
        repaired_counts: How many they are.
    """

    path: str
    written: int
    left_out: dict[str, int]
    repaired: dict[str, list[int]]
    repaired_counts: dict[str, int]


@dataclass(frozen=True)
class Report:
    """What was found in all data of a run.

    Attributes:
        data_sets: One for each source, the training data first.
        epoch: What an epoch of the training data is made of; None without a usable record.
        fix: What was written, if that was asked for.
        refused: Why a run would be refused although each source has usable records, "" if it would not.
    """

    data_sets: list[DataSetReport]
    epoch: Epoch | None
    fix: FixReport | None = None
    refused: str = ""

    @property
    def passed(self) -> bool:
        """Whether nothing was found that would stop or spoil a run."""
        return not self.counts["error"] and not self.refused

    @property
    def counts(self) -> dict[str, int]:
        """Number of findings by severity."""
        found = [finding.severity for data in self.data_sets for finding in data.findings]
        return {severity: found.count(severity) for severity in SEVERITIES}

    def to_dict(self) -> dict[str, Any]:
        """Give the report as JSON values. `docs/check_data.md` describes the keys."""
        return {
            "format": JSON_FORMAT,
            "passed": self.passed,
            "data_sets": [
                {
                    "name": data.name,
                    "use": data.use,
                    "statistics": data.statistics.to_dict(),
                    "findings": [finding.to_dict() for finding in data.findings],
                }
                for data in self.data_sets
            ],
            "epoch": asdict(self.epoch) if self.epoch else None,
            "fix": asdict(self.fix) if self.fix else None,
            "refused": self.refused or None,
        }

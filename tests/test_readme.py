"""What the README and the pages in docs/ name is there."""

import re
from pathlib import Path

import pytest

from llava_ft import cli
from llava_ft.args import parse_args
from llava_ft.args.flags import all_flags
from llava_ft.args.legacy import SPELLINGS

REPO = Path(__file__).parents[1]
PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    *sorted(page.relative_to(REPO).as_posix() for page in (REPO / "docs").rglob("*.md")),
]
NAMING_PAGES = ("llava_ft", "scripts", "benchmarks", "tests", "configs")
BESIDE_THE_ARGUMENTS = {"config", "print_config", "json"}
"""Flags that are read before the arguments of a run are."""


def read(page: str) -> str:
    return (REPO / page).read_text(encoding="utf-8")


def test_the_file_tree_is_that_of_the_package():
    block = re.findall(r"^```\n(llava_ft/ .*?)^```$", read("docs/internals/file-tree.md"), re.S | re.M)[0]
    listed: list[str] = []
    folders: list[str] = []
    for line in block.splitlines():
        name = line.split()[0]
        depth = (len(line) - len(line.lstrip())) // 2
        folders = [*folders[:depth], name] if name.endswith("/") else folders[:depth]
        listed.append("".join(folders) if name.endswith("/") else "".join(folders) + name)
    package = REPO / "llava_ft"
    modules = {path.relative_to(REPO).as_posix() for path in package.glob("*.py")}
    directories = {path.parent.relative_to(REPO).as_posix() + "/" for path in package.rglob("*.py")}
    assert len(listed) == len(set(listed))
    assert set(listed) == modules | directories


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```$|^    [^\n]*$", "", text, flags=re.S | re.M)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str):
    for link in re.findall(r"""\]\(([^)]+)\)|<img [^>]*src="([^"]+)\"""", without_code(read(page))):
        link = link[0] or link[1]
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        target = (REPO / page).parent / path if path else REPO / page
        assert target.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), re.M)
            anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in anchors, link


def test_the_index_lists_every_page_once():
    linked = re.findall(r"\]\(((?:start|how-to|reference|internals)/[^)#]+)\)", read("docs/README.md"))
    pages = [page.removeprefix("docs/") for page in PAGES if page.startswith("docs/") and page != "docs/README.md"]
    assert sorted(linked) == pages


@pytest.mark.parametrize("folder", NAMING_PAGES)
def test_pages_that_files_name_exist(folder: str):
    """In messages, docstrings and tests, as a path from the root of the repository."""
    for file in sorted((REPO / folder).rglob("*")):
        if file.suffix not in {".py", ".sh", ".yaml", ".md"}:
            continue
        for page in re.findall(r"\bdocs/[\w/-]+\.md", file.read_text(encoding="utf-8")):
            assert page in PAGES, f"{file.relative_to(REPO)}: {page}"


@pytest.mark.parametrize("page", [page for page in PAGES if page != "CHANGELOG.md"])
def test_files_that_pages_name_exist(page: str):
    """As a path from the root of the repository or from the package; `llava/` is the original's."""
    for path in re.findall(r"(?<![\w/.-])((?:\w+/)+\w+\.py)\b", read(page)):
        if not path.startswith("llava/"):
            assert (REPO / path).exists() or (REPO / "llava_ft" / path).exists(), f"{page} names {path}"
    for path, name in re.findall(r"`([\w/]+\.py)`: `([\w.]+)`", read(page)):
        code = (REPO / "llava_ft" / path).read_text(encoding="utf-8")
        assert re.search(rf"\b(?:def|class) {name.split('.')[-1]}\b", code), f"{page} names {name} of {path}"


OF_LAUNCHERS = {"--num_gpus", "--nproc-per-node"}


def flags_of_commands(capsys: pytest.CaptureFixture[str]) -> set[str]:
    for command in (cli.plan, cli.check_data, cli.merge, cli.export, cli.generate, cli.chat):
        with pytest.raises(SystemExit):
            command(["--help"])
    with pytest.raises(SystemExit):
        cli.inspect(["data", "--help"])
    return set(re.findall(r"--[a-z][\w-]*", capsys.readouterr().out))


@pytest.mark.parametrize(
    "page",
    [
        "README.md",
        "docs/start/quick-start.md",
        "docs/start/your-own-data.md",
        "docs/start/coming-from-llava.md",
        "docs/how-to/resume.md",
        "docs/reference/checkpoint-layout.md",
        "docs/reference/commands.md",
        "docs/reference/differences.md",
    ],
)
def test_flags_exist(page: str, capsys: pytest.CaptureFixture[str]):
    of_commands = flags_of_commands(capsys)
    of_training = set(all_flags()) | set(SPELLINGS) | BESIDE_THE_ARGUMENTS
    for flag in re.findall(r"(?<![\w-])--[a-z][\w-]*", read(page)):
        assert flag in of_commands | OF_LAUNCHERS or flag[2:].replace("-", "_") in of_training, flag


def test_configurations_exist():
    named = set(re.findall(r"--config (\w+\.yaml)", read("README.md"))) | set(
        re.findall(r"\(configs/(\w+\.yaml)\)", read("README.md"))
    )
    assert named == {path.name for path in (REPO / "configs").glob("*.yaml")}


def test_training_commands_parse():
    blocks = re.findall(r"(?:^    .*\n)+", read("README.md"), re.M)
    commands = [
        " ".join(line.strip().removesuffix("\\") for line in block.splitlines()).replace('"', "").split()
        for block in blocks
        if "train.py" in block.splitlines()[0]
    ]
    assert len(commands) == 3
    for command in commands:
        args = parse_args(command[command.index("train.py") + 1 :])
        assert args.flags.lora_enable
        assert args.flags.lora_r == 128

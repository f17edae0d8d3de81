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
    *(f"docs/{page.name}" for page in (REPO / "docs").glob("*.md")),
]
BESIDE_THE_ARGUMENTS = {"config", "print_config", "json"}
"""Flags that are read before the arguments of a run are."""


def read(page: str) -> str:
    return (REPO / page).read_text(encoding="utf-8")


def test_the_file_tree_is_that_of_the_package():
    block = re.findall(r"^```\n(llava_ft/ .*?)^```$", read("README.md"), re.S | re.M)[0]
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


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str):
    for link in re.findall(r"\]\(([^)]+)\)", read(page)):
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        target = (REPO / page).parent / path if path else REPO / page
        assert target.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), re.M)
            anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in anchors, link


OF_LAUNCHERS = {"--num_gpus", "--nproc-per-node"}


def flags_of_commands(capsys: pytest.CaptureFixture[str]) -> set[str]:
    for command in (cli.plan, cli.check_data, cli.merge, cli.export, cli.generate, cli.chat):
        with pytest.raises(SystemExit):
            command(["--help"])
    with pytest.raises(SystemExit):
        cli.inspect(["data", "--help"])
    return set(re.findall(r"--[a-z][\w-]*", capsys.readouterr().out))


@pytest.mark.parametrize("page", ["README.md", "docs/resume.md", "docs/checkpoint_layout.md", "docs/differences.md"])
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

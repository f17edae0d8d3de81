"""The shape of the package: which part may import which."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "llava_ft"
FILES = sorted(PACKAGE.rglob("*.py"))
MODULES = [file for file in FILES if file.name != "__init__.py"]

GROUND = {"constants", "digests", "errors", "json_files", "version", "geometry", "terminal"}
CONTENT = {"conversation", "data", "models"}
MIDDLE = {"tuning", "checkpoint"}
USE = {"training", "inference", "planning", "inspection", "convert"}
MAY_IMPORT = {
    **dict.fromkeys(GROUND, GROUND),
    "conversation": GROUND,
    "data": GROUND | {"conversation"},
    "models": GROUND | {"conversation"},
    "args": GROUND | {"conversation"},
    **dict.fromkeys(MIDDLE, GROUND | CONTENT | MIDDLE),
    "inference": GROUND | CONTENT | MIDDLE,
    "convert": GROUND | CONTENT | MIDDLE | {"inference"},
    "resolve": GROUND | CONTENT | MIDDLE | {"args"},
    "planning": GROUND | CONTENT | MIDDLE | {"args", "resolve"},
    "inspection": GROUND | CONTENT | MIDDLE | {"args", "resolve"},
    "training": GROUND | CONTENT | MIDDLE | {"args", "resolve", "convert"},
    "commands": GROUND | CONTENT | MIDDLE | USE | {"args", "resolve"},
    "cli": GROUND | USE | {"commands"},
    "__main__": {"cli"},
    "__init__": {"version", "inference"},
}
"""Parts of `llava_ft` that each part may import beside itself."""

NAMING_FAMILIES = (
    "models/families/",
    "models/towers/",
    "models/projectors/",
    "models/kernels/",
    "tuning/kernels/",
    # Layouts of other programs.
    *("checkpoint/hf/", "convert/hf", "convert/gguf", "convert/export_hf", "convert/export_gguf"),
    # Templates of that name; other programs' names of image processors and tokenizers.
    *("conversation.py", "data/image_processor.py", "data/tokenizer.py"),
)
"""Where families and towers may be named: everything else asks their registries."""


def parse(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"), filename=str(file))


def name_of(file: Path) -> str:
    return str(file.relative_to(PACKAGE.parent))


def part_of(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_parts(tree: ast.Module) -> Iterator[str]:
    """Parts of `llava_ft` that a module imports, anywhere in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            package, _, rest = name.partition(".")
            if package == "llava_ft":
                yield rest.partition(".")[0] or "__init__"


def imported_modules(tree: ast.Module) -> Iterator[str]:
    """Modules that a module imports when it runs, anywhere in it; what is imported for types alone is left out."""
    conditions = [node for node in ast.walk(tree) if isinstance(node, ast.If)]
    for_types = [node for node in conditions if ast.unparse(node.test) == "TYPE_CHECKING"]
    left_out = {inner for node in for_types for statement in node.body for inner in ast.walk(statement)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node not in left_out:
            yield from (str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names))


def calls(tree: ast.Module, function: str) -> list[ast.Call]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == function]


def test_every_part_has_a_place() -> None:
    assert {part_of(file) for file in FILES} == set(MAY_IMPORT)


@pytest.mark.parametrize("part", sorted(MAY_IMPORT))
def test_imports_point_one_way(part: str) -> None:
    offenders = [
        f"{name_of(file)} imports llava_ft.{imported}"
        for file in FILES
        if part_of(file) == part
        for imported in imported_parts(parse(file))
        if imported != part and imported not in MAY_IMPORT[part]
    ]
    assert not offenders, "\n".join(offenders)


def test_no_module_leads_back_to_itself() -> None:
    names = {".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts): file for file in MODULES}
    left = {name: {other for other in imported_modules(parse(file)) if other in names} for name, file in names.items()}
    while ground := [name for name, others in left.items() if not others & left.keys()]:
        for name in ground:
            del left[name]
    assert sorted(left) == []


def test_a_configuration_is_settled_in_one_place() -> None:
    settling = {name_of(file) for file in FILES if calls(parse(file), "settle_config")}
    assert settling == {"llava_ft/checkpoint/model.py"}


def test_every_module_says_what_it_is() -> None:
    assert [name_of(file) for file in MODULES if not ast.get_docstring(parse(file))] == []


def test_only_the_command_line_prints() -> None:
    printing = {name_of(file) for file in FILES if calls(parse(file), "print")}
    assert {name for name in printing if not name.startswith("llava_ft/commands/")} <= {"llava_ft/cli.py"}


def test_pickles_are_never_executed() -> None:
    offenders = [
        f"{name_of(file)}:{call.lineno}"
        for file in FILES
        for call in calls(parse(file), "torch.load")
        if "weights_only=True" not in [ast.unparse(keyword) for keyword in call.keywords]
    ]
    assert offenders == []


def words(identifier: str) -> set[str]:
    """`LlavaQwen2Config` and `clip_name` in words, lower case and without digits."""
    return {word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", identifier)}


def identifiers(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and name of everything that a module names, and of strings that are one name, such as a `model_type`."""
    for node in ast.walk(tree):
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.Name):
            yield line, node.id
        elif isinstance(node, ast.Attribute):
            yield line, node.attr
        elif isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield line, node.name
        elif isinstance(node, ast.arg | ast.keyword):
            yield line, node.arg or ""
        elif isinstance(node, ast.ImportFrom):
            yield from ((line, step) for step in (node.module or "").split("."))
        elif isinstance(node, ast.alias):
            yield from ((line, step) for step in (*node.name.split("."), node.asname or ""))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.isidentifier():
            yield line, node.value


def test_families_and_towers_are_named_in_their_places() -> None:
    offenders = [
        f"{name_of(file)}:{line} names {identifier}"
        for file in FILES
        if not name_of(file).removeprefix("llava_ft/").startswith(NAMING_FAMILIES)
        for line, identifier in identifiers(parse(file))
        if words(identifier) & {"llama", "qwen", "clip", "siglip"}
    ]
    assert not offenders, "\n".join(offenders)

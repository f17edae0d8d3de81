#!/usr/bin/env python3
"""Asks a model about held-out pictures, and compares its answers before and after training.

    python scripts/quickstart_report.py answer --model MODEL --data DIR --output answers.json
    python scripts/quickstart_report.py compare --before A.json --after B.json --data DIR --run DIR --output DIR

`compare` prints a table and writes report.html and report.json. It exits with 1 if the answers after training are not
good enough, or those before it were not bad enough to prove anything.
"""

import argparse
import base64
import html
import json
import re
import sys
from pathlib import Path
from string import Template as Page

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SHOWN = 10
LOWEST_AFTER, HIGHEST_BEFORE = 0.9, 0.3

PAGE = Page("""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>llava_ft quick start</title>
<style>
:root { color-scheme: light dark; --line: #8884; --soft: #8881; --good: #1a8a4a; --bad: #c0392b; --ink: #3566d6; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 46rem; margin: 2.5rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: .25rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
.lead { opacity: .75; margin-top: 0; }
.tiles { display: flex; gap: 1rem; flex-wrap: wrap; margin: 1.5rem 0; }
.tile { flex: 1 1 9rem; border: 1px solid var(--line); border-radius: .6rem; padding: .8rem 1rem; }
.tile b { display: block; font-size: 1.9rem; line-height: 1.2; } .tile span { opacity: .7; font-size: .9rem; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; padding: .45rem .6rem; border-bottom: 1px solid var(--line); vertical-align: middle; }
th { font-size: .85rem; opacity: .7; } td img { width: 56px; height: 56px; border-radius: 4px; display: block; }
.good { color: var(--good); font-weight: 600; } .bad { color: var(--bad); }
svg { width: 100%; height: auto; } svg text { font-size: 12px; fill: currentColor; opacity: .7; }
</style></head><body>
<h1>A tiny LLaVA learns to read digits</h1>
<p class="lead">LoRA and projector, trained on $num_train pictures of handwritten digits in $steps steps; asked about
$num_test others.</p>
<div class="tiles">
<div class="tile"><b>$before</b><span>right before training</span></div>
<div class="tile"><b>$after</b><span>right after training and merging</span></div>
<div class="tile"><b>$last_loss</b><span>loss at the end, from $first_loss</span></div>
</div>
<h2>Loss</h2>
$curve
<h2>Answers to held-out pictures</h2>
<table><thead><tr><th>Picture</th><th>Question</th><th>Before</th><th>After</th><th>Expected</th></tr></thead>
<tbody>
$rows
</tbody></table>
$mistakes
</body></html>
""")


def read_records(data: Path, name: str) -> list[dict]:
    """Read `train.json` or `test.json`."""
    return json.loads((data / f"{name}.json").read_text())


def answer(options: argparse.Namespace) -> int:
    """Ask about all held-out pictures in one batch."""
    import torch

    from llava_ft.conversation import get_template
    from llava_ft.data.image_files import load_image
    from llava_ft.inference.generate import build_prompt, prepare_inputs
    from llava_ft.inference.load import load_model
    from llava_ft.inference.responder import Sampling

    records = read_records(options.data, "test")
    loaded = load_model(str(options.model))
    assert loaded.image_transform is not None
    questions = {record["conversations"][0]["value"] for record in records}
    files = [options.data / record["image"] for record in records]
    if len(questions) != 1:
        raise SystemExit("The records ask different questions; one batch needs prompts of one length.")
    prompt = build_prompt(questions.pop(), 1, get_template(loaded.template))
    inputs = prepare_inputs(loaded, prompt, files[:1])
    pixels = torch.stack([loaded.image_transform(load_image(file)) for file in files])
    ids = loaded.model.generate(
        input_ids=inputs["input_ids"].expand(len(files), -1),
        pixel_values=pixels.to(inputs["pixel_values"].device),
        pad_token_id=loaded.tokenizer.pad_token_id,
        **Sampling(max_new_tokens=24).options(),
    )
    texts = [text.strip() for text in loaded.tokenizer.batch_decode(ids, skip_special_tokens=True)]
    answers = {record["id"]: text for record, text in zip(records, texts, strict=True)}
    options.output.write_text(json.dumps(answers, indent=1) + "\n")
    right = sum(is_right(answers[record["id"]], record["conversations"][1]["value"]) for record in records)
    print(f"{options.model}: {right} of {len(records)} answers are right.")
    return 0


def is_right(given: str, expected: str) -> bool:
    """Whether an answer names the same digit as the expected one, as a word or a numeral, and no other."""
    return named_digits(given) == named_digits(expected)


def named_digits(text: str) -> set[str]:
    """The digits that a text names, as words."""
    numerals = {str(value): word for value, word in enumerate(WORDS)}
    return {numerals.get(word, word) for word in re.findall(r"\w+", text.lower())} & set(WORDS)


def compare(options: argparse.Namespace) -> int:
    """Print and write the comparison."""
    records = read_records(options.data, "test")
    before, after = (json.loads(path.read_text()) for path in (options.before, options.after))
    expected = {record["id"]: record["conversations"][1]["value"] for record in records}
    shares = [
        sum(is_right(answers[key], digit) for key, digit in expected.items()) / len(records)
        for answers in (before, after)
    ]
    losses = read_losses(options.run)
    print_table(records[:SHOWN], before, after)
    print(f"\nRight of {len(records)} held-out pictures: {shares[0]:.0%} before, {shares[1]:.0%} after.")
    good = shares[1] >= LOWEST_AFTER and shares[0] < HIGHEST_BEFORE
    wrong = [record for record in records if not is_right(after[record["id"]], expected[record["id"]])]

    def rows(some: list[dict]) -> str:
        return "\n".join(table_row(record, before, after, options.data) for record in some)

    mistakes = ""
    if wrong:
        mistakes = f"<h2>Every mistake after training ({len(wrong)})</h2>\n<table><tbody>{rows(wrong)}</tbody></table>"
    page = PAGE.substitute(
        num_train=len(read_records(options.data, "train")), num_test=len(records), steps=losses[-1][0],
        before=f"{shares[0]:.0%}", after=f"{shares[1]:.0%}", first_loss=f"{losses[0][1]:.2f}",
        last_loss=f"{losses[-1][1]:.3f}", curve=loss_curve(losses), rows=rows(records[:SHOWN]), mistakes=mistakes,
    )  # fmt: skip
    (options.output / "report.html").write_text(page)
    result = {"accuracy_before": shares[0], "accuracy_after": shares[1], "num_test": len(records), "losses": losses}
    (options.output / "report.json").write_text(json.dumps(result, indent=1) + "\n")
    print(f"The same with pictures and the loss curve: {options.output / 'report.html'}")
    if not good:
        print(f"Expected below {HIGHEST_BEFORE:.0%} before and at least {LOWEST_AFTER:.0%} after.", file=sys.stderr)
    return 0 if good else 1


def read_losses(run: Path) -> list[tuple[int, float]]:
    """Read step and loss from the newest checkpoint of a run."""
    states = sorted(run.glob("checkpoint-*/trainer_state.json"), key=lambda path: int(path.parent.name.split("-")[1]))
    if not states:
        raise SystemExit(f"{run} holds no checkpoint.")
    history = json.loads(states[-1].read_text())["log_history"]
    return [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]


def print_table(records: list[dict], before: dict[str, str], after: dict[str, str]) -> None:
    """Print answers side by side."""
    header = ("picture", "question", "before", "after", "expected")
    lines = [header]
    for record in records:
        question, digit = (turn["value"].removeprefix("<image>\n") for turn in record["conversations"])
        lines.append((Path(record["image"]).name, question, before[record["id"]], after[record["id"]], digit))
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    lines.insert(1, tuple("-" * width for width in widths))
    print()
    for line in lines:
        print("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip())


def table_row(record: dict, before: dict[str, str], after: dict[str, str], data: Path) -> str:
    """Write one row of the page."""
    question, digit = (turn["value"].removeprefix("<image>\n") for turn in record["conversations"])
    image = base64.b64encode((data / record["image"]).read_bytes()).decode()
    cells = [f'<img alt="{html.escape(digit)}" src="data:image/png;base64,{image}">', html.escape(question)]
    for answers in (before, after):
        given = answers[record["id"]]
        kind = "good" if is_right(given, digit) else "bad"
        cells.append(f'<span class="{kind}">{html.escape(given) or "(nothing)"}</span>')
    cells.append(digit)
    return "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"


def loss_curve(losses: list[tuple[int, float]]) -> str:
    """Draw loss against step."""
    width, height, left, bottom, top = 720, 240, 44, 32, 10
    last, highest = losses[-1][0], max(loss for _, loss in losses) * 1.05

    def place(step: float, loss: float) -> str:
        x = left + (width - left - 10) * step / last
        y = top + (height - top - bottom) * (1 - loss / highest)
        return f"{x:.1f},{y:.1f}"

    parts = [f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="Loss against step">']
    for quarter in range(5):
        loss, step = highest * quarter / 4, last * quarter / 4
        y, x = place(0, loss).split(",")[1], place(step, 0).split(",")[0]
        parts.append(f'<line x1="{left}" x2="{width - 10}" y1="{y}" y2="{y}" stroke="var(--line)"/>')
        parts.append(f'<text x="{left - 8}" y="{float(y) + 4:.1f}" text-anchor="end">{loss:.1f}</text>')
        parts.append(f'<text x="{x}" y="{height - 12}" text-anchor="middle">{step:.0f}</text>')
    points = " ".join(place(step, loss) for step, loss in losses)
    parts.append(f'<polyline points="{points}" fill="none" stroke="var(--ink)" stroke-width="2.5"/></svg>')
    return "\n".join(parts)


def main() -> int:
    """Run one of the two commands."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    asking = commands.add_parser("answer")
    asking.set_defaults(run_command=answer)
    asking.add_argument("--model", type=Path, required=True)
    comparing = commands.add_parser("compare")
    comparing.set_defaults(run_command=compare)
    for name in ("--before", "--after", "--run"):
        comparing.add_argument(name, type=Path, required=True)
    for command in (asking, comparing):
        command.add_argument("--data", type=Path, required=True)
        command.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    return options.run_command(options)


if __name__ == "__main__":
    sys.exit(main())

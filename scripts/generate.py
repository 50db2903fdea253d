"""Text from a trained model: it goes on with a prompt, with each prompt of a file, or with what you type.

    python scripts/generate.py runs/NAME --prompt "def f(x):"
    python scripts/generate.py runs/NAME --prompts prompts.jsonl > texts.jsonl
    python scripts/generate.py runs/NAME                       # a conversation, a line at a time; ctrl-d ends it

A model is a run, a checkpoint of one, or the folder of an exported model. Text is shown as it comes, and is held in
memory of a size that does not grow with it, but for softmax. It ends where the model ends it, or after --tokens.
docs/evaluating.md explains all.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data.finding import missing
from data.tokenizer import Tokenizer
from models.training.summary import quiet
from models.training.weights import open_trained
from scripts.evaluating import machine
from scripts.evaluating.writing import Choice, Writer, greedy, sampled, shown


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--prompt", help="a text to go on with")
    source.add_argument("--prompts", type=Path, metavar="FILE", help="a prompt a line, or rows of .jsonl with 'prompt'")
    parser.add_argument(
        "--tokens", type=int, default=256, help="at most (default 256); 0: until the model ends the text"
    )
    parser.add_argument("--temperature", type=float, default=0.8, help="default 0.8")
    parser.add_argument("--top-p", type=float, default=1.0, help="draw of the likeliest tokens of so much probability")
    parser.add_argument("--greedy", action="store_true", help="the likeliest token, always")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(words)
    if given.tokens < 0:
        parser.error(f"--tokens {given.tokens} must be at least 0, which is without a limit")
    if not given.temperature > 0:
        parser.error(f"--temperature {given.temperature} must be positive; --greedy takes the likeliest token")
    if not 0 < given.top_p <= 1:
        parser.error(f"--top-p {given.top_p} must lie above 0 and at most at 1")
    return given


def prompts(path: Path) -> Iterator[str]:
    """A file's, one a line; of .jsonl the "prompt" of each row. Empty lines are left out. Raises ValueError."""
    if not path.is_file():
        raise ValueError(f"--prompts {path} is not a file{missing(path)}")
    rows = path.suffix.lower() in (".jsonl", ".ndjson")
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), start=1):
        if not line.strip():
            continue
        if not rows:
            yield line
            continue
        try:
            yield nonempty(json.loads(line)["prompt"])
        except (ValueError, KeyError, TypeError):
            raise ValueError(f'--prompts {path}, line {number}: a row like {{"prompt": "a text"}} is needed') from None


def nonempty(text: str) -> str:
    if not isinstance(text, str) or not text:
        raise ValueError("a prompt is empty: a model predicts what follows at least one token")
    return text


class Speaker:
    """A model and its tokenizer, text in and text out."""

    def __init__(self, where: str, given: argparse.Namespace):
        trained, self.given = open_trained(where), given
        tokenizer = trained.tokenizer()
        if tokenizer is None:
            raise ValueError(f"{trained.path} was not trained on text, and has no tokenizer to write with")
        self.tokenizer: Tokenizer = tokenizer
        self.device, dtype = machine.device_and_dtype()
        self.writer = Writer(trained.model.to(self.device), tokenizer.eos, greedy, dtype)

    def begin(self) -> None:
        """Another text, drawn by the same seed whatever was before."""
        given = self.given
        choose: Choice = greedy if given.greedy else sampled(given.temperature, given.top_p, given.seed, self.device)
        self.writer.choose = choose
        self.writer.forget()

    def go_on(self, text: str) -> Iterator[str]:
        """What comes behind all that was before and this text, in pieces. text: "" where there was one before."""
        ids = self.tokenizer.encode(text)
        self.writer.read(ids)
        yield from shown(self.writer.write(self.given.tokens or None), self.tokenizer, ids)

    @property
    def ended(self) -> bool:
        """Whether the model has ended the text."""
        return self.writer.cache is None


def show(pieces: Iterator[str]) -> str:
    """Prints them as they come. Returns the last that was not empty."""
    last = ""
    for piece in pieces:
        print(piece, end="", flush=True)
        last = piece or last
    return last


def converse(speaker: Speaker) -> None:
    """A line is read, the model goes on, and so on: all of it is one text. An empty line lets the model go on."""
    say = sys.stderr if sys.stdin.isatty() else None
    if say:
        print(
            "The model goes on with what you type. An empty line: it goes on. ctrl-c: it stops. ctrl-d: the end.",
            file=say,
        )
    speaker.begin()
    last = "\n"
    while True:
        if say:
            print("> ", end="", file=say, flush=True)
        if not (line := sys.stdin.readline()):
            return
        line = line.rstrip("\n")
        if speaker.ended and not line:
            continue
        between = "\n" if line and not speaker.ended and not last.endswith("\n") else ""
        try:
            last = show(speaker.go_on(between + line)) or line
        except KeyboardInterrupt:
            last = ""
        if not last.endswith("\n"):
            print(flush=True)
        if speaker.ended and say:
            print("(the end of the text; the next line begins another)", file=say)


def main() -> None:
    quiet()
    given = arguments()
    try:
        texts = list(prompts(given.prompts)) if given.prompts else []
        speaker = Speaker(given.model, given)
        if given.prompt is not None:
            speaker.begin()
            print(nonempty(given.prompt), end="", flush=True)
            show(speaker.go_on(given.prompt))
            print()
        elif given.prompts:
            for text in texts:
                speaker.begin()
                written = "".join(speaker.go_on(text))
                print(
                    json.dumps({"prompt": text, "text": written, "ended": speaker.ended}, ensure_ascii=False),
                    flush=True,
                )
        else:
            converse(speaker)
    except ValueError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print()
        sys.exit(130)


if __name__ == "__main__":
    main()

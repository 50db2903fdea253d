"""The words of the command line: what Hydra refuses is told in one sentence, with the near match.

Hydra finds what is misspelt, but says it with a page of options, with advice that is wrong here ("to append use +") or
with a traceback. With HYDRA_FULL_ERROR=1 it raises its errors (hydra.errors) instead, whatever it was asked for: a run,
a sweep, --cfg, --help, --info. So they are caught in one place, and told from what they carry and what was typed.
(hydra.compose before hydra.main would be the other way; it knows no sweep and no flags, and composes twice.) Who sets
HYDRA_FULL_ERROR has Hydra's own words, and the traceback.
"""

from __future__ import annotations

import inspect
import os
import re
import shlex
import signal
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from traceback import walk_tb
from typing import NoReturn

from hydra._internal.utils import get_args_parser  # the flags that hydra.main takes; it has no public name
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException, ValidationError

from conf.folders import setting
from conf.known import Word, choices, known, read
from conf.settings import DERIVED, NEEDS
from models.build import near

HYDRAS_OWN = "HYDRA_FULL_ERROR"
PLUGINS = {  # of Hydra, that the extra `sweeps` in pyproject.toml installs: choice -> package
    "hydra/launcher/submitit_local": "hydra-submitit-launcher>=1.2",
    "hydra/launcher/submitit_slurm": "hydra-submitit-launcher>=1.2",
    "hydra/sweeper/optuna": "hydra-optuna-sweeper>=1.3,<1.4",
}


def one_sentence(main: Callable[[], None]) -> Callable[[], None]:
    """`main` is hydra.main's; what it refuses before the job begins ends the process with a sentence, exit code 1."""
    job = inspect.unwrap(main).__code__

    @wraps(main)
    def told() -> None:
        if os.environ.get(HYDRAS_OWN) == "1":
            return main()
        words = sys.argv[1:]
        if mistake := flags(words) or of_one_run(words):
            sys.exit(f"error: {mistake}")
        sys.argv[1:] = words = named(words)
        os.environ[HYDRAS_OWN] = "1"
        try:
            try:
                return main()
            finally:
                if not isinstance(sys.exc_info()[1], Exception):
                    sys.stdout.flush()  # here, and not at the exit, a pipe may break
        except (HydraException, OmegaConfBaseException, ValueError, OSError) as error:
            if any(frame.f_code is job for frame, _ in walk_tb(error.__traceback__)):
                raise  # the job's own
            if isinstance(error, BrokenPipeError):
                enough()
            sys.exit(f"error: {sentence(error, words)}")
        finally:
            os.environ.pop(HYDRAS_OWN, None)

    return told


def enough() -> NoReturn:
    """The reader of the output has seen enough, as `head` has: an end without a traceback, with the shell's exit code
    for it."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is still to be written at the exit
    sys.exit(128 + signal.SIGPIPE)


def said(text: str) -> None:
    """Prints a long text, or as much of it as is read."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        enough()


def named(words: list[str]) -> list[str]:
    """The words, with a name for a sweep that has none: sweep-SETTING-SETTING, of the settings of which it has several.
    By train.yaml's own, which holds the choice of model, each job would lie in the folder of a run by itself. An
    experiment has one, but where that holds the choice too.
    """
    if not {"-m", "--multirun"} & set(words) or any(word.lstrip("+").startswith("name=") for word in words):
        return words
    if any(re.match(r"\+?experiment=", word) and names_its_sweep(word.partition("=")[2]) for word in words):
        return words
    typed = [word for word in words if not word.startswith(("-", "hydra"))]
    try:
        several = [
            each.key_or_group for each in OverridesParser.create().parse_overrides(typed) if each.is_sweep_override()
        ]
    except HydraException:
        return words  # told by Hydra
    name = "-".join(["name=sweep", *sorted(re.split(r"[@.]", key)[-1] for key in several)])
    end = max((i + 1 for i, word in enumerate(words) if not word.startswith("-")), default=len(words))
    return [*words[:end], name, *words[end:]]  # flags stand before all settings, or behind them


def of_one_run(words: list[str]) -> str | None:
    """What is wrong with a sweep whose jobs would all be in one folder: each would find the one before it there."""
    given = next((word for word in words if setting(word) == "run_dir"), None)
    if given is None or not {"-m", "--multirun"} & set(words):
        return None
    return f"{given}: each job of a sweep has a folder of its own; leave it out, and name the sweep by name=..."


def names_its_sweep(experiment: str) -> bool:
    """Whether its file gives all its runs one name."""
    path = Path(__file__).parent / "experiment" / f"{experiment}.yaml"
    return path.is_file() and re.search(r"^name: *[^$\s]+$", path.read_text(encoding="utf-8"), re.MULTILINE) is not None


def flags(words: list[str]) -> str | None:
    """What is wrong with words that begin with a hyphen, or stand behind one."""
    parser = get_args_parser()

    def refuse(message: str) -> None:
        raise ValueError(message)

    parser.error = refuse  # type: ignore[method-assign, assignment]  # which would print a page of usage
    try:
        parser.parse_args(words)
    except ValueError as error:
        said = str(error)
    else:
        return None
    flags = [option for action in parser._actions for option in action.option_strings]
    for word, behind in zip(words, [*words[1:], ""], strict=True):
        bare, joined, value = word.lstrip("-").partition("=")
        if not word.startswith("-") or word.partition("=")[0] in flags:
            continue
        if joined:
            return f"{word}: a setting has no hyphens before it: {bare}={value}"
        if behind and "=" not in behind:
            return f"{word} {behind}: a setting has no hyphens before it and = behind it: {bare}={behind}"
        meant = near(word, flags)
        return f"{word} is not a flag; " + (f"did you mean {meant}?" if meant else "python train.py --help lists them")
    if said.startswith("unrecognized arguments"):
        return f"{said.partition(': ')[2]}: put flags before all settings, or behind them"
    return said


def sentence(error: Exception, words: list[str]) -> str:
    """What was refused, in the terms of the one who typed it."""
    typed = read(words)
    said = str(error)
    cause = error.__cause__ or error.__context__
    if isinstance(error, OSError) and error.filename is not None:
        folder = str(error.filename)
        folder = folder if len(folder) < 100 else f"{folder[:60]}...{folder[-20:]}"
        return f"{folder} can't be made ({error.strerror}); RUNS, name= and run_dir= say where a run lives"
    if isinstance(error, OverrideParseException):
        return unreadable(error.override, words, typed)
    for choice, package in PLUGINS.items():
        if re.search(f"Could not (load|find) '{choice}'", said):
            group = choice.rpartition("/")[0]
            asked = next((word.bare for word in typed if word.group == group), group)
            return f"{asked} needs a plugin of Hydra that is not installed: pip install '{package}'"
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options:
        return no_option(error.missing_cfg_file, list(error.options), said, typed)
    if isinstance(cause, ConfigAttributeError | ConfigKeyError) and cause.full_key:
        return no_key(cause.full_key, said, typed)
    if isinstance(cause, ValidationError) and cause.full_key:
        return wrong_type(cause, said, typed)
    if "group override must be a string" in said:  # size=340
        for word in typed:
            if not word.read.is_sweep_override() and not isinstance(word.read.value(), str | list | dict):
                options = known(typed, word.key).options(word.group)
                if options:
                    return f"{word.bare} is not there; {hint(word.value, options, f'{word.key}=')}"
    named = {part.strip("'.:") for part in said.split()}
    for word in typed:
        if named & {word.typed, word.bare, word.key}:
            return refused(word, said, typed)
    return re.split(r"\n\s*(?:Config search path|Search path|See https|To append)", said)[0].replace("\n", " ").strip()


def hint(word: str, names: list[str], before: str = "", behind: str = "") -> str:
    meant = near(word, names) if word else None
    return f"did you mean {before}{meant}{behind}?" if meant else choices(names)


def unreadable(word: str, words: list[str], typed: list[Word]) -> str:
    """A word that is not NAME=VALUE."""
    at = words.index(word)
    before, behind = " ".join(words[max(0, at - 1) : at]), " ".join(words[at + 1 : at + 2])
    name, joined, value = word.partition("=")
    if name and joined:
        return unreadable_value(word, behind)
    if before.endswith("="):
        return f"{before} {word}: there is no space around =: {before}{word}"
    if behind.startswith("="):
        shown = " ".join(words[at : at + (3 if behind == "=" else 2)])
        return f"{shown}: there is no space around =: {shown.replace(' ', '')}"
    name, colon, value = word.partition(":")
    if colon and value.strip():
        return f"{word}: a setting is joined to its value by =: {name.strip()}={value.strip()}"
    if behind and "=" not in behind:
        return f"{word} {behind}: a setting is joined to its value by =: {name}={behind}"
    meant = None if "/" in word else near(word, known(typed).keys(""))
    option = f"{meant}=..." if meant else known(typed).option(word)
    return f"{word} has no value: a setting is NAME=VALUE" + (f"; did you mean {option}?" if option else "")


def unreadable_value(word: str, behind: str) -> str:
    name, _, value = word.partition("=")
    if not re.fullmatch(r"[~+]*[\w-]+([./@:]+[\w-]+)*", name):
        return f"{word}: {name!r} is not the name of a setting"
    if value.startswith("="):
        return f"{word} has one = too many; did you mean {name}={value.lstrip('=')}?"
    for bracket, other in ("[]", "{}"):
        if value.count(bracket) > value.count(other):
            if behind:
                whole = f"{word} {behind}".replace(", ", ",")
                return f"{word} is broken off at a space; write {shlex.quote(whole)}"
            return f"{word} has a {bracket} without its {other}"
    quoted = value.replace("\\", "\\\\").replace("'", "\\'")
    return f"{word} can't be read; a text with signs is quoted twice: {name}=\"'{quoted}'\""


def no_option(file: str, options: list[str], said: str, typed: list[Word]) -> str:
    """A group has no such file; whoever asked for it."""
    for word in typed:
        if file.startswith(f"{word.group}/"):
            name = file.removeprefix(f"{word.group}/")
            options = known(typed, word.key).options(word.group) or options
            asked = name if "/" in name else Path(name).stem
            meant = next((option for option in options if option.endswith(f"/{asked}")), asked)  # baseline/mamba
            return f"{word.key}={name} is not there; {hint(meant, options, f'{word.key}=')}"
    group, _, name = file.rpartition("/")
    return f"{group}={name}, {inside(said)}, is not there; {hint(name, options, f'{group}=')}"


def inside(said: str) -> str:
    file = re.match(r"In '([^']+)'", said)
    return f"in {file[1]}.yaml" if file else "in a file of the config"


def where(key: str, said: str, typed: list[Word]) -> tuple[str, str]:
    """A key as the one who typed it sees it, and its word's (of several the nearest); or with the file that it stands
    in.
    """
    for word in sorted(typed, key=lambda word: len(word.key), reverse=True):
        if f"{word.key}.".startswith(f"{key}.") or key.startswith(f"{word.key}."):
            return word.bare, word.key
    return f"{key}, {inside(said)},", key


def no_key(key: str, said: str, typed: list[Word]) -> str:
    shown, whole = where(key, said, typed)
    parent, _, name = key.rpartition(".")
    if parent == "trainer.strategy" and name in NEEDS:
        return f"{shown} needs strategy={NEEDS[name]}"
    before = f"{parent}." if parent else ""
    behind = whole.removeprefix(key) if whole.startswith(f"{key}.") else ""
    if parent == "trainer" and name in DERIVED:
        return f"{shown} would have no effect: set {DERIVED[name]}"
    right = known(typed, whole)
    names = right.groups_in(name) if "/" in name else right.keys(parent)
    others = [] if behind else right.elsewhere(name)
    if not near(name, names) and not others:
        names = list(dict.fromkeys([*names, *right.unwritten(parent)]))
    if name in names or not names:  # none: as data.weights, whose names are the user's own
        return f"{shown} is not written in the config; a + before it adds it: +{shown}"
    if others and not (parent and near(name, names)):
        return f"{shown} is not a setting; did you mean {others[0]}?"
    return f"{shown} is not a setting; {hint(name, [n for n in names if n[0] != '_'], before, behind)}"


def wrong_type(cause: ValidationError, said: str, typed: list[Word]) -> str:
    shown, key = where(str(cause.full_key).partition("[")[0], said, typed)
    first = str(cause).splitlines()[0]
    if "is not a subclass of" in first:
        inner = ", ".join(f"{key}.{name}=" for name in known(typed, key).keys(key))
        return f"{shown} must be one of its settings: {inner}"
    if "is not a ListConfig" in first:
        return f"{shown} must be a list, like {key}=[{shown.partition('=')[2]}]"
    for kind, must in {"Integer": "a whole number", "Float": "a number", "bool": "true or false"}.items():
        if kind in first:
            return f"{shown} must be {must}"
    return f"{shown}: {first}"


def refused(word: Word, said: str, typed: list[Word]) -> str:
    """A word that Hydra can read and not use."""
    key, value, bare = word.key, word.value, word.bare
    if not key:
        return f"{word.typed} has no name before its ="
    if "Ambiguous" in said or "requires --multirun" in said:
        thousands = re.fullmatch(r"\d{1,3}(,\d{3})+", value)
        several = f"{word.typed} is several values, which only a sweep takes (train.py -m)"
        if thousands:
            return f"{several}; a number has no commas: {key}={value.replace(',', '')}"
        return f"{several}; a list is {key}=[{value}]" if "." in key and "Ambiguous" in said else several
    if "Error merging" in said and isinstance(OmegaConf.select(known(typed, key).config, key), DictConfig):
        first = value.strip("[]").partition(",")[0]
        return f"{word.typed}: {key} has a setting for each name; +{key}.NAME={first} adds one"
    if "Multiple values" in said or "force-add" in said or "Could not append" in said:
        return f"{word.typed}: the config has one already; write {bare}"
    if "Did you mean to override" in said:
        packages = re.findall(r"[\w/]+@[\w.]+", said.partition("Did you mean to override")[2].splitlines()[0])
        if "@" in key and not near(key, packages):
            return f"{bare} is not written in the config; a + before it adds it: +{bare}"
        return f"{bare} is not a setting; {hint(key, packages, behind=f'={value}')}"
    if "does not exist" in said or "No match" in said or "looks like a config group" in said:
        right = known(typed, key)
        parent, dot, last = word.group.rpartition(".")
        names = right.groups if "@" in key else right.keys(parent)
        if last in names:
            return f"{word.typed} is not what the config has; ~{key} takes away whatever it is"
        sign, end = ("~", "") if word.read.is_delete() else ("", f"={value}")
        package = key.removeprefix(word.group)
        return f"{word.typed} names no setting; {hint(last, names, f'{sign}{parent}{dot}', f'{package}{end}')}"
    return f"{word.typed}: {said.splitlines()[0]}"

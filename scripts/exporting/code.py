"""The code of a model as files that lie side by side, for `from_pretrained(folder, trust_remote_code=True)`.

transformers takes code from one folder: a file, and the files beside it that it names in lines `from .NAME import ...`
(transformers/dynamic_module_utils.py). So each module that the model needs becomes a file,

    models/regression/linear/delta.py  ->  regression_linear_delta.py ,

the same but for its imports: those of our own modules are relative, and those of Triton and fla, which only a GPU calls
for, are function calls, since transformers wants all that a file imports to be installed. One file is written anew:
build.py, the door from a recipe to its objects, which here knows the classes of this recipe and no other.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from models.build import allowed_packages, current

MAIN, DOOR = "models.language_model", "models.build"
AUTO_MAP = {"AutoConfig": "language_model.LanguageModelConfig", "AutoModelForCausalLM": "language_model.LanguageModel"}
EVERYWHERE = ("torch", "transformers", *sys.stdlib_module_names)  # where transformers opens a folder
OPERATORS = '"test_time_regression::'  # our operators' names in torch, of which a process has one each

BUILD = '''"""The door from a node of config.json to an object. Only the classes of this model's recipe can be named."""

from __future__ import annotations

from functools import partial
from typing import Any

{imports}

CLASSES = {{
{classes}
}}


def build(node: Any, *, targets: tuple[str, ...] = (), **settings: Any) -> Any:
    """The object that a node describes, its own nodes first. `_partial_`: a constructor that its owner calls. Raises
    ValueError for another class."""
    if isinstance(node, list):
        return [build(item) for item in node]
    if not isinstance(node, dict):
        return node
    given = {{key: build(value) for key, value in node.items() if key not in ("_target_", "_partial_")}} | settings
    if "_target_" not in node:
        return given
    if node["_target_"] not in CLASSES:
        raise ValueError(f"_target_={{node['_target_']}} is not a class that this folder has: {{', '.join(CLASSES)}}")
    made = CLASSES[node["_target_"]]
    return partial(made, **given) if node.get("_partial_") else made(**given)
'''


class Source(NamedTuple):
    """A module of ours as it stands in the repository."""

    name: str
    path: Path
    is_package: bool


def write_code(folder: Path, mixers: dict[str, Any], said: str = "") -> list[Path]:
    """The files of the code that models with these mixers need. `said` stands in the first line of each, for where it
    comes from. Raises ValueError for a class that can't be taken along.
    """
    texts = code(mixers, said)
    for name, text in texts.items():
        (folder / f"{name}.py").write_text(text)
    return [folder / f"{name}.py" for name in texts]


def code(mixers: dict[str, Any], said: str = "") -> dict[str, str]:
    """name of the file without .py -> its text."""
    named = dict(classes(mixers))
    texts = {flat(DOOR): door(named)}
    waiting = [MAIN, *sorted({found.__module__ for found in named.values()})]
    while waiting:
        module = source(waiting.pop())
        if flat(module.name) in texts:
            continue
        text, others = rewritten(module)
        texts[flat(module.name)] = f"# {module.name.replace('.', '/')}.py{said}\n{text}"
        waiting += others
    # transformers finds all files from here, at once; what imports what would take it through some of them many times
    listed = "".join(f"    from .{name} import __name__\n" for name in sorted(texts) if name != flat(MAIN))
    texts[flat(MAIN)] += f"\nif TYPE_CHECKING:  # what transformers has to copy\n{listed}"
    texts[flat(MAIN)] = texts[flat(MAIN)].replace("from typing import ", "from typing import TYPE_CHECKING, ", 1)
    version = hashlib.sha256("".join(texts.values()).encode()).hexdigest()[:12]
    own = OPERATORS.replace("::", f"_{version}::")
    return {name: text.replace(OPERATORS, own) for name, text in texts.items()}


def classes(node: Any) -> Iterator[tuple[str, type]]:
    """Every class that is named anywhere below a node. Raises ValueError for one that is none of ours."""
    if isinstance(node, dict):
        if "_target_" in node:
            target = current({"_target_": node["_target_"]})["_target_"]
            module, _, name = target.rpartition(".")
            if not is_ours(module):
                raise ValueError(f"_target_={target} is no class of {' or '.join(roots())}, and can't be taken along")
            yield node["_target_"], getattr(importlib.import_module(module), name)
        for value in node.values():
            yield from classes(value)
    elif isinstance(node, list):
        for value in node:
            yield from classes(value)


def door(named: dict[str, type]) -> str:
    """build.py for these classes."""
    imports = {f"from .{flat(found.__module__)} import {found.__name__}" for found in named.values()}
    lines = [f'    "{target}": {found.__name__},' for target, found in sorted(named.items())]
    return BUILD.format(imports="\n".join(sorted(imports)), classes="\n".join(lines))


def roots() -> tuple[str, ...]:
    return ("models", *allowed_packages())


def is_ours(module: str) -> bool:
    return module.split(".")[0] in roots()


def flat(module: str) -> str:
    """models.parts.norm -> parts_norm"""
    return module.removeprefix("models.").replace(".", "_")


def source(module: str) -> Source:
    spec = importlib.util.find_spec(module)
    assert spec is not None and spec.origin is not None, module
    return Source(module, Path(spec.origin), spec.submodule_search_locations is not None)


def is_module(name: str) -> bool:
    parent = name.rpartition(".")[0]
    return source(parent).is_package and importlib.util.find_spec(name) is not None


def home(module: str, name: str) -> str:
    """The module that defines what `from module import name` gives: a package's __init__ often passes things on."""
    found = getattr(importlib.import_module(module), name, None)
    passed_on = source(module).is_package and (inspect.isclass(found) or inspect.isfunction(found))
    return found.__module__ if passed_on and found is not None and is_ours(found.__module__) else module


@cache
def rewritten(module: Source) -> tuple[str, list[str]]:
    """The module's text with other imports, and the modules of ours that it imports."""
    text = module.path.read_text()
    others: list[str] = []
    lines: list[str | None] = list(text.splitlines())
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            new, found = statement(module, node)
            others += found
        elif _registers(node):
            new = []  # a process may open several folders, each with a class of its own
        else:
            continue
        if new is not None:
            assert isinstance(node, ast.stmt) and node.end_lineno is not None
            written = "\n".join(" " * node.col_offset + line for line in new) if new else None
            lines[node.lineno - 1 : node.end_lineno] = [written, *[None] * (node.end_lineno - node.lineno)]
    return "\n".join(line for line in lines if line is not None) + "\n", others


def statement(module: Source, node: ast.Import | ast.ImportFrom) -> tuple[list[str] | None, list[str]]:
    """An import as it has to be here, None where it may stay, and the modules of ours in it."""
    if isinstance(node, ast.Import):
        late = [alias for alias in node.names if alias.name.split(".")[0] not in EVERYWHERE]
        assert not late or (len(node.names) == 1 and not is_ours(late[0].name)), f"{module.path}:{node.lineno}"
        if not late:
            return None, []
        bound = late[0].asname or late[0].name
        return ["from importlib import import_module", f'{bound} = import_module("{late[0].name}")'], []
    whole = "." * node.level + (node.module or "")
    where = importlib.util.resolve_name(whole, _package(module)) if node.level else whole
    if where.split(".")[0] in EVERYWHERE:
        return None, []
    if not is_ours(where):
        taken = [f'{alias.asname or alias.name} = import_module("{where}").{alias.name}' for alias in node.names]
        return ["from importlib import import_module", *taken], []
    new, others = [], []
    for alias in node.names:
        renamed = f" as {alias.asname}" if alias.asname else ""
        if is_module(f"{where}.{alias.name}"):
            others.append(f"{where}.{alias.name}")
            new.append(f"from . import {flat(others[-1])} as {alias.asname or alias.name}")
        else:
            others.append(home(where, alias.name))
            new.append(f"from .{flat(others[-1])} import {alias.name}{renamed}")
    return new, others


def _package(module: Source) -> str:
    return module.name if module.is_package else module.name.rpartition(".")[0]


def _registers(node: ast.AST) -> bool:
    """AutoConfig.register(...) and the like, as a statement."""
    call = node.value if isinstance(node, ast.Expr) else None
    function = call.func if isinstance(call, ast.Call) else None
    auto = function.value if isinstance(function, ast.Attribute) and function.attr == "register" else None
    return isinstance(auto, ast.Name) and auto.id.startswith("Auto")

"""The named recipes: a TOML file each in this folder, and a user's own from anywhere.

A preset's tables are the groups of charlm.settings, its keys the settings; `description` says in a
line what it is.
"""

import sys
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from charlm.errors import CharlmError
from charlm.settings import GROUPS, Config, settings

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_SUFFIX = ".toml"


def preset_names() -> list[str]:
    files = resources.files(__name__).iterdir()
    return sorted(file.name.removesuffix(_SUFFIX) for file in files if file.name.endswith(_SUFFIX))


def read_preset(name: str) -> tuple[Config, str]:
    """A preset's settings and its description; `name` is one of preset_names() or a .toml file.

    Raises:
        CharlmError: there is no such preset or file, or what it says isn't a recipe.
    """
    if name.endswith(_SUFFIX):
        return _parse(Path(name).name.removesuffix(_SUFFIX), _read(Path(name)), name)
    if name not in preset_names():
        raise CharlmError(
            f"preset {name!r} is not one of {', '.join(preset_names())}, nor a {_SUFFIX} file"
        )
    text = resources.files(__name__).joinpath(name + _SUFFIX).read_text(encoding="utf-8")
    return _parse(name, text, name + _SUFFIX)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CharlmError(f"the preset {path} is not UTF-8 at byte {error.start}") from None
    except OSError as error:
        raise CharlmError(f"cannot read the preset {path}: {error.strerror or error}") from None


def _parse(name: str, text: str, source: str) -> tuple[Config, str]:
    try:
        tables: dict[str, Any] = tomllib.loads(text)
        description = tables.pop("description", "")
        return Config.from_json({"preset": name, **_flatten(tables)}), str(description)
    except (tomllib.TOMLDecodeError, CharlmError) as error:
        raise CharlmError(f"the preset {source} can't be used: {error}") from None


def _flatten(tables: Mapping[str, Any]) -> dict[str, Any]:
    group_of = {field.name: field.metadata["group"] for field in settings()}
    flat = {}
    for group, table in tables.items():
        if group not in GROUPS or not isinstance(table, dict):
            raise CharlmError(
                f"{group} is not one of the tables {', '.join(f'[{name}]' for name in GROUPS)}"
            )
        for key, value in table.items():
            if group_of.get(key) != group:
                place = f", but [{group_of[key]}] does" if key in group_of else ""
                raise CharlmError(f"[{group}] has no setting {key}{place}")
            flat[key] = value
    return flat

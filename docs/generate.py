"""Write docs/passes.md and docs/plan-fields.md from the passes' docstrings and the plan's schema.

Run it as `python docs/generate.py`; `--check` fails where the files are out of date.
"""

import argparse
import inspect
import sys
from pathlib import Path
from typing import Any

from graphfold.plan import json_schema
from graphfold.rewrite import available_passes

DOCS = Path(__file__).resolve().parent


def passes() -> str:
    """One section per pass: its module's docstring, which is the theorem behind it."""
    lines = [
        "# Passes",
        "",
        "In the order they run. PLAN passes build the reference network and always run; FOLD",
        "passes merge it and can be chosen with `--passes` and `--skip-pass`. A pass is one file",
        "in `passes/`; the text below is its docstring.",
    ]
    for name, cls in available_passes().items():
        text = inspect.getdoc(sys.modules[cls.__module__]) or ""
        lines += ["", f"## {name}", "", f"Phase: {cls.phase.name}.", "", text.strip()]
    return "\n".join(lines) + "\n"


def plan_fields() -> str:
    """One table per object of the plan's schema."""
    schema = json_schema()
    lines = ["# Fields of a plan", "", "From the published schema (`graphfold plan --schema`)."]
    objects = {"the plan": schema, **schema["$defs"]}
    for title, found in objects.items():
        lines += ["", f"## {title}", "", str(found.get("description", "")).strip(), ""]
        lines += ["| field | type | default | meaning |", "|---|---|---|---|"]
        required = found.get("required", [])
        for name, field in found.get("properties", {}).items():
            default = "required" if name in required else _default(field)
            meaning = field.get("description", "")
            lines.append(f"| `{name}` | {_type(field)} | {default} | {meaning} |")
    return "\n".join(lines) + "\n"


def _default(field: dict[str, Any]) -> str:
    if "default" not in field:
        return "empty"
    return "null" if field["default"] is None else f"`{field['default']}`"


def _type(field: dict[str, Any]) -> str:
    if "$ref" in field:
        return str(field["$ref"]).rsplit("/", 1)[1]
    if "anyOf" in field:
        return " or ".join(_type(option) for option in field["anyOf"])
    if "enum" in field:
        return ", ".join(f"`{value}`" for value in field["enum"])
    if "const" in field:
        return f"`{field['const']}`"
    if field.get("type") == "array":
        return f"list of {_type(field['items'])}"
    return str(field.get("type", "any"))


def main() -> int:
    """Write the files, or check them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="only compare")
    check = parser.parse_args().check
    stale = []
    for name, text in (("passes.md", passes()), ("plan-fields.md", plan_fields())):
        path = DOCS / name
        if check and (not path.exists() or path.read_text() != text):
            stale.append(name)
        elif not check:
            path.write_text(text)
    if stale:
        print(f"out of date: {', '.join(stale)} (python docs/generate.py)", file=sys.stderr)
    return int(bool(stale))


if __name__ == "__main__":
    sys.exit(main())

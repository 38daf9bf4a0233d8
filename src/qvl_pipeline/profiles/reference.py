"""The reference of all parameters, from their declarations: docs/parameters.md, and a JSON schema for editors.

`make docs` writes both. Meaning and units are the docstrings of the blocks, all else is their fields.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

from docstring_parser import parse
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic.json_schema import models_json_schema

from qvl_pipeline.config import BLOCKS
from qvl_pipeline.config.base import Block, Indifferent

PAGE = Path("docs/parameters.md")
SCHEMA = Path("conf/parameters.schema.json")
_INTRODUCTION = """# Parameters

Every block and key of `conf/<profile>/parameters.yml`. `make docs` writes this page from the declarations in
`src/qvl_pipeline/config/`, and `conf/parameters.schema.json`, by which editors complete and check the file.

**Decides**: whether the value decides what is written (tables, frames, tokens, weights). What was made with another
value of it is refused by later stages. Where it says `no`, any value gives the same bytes.

**Default** is that of the declaration. `conf/base/parameters.yml`, which goes under every profile, has other values for
`train.bf16`, `export_dtype`, `gradient_checkpointing`, `use_liger_kernel` and `dataloader_num_workers`.
"""
_LIMITS = (
    ("minimum", "≥ {}"),
    ("exclusiveMinimum", "> {}"),
    ("maximum", "≤ {}"),
    ("exclusiveMaximum", "< {}"),
    ("minItems", "at least {}"),
    ("minLength", "at least {} characters"),
    ("pattern", "`{}`"),
)


def parameters_schema() -> dict[str, Any]:
    """Return the JSON schema of `parameters.yml`: no key is required, for a profile names only what it changes."""
    references, schema = models_json_schema([(block, "validation") for block in BLOCKS.values()])
    for model in _models():
        definition = schema["$defs"][model.__name__]
        definition.pop("required", None)
        definition["description"] = parse(model.__doc__).short_description
        for name, meaning in _meanings(model).items():
            definition["properties"][name]["description"] = meaning
    blocks = {name: {"anyOf": [references[block, "validation"], {"type": "null"}]} for name, block in BLOCKS.items()}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Parameters of a qvl_pipeline profile",
        "type": "object",
        "additionalProperties": False,
        "properties": blocks,
        "$defs": schema["$defs"],
    }


def parameters_page() -> str:
    """Return the page: one section a block, one row a key; blocks inside of blocks have sections of their own."""
    definitions = parameters_schema()["$defs"]
    titles = {model: f"`{name}`" for name, model in BLOCKS.items()}
    indifferent = set()  # with all that is inside of it
    for outer in _models():
        for name, field in outer.model_fields.items():
            inside = _blocks_in(field.annotation)
            titles |= {inner: f"{titles[outer]}, `{name}`" for inner in inside}
            indifferent |= set(inside) if outer in indifferent or Indifferent() in field.metadata else set()
    sections = [_section(titles[model], model, definitions, model in indifferent) for model in _models()]
    return "\n".join([_INTRODUCTION, *sections])


def _models() -> Iterator[type[Block]]:
    """Yield the blocks, each before those inside of it."""
    todo = list(BLOCKS.values())
    while todo:
        yield (model := todo.pop(0))
        todo = [inner for field in model.model_fields.values() for inner in _blocks_in(field.annotation)] + todo


def _blocks_in(annotation: Any) -> list[type[Block]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [block for argument in get_args(annotation) for block in _blocks_in(argument)]


def _meanings(model: type[Block]) -> dict[str, str]:
    return {param.arg_name: " ".join((param.description or "").split()) for param in parse(model.__doc__).params}


def _section(title: str, model: type[Block], definitions: dict[str, Any], indifferent: bool) -> str:
    """Return one block as a heading, a sentence and a table."""
    lines = [f"## {title}", "", parse(model.__doc__).short_description, ""]
    lines += ["| key | type | default | decides | meaning |", "|---|---|---|---|---|"]
    properties, meanings = definitions[model.__name__]["properties"], _meanings(model)
    for name, field in model.model_fields.items():
        decides = "no" if indifferent else _decides(field)
        row = (f"`{name}`", _type(properties[name], definitions), _default(field), decides, meanings[name])
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |")
    return "\n".join([*lines, ""])


def _type(schema: dict[str, Any], definitions: dict[str, Any]) -> str:
    """Return a type with its limits, for people."""
    if "$ref" in schema:
        schema = definitions[schema["$ref"].rpartition("/")[2]]
        return "block" if schema["type"] == "object" else _type(schema, definitions)
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(_type(option, definitions) for option in schema["anyOf"]))
    if "const" in schema or "enum" in schema:
        return ", ".join(f"`{json.dumps(value).strip(chr(34))}`" for value in schema.get("enum", [schema.get("const")]))
    kind = {"null": "`null`", "object": "mapping", "array": "list"}.get(schema.get("type"), schema.get("type", "any"))
    if kind == "list" and schema.get("items"):
        kind += f" of {_type(schema['items'], definitions)}"
    limits = [text.format(schema[key]) for key, text in _LIMITS if key in schema]
    return ", ".join([kind, *limits])


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    if field.default_factory_takes_validated_data:
        return "by other keys"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        return "see below"
    return f"`{json.dumps(value)}`"


def _decides(field: FieldInfo) -> str:
    marks = [mark.to for mark in field.metadata if isinstance(mark, Indifferent)]
    if None in marks:
        return "no"
    return f"yes, but not {' and '.join(marks)}" if marks else "yes"


def main() -> None:
    """Write both files."""
    PAGE.write_text(parameters_page(), encoding="utf-8")
    SCHEMA.write_text(json.dumps(parameters_schema(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

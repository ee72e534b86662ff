"""Recipe files and overrides as plain trees of keys: strict YAML, shipped recipes by name."""

import re
from pathlib import Path
from typing import Any

import yaml

from spark3d.errors import ConfigError


class _Loader(yaml.SafeLoader):
    """YAML 1.2 numbers (`1e-3` is a number) and no duplicate keys."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                line = key_node.start_mark.line + 1
                raise ConfigError(f"key {key!r} stands twice (line {line}); keep one of the two")
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?$|^[-+]?\.inf$|^\.nan$"),
    list("-+.0123456789"),
)


def read_yaml(text: str, name: str = "recipe") -> Any:
    """Parse one YAML document with the safe loader.

    Raises:
        ConfigError: duplicate keys, python tags or broken YAML; names the place.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        detail = " ".join(str(error).split())
        raise ConfigError(f"{name} is not valid YAML: {detail}") from None


def find_recipe(name: str | Path, kind: str) -> Path:
    """A recipe's file: a path, or the name of a shipped one in `configs/<kind>`.

    Raises:
        ConfigError: neither exists; lists the shipped ones.
    """
    path = Path(name)
    if path.is_file():
        return path
    here = Path(__file__).resolve().parent
    shipped = [f for base in (here, here.parent) for f in (base / "configs" / kind).glob("*.yaml")]
    for file in shipped:
        if file.stem == str(name).removesuffix(".yaml"):
            return file
    known = ", ".join(sorted({file.stem for file in shipped})) or "none"
    raise ConfigError(f"no recipe {str(name)!r}: give a YAML file or one of {known}")


def apply_override(tree: dict[str, Any], item: str) -> None:
    """Set one `section.key=value` in a tree of keys, in place.

    Raises:
        ConfigError: not of that form, or a value that is no YAML.
    """
    key, equals, text = item.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"override {item!r} must read section.key=value, e.g. optim.lr=1e-3")
    *parents, last = key.strip().split(".")
    node = tree
    for part in parents:
        child = node.get(part)
        if not isinstance(child, dict):
            child = {}
            node[part] = child
        node = child
    node[last] = read_yaml(text, item)

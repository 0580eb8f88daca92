"""YAML without its traps: a key twice is an error, `no` is a word, `1e-4` is a number."""

import re
from typing import Any

import yaml


class _Loader(yaml.SafeLoader):
    """The scalars of YAML 1.2; PyYAML reads 1.1, and keeps the last of two equal keys silently."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  (declared so in PyYAML)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:  # noqa: FBT001, FBT002  (the signature of PyYAML)
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            line = key.start_mark.line + 1
            if key.value in lines:
                first = lines[key.value]
                raise ValueError(
                    f"line {line}: {key.value!r} is defined twice, first in line {first}"
                )
            lines[key.value] = line
        return super().construct_mapping(node, deep=deep)


for _tag, _first, _pattern in [
    ("null", ["~", "n", "N", ""], r"~|null|Null|NULL|"),
    ("bool", list("tTfF"), r"true|True|TRUE|false|False|FALSE"),
    ("int", list("-+0123456789"), r"[-+]?(0|[1-9][0-9_]*)"),
    ("float", list("-+.0123456789"), r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*)([eE][-+]?[0-9]+)?"),
    ("float", list("-+0123456789"), r"[-+]?[0-9]+[eE][-+]?[0-9]+"),
    ("float", list("-+."), r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"),
]:
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _first
    )


def read_yaml(text: str) -> Any:
    """Parses one YAML document into plain Python values.

    Raises:
        ValueError: One line with the number of the line where the document is broken.
    """
    try:
        return yaml.load(text, Loader=_Loader)  # a SafeLoader: no tags that run code
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f"line {mark.line + 1}: " if mark else ""
        raise ValueError(f"{line}{error.problem or error.context}") from None
    except RecursionError:
        raise ValueError("the brackets or lists are nested too deeply") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{' '.join(str(error).split())}") from None

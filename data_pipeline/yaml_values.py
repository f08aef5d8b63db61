"""YAML text to values, with limits: a few hundred bytes of aliases can stand for billions of values."""

from typing import Any

import yaml

MAX_CHARACTERS = 1 << 20
MAX_VALUES = 100_000


class YamlError(ValueError):
    """A text that is not YAML, or exceeds a limit."""


def parse_yaml(text: str, where: str, *, times: int = 1) -> Any:
    """The value in a YAML text. where: what the text is, for messages. times: of the limits.

    Raises YamlError if it is not YAML, longer than MAX_CHARACTERS, contains itself or a key twice, is nested too
    deeply, or has more than MAX_VALUES values with its aliases written out.
    """
    if len(text) > times * MAX_CHARACTERS:
        raise YamlError(f"{where}: {len(text):,} characters, at most {times * MAX_CHARACTERS:,} expected")
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        if node is None:
            return None
        _count(node, where, {}, times * MAX_VALUES)
        return yaml.SafeLoader("").construct_document(node)
    except yaml.YAMLError as error:
        raise YamlError(f"{where}: not YAML: {error}") from None
    except RecursionError:
        raise YamlError(f"{where}: not YAML that can be read: nested too deeply") from None
    except YamlError:
        raise
    except (ValueError, OverflowError) as error:  # a date that does not exist, an integer of thousands of digits
        raise YamlError(f"{where}: not YAML: {error}") from None


def _count(node: yaml.Node, where: str, counted: dict[int, int], most: int) -> int:
    """Number of values that a node stands for, at most `most`. counted: by id; -1 for nodes that contain this one."""
    if (known := counted.get(id(node))) is not None:
        if known < 0:
            raise YamlError(f"{where}, line {node.start_mark.line + 1}: contains itself by an alias; write it out")
        return known
    counted[id(node)] = -1
    children: list[yaml.Node] = []
    if isinstance(node, yaml.SequenceNode):
        children = node.value
    elif isinstance(node, yaml.MappingNode):
        _check_keys(node, where)
        children = [part for pair in node.value for part in pair]
    total = 1 + sum(_count(child, where, counted, most) for child in children)
    if total > most:
        raise YamlError(
            f"{where}, line {node.start_mark.line + 1}: more than {most:,} values, its aliases (*name) written "
            "out; remove the aliases"
        )
    counted[id(node)] = total
    return total


def _check_keys(node: yaml.MappingNode, where: str) -> None:
    """Raise YamlError for a key that is given twice; PyYAML would silently use the last one."""
    seen: dict[str, int] = {}
    for key, _ in node.value:
        if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
            if key.value in seen:
                raise YamlError(
                    f"{where}, line {key.start_mark.line + 1}: key {key.value} is given twice, first in line "
                    f"{seen[key.value]}; remove one of them"
                )
            seen[key.value] = key.start_mark.line + 1

"""YAML text to values, with limits: a few hundred bytes of aliases can stand for billions of values. Loads no torch."""

from typing import Any

import yaml

from maskvr_ds.config.base import ConfigError

MAX_CHARACTERS = 1 << 20
MAX_VALUES = 100_000


def parse_yaml(text: str, where: str) -> Any:
    """The value in a YAML text. where: what the text is, for messages.

    Raises ConfigError if it is not YAML, longer than MAX_CHARACTERS, contains itself or a key twice, is nested too
    deeply, or has more than MAX_VALUES values with its aliases written out.
    """
    if len(text) > MAX_CHARACTERS:
        raise ConfigError(f"{where}: {len(text):,} characters, at most {MAX_CHARACTERS:,} expected in a config")
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        if node is None:
            return None
        _count(node, where, {})
        return yaml.SafeLoader("").construct_document(node)
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}: not YAML: {error}") from None
    except RecursionError:
        raise ConfigError(f"{where}: not YAML that can be read: nested too deeply") from None
    except ConfigError:
        raise
    except (ValueError, OverflowError) as error:  # a date that does not exist, an integer of thousands of digits
        raise ConfigError(f"{where}: not YAML: {error}") from None


def _count(node: yaml.Node, where: str, counted: dict[int, int]) -> int:
    """Number of values that a node stands for. counted: by id; -1 for nodes that contain this one."""
    if (known := counted.get(id(node))) is not None:
        if known < 0:
            raise ConfigError(f"{where}, line {node.start_mark.line + 1}: contains itself by an alias; write it out")
        return known
    counted[id(node)] = -1
    children: list[yaml.Node] = []
    if isinstance(node, yaml.SequenceNode):
        children = node.value
    elif isinstance(node, yaml.MappingNode):
        _check_keys(node, where)
        children = [part for pair in node.value for part in pair]
    total = 1 + sum(_count(child, where, counted) for child in children)
    if total > MAX_VALUES:
        raise ConfigError(
            f"{where}, line {node.start_mark.line + 1}: more than {MAX_VALUES:,} values, its aliases (*name) written "
            "out; remove the aliases"
        )
    counted[id(node)] = total
    return total


def _check_keys(node: yaml.MappingNode, where: str) -> None:
    """Raise ConfigError for a key that is given twice; PyYAML would silently use the last one."""
    seen: dict[str, int] = {}
    for key, _ in node.value:
        if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
            if key.value in seen:
                raise ConfigError(
                    f"{where}, line {key.start_mark.line + 1}: key {key.value} is given twice, first in line "
                    f"{seen[key.value]}; remove one of them"
                )
            seen[key.value] = key.start_mark.line + 1

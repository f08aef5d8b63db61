"""Configuration files that expand to billions of values, never end or nest too deeply: one immediate error."""

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.yaml_values import MAX_VALUES, YamlError, parse_yaml
from maskvr_ds.config import ConfigError, load_config

HEAD = "output_dir: x\ntraining: {steps: 1}\ndata: {path: y}\n"


@pytest.fixture(autouse=True)
def _at_once() -> Iterator[None]:
    started = time.process_time()
    yield
    assert time.process_time() - started < 20


def bomb(levels: int, width: int = 10) -> str:
    lines = ["y0: &y0 [" + ",".join("1" * width) + "]"]
    lines += [f"y{n}: &y{n} [{','.join([f'*y{n - 1}'] * width)}]" for n in range(1, levels)]
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (bomb(10), "line 5: more than 100,000 values, its aliases"),
        (bomb(900, 2), "more than 100,000 values"),
        (
            "a: &a {x: 1}\n"
            + "\n".join(f"{c}: &{c} {{<<: [{','.join([f'*{p}'] * 40)}]}}" for p, c in zip("abcd", "bcde", strict=True)),
            "100,000 values",
        ),
        ("a: &a [*a]", "line 1: contains itself by an alias"),
        ("a: &a {b: {c: *a}}", "contains itself by an alias"),
        ("[" * 5000, "nested too deeply|not YAML"),
        ("a: " + "[" * 5000 + "]" * 5000, "nested too deeply"),
        ("{a: " * 5000 + "1" + "}" * 5000, "nested too deeply"),
        ("seed: 1\nbatch: {}\nseed: 2", "line 3: key seed is given twice, first in line 1"),
        ("optimizer: {lr: 1, lr: 2}", "line 1: key lr is given twice"),
        ("x: " + "y" * (1 << 20), "1,048,579 characters, at most 1,048,576"),
        ("a: " + "9" * 5000, "not YAML: .*digits"),
        ("a: 2024-99-99", "not YAML: "),
        ("a: !!python/object:os.system {}", "not YAML: .*could not determine a constructor"),
        ("a: *b", "not YAML: .*undefined alias"),
        ("{[1]: 2}", "found unhashable key"),
        ("a: b: c", "not YAML"),
        ("a: \x00", "not YAML"),
    ],
    ids=lambda text: text[:25],
)
def test_yaml_that_is_refused(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(YamlError, match=message) as caught:
        parse_yaml(text, "here")
    assert str(caught.value).startswith("here")
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"run\.yaml"):
        load_config(tmp_path / "run.yaml")
    with pytest.raises(ConfigError):
        load_config("demo_cpu", [f"optimizer={text}"])


def test_a_bomb_in_a_configuration(tmp_path: Path) -> None:
    """shared/cases/11: 400 bytes."""
    (tmp_path / "run.yaml").write_text(f"{HEAD}{bomb(10)}\noptimizer: {{lr: *y9}}\n")
    with pytest.raises(ConfigError, match=r"run\.yaml, line 8: more than 100,000 values"):
        load_config(tmp_path / "run.yaml")


def test_aliases_and_merge_keys_work(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(
        "base: demo_cpu\noptimizer: {lr: &lr 0.02}\nmasking: {strategy: mapnet, mapnet: {lr: *lr}}\n"
    )
    config = load_config(tmp_path / "run.yaml")
    assert config.optimizer.lr == config.masking.mapnet.lr == 0.02
    assert parse_yaml("a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}", "here")["b"] == {"x": 1, "y": 3}
    assert parse_yaml("", "here") is None
    assert len(parse_yaml("[" + "1," * (MAX_VALUES - 2) + "]", "here")) == MAX_VALUES - 2


_KEYS = st.text("abc~: -", max_size=4)
_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_KEYS, inner, max_size=4),
    max_leaves=12,
)


@given(_VALUES)
def test_yaml_is_read_as_by_safe_load(value: object) -> None:
    text = yaml.safe_dump(value, allow_unicode=True)
    assert parse_yaml(text, "here") == yaml.safe_load(text)


@given(st.text(alphabet="ab:&*[]{},- \n<'\"|>!#%@0", max_size=40))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        value = parse_yaml(text, "here")
    except YamlError:
        return
    # NaN is not in the alphabet.
    assert value == yaml.safe_load(text)


@pytest.mark.parametrize(
    "spelling", ["run.yaml", "./run.yaml", "sub/../run.yaml", "here/run.yaml", "link.yaml", "hard.yaml", "{absolute}"]
)
def test_a_cycle_of_bases_however_it_is_spelled(spelling: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(f"base: two.yaml\n{HEAD}")
    (tmp_path / "sub").mkdir()
    (tmp_path / "here").symlink_to(tmp_path)
    (tmp_path / "link.yaml").symlink_to(path)
    os.link(path, tmp_path / "hard.yaml")
    (tmp_path / "two.yaml").write_text(f"base: {spelling.format(absolute=path)}\n")
    for start in (path, tmp_path / "link.yaml", tmp_path / "here" / "here" / "run.yaml"):
        with pytest.raises(ConfigError, match="leads back to itself"):
            load_config(start)


def test_a_long_chain_of_bases(tmp_path: Path) -> None:
    for number in range(2000):
        (tmp_path / f"{number}.yaml").write_text(f"base: {number + 1}.yaml\n")
    with pytest.raises(ConfigError, match=r"0\.yaml: more than 50 files, each the base of the previous one"):
        load_config(tmp_path / "0.yaml")


def test_what_is_not_a_file_of_yaml(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.yaml")
    (tmp_path / "zero.yaml").symlink_to("/dev/zero")
    for name in ("fifo.yaml", "zero.yaml"):
        with pytest.raises(ConfigError, match="neither a file nor a recipe"):
            load_config(tmp_path / name)
    with (tmp_path / "big.yaml").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(ConfigError, match="1,099,511,627,776 bytes"):
        load_config(tmp_path / "big.yaml")

"""Names on a hub, against a server that answers what huggingface_hub asks."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from data_pipeline.__main__ import main
from data_pipeline.hub import MODEL_FILES, TOKENIZER_FILES, HubError, local_folder, parse_name, snapshot_name
from tests.support.documents import tree, write_text, write_tokenizer
from tests.support.hub import Hub, serve

FORBIDDEN = {"modeling_x.py": b"raise SystemExit", "pytorch_model.bin": b"pickle", "README.md": b"card"}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with serve() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        template = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.chdir(tmp_path)
        yield hub


def model(version: bytes = b"1") -> dict[str, bytes]:
    return {"config.json": b"{}", "model.safetensors": version * 4000, "tokenizer.json": b"{}", **FORBIDDEN}


def resolve(text: str, files: tuple[str, ...] = MODEL_FILES) -> Path:
    return local_folder(text, files, "--tokenizer")


def test_only_what_is_needed_is_fetched_and_once(hub: Hub) -> None:
    commit = hub.add("lab/bert", model())
    folder = resolve("lab/bert")
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert (folder / "model.safetensors").read_bytes() == b"1" * 4000
    assert snapshot_name(folder) == ("lab/bert", commit)
    assert not any(name in path for name in FORBIDDEN for path in hub.paths)
    assert resolve("lab/bert") == resolve(f"lab/bert@{commit}") == resolve("lab/bert@main") == folder
    assert hub.downloads("model.safetensors") == 1
    hub.add("plain", model())
    assert "model.safetensors" not in {path.name for path in resolve("plain", TOKENIZER_FILES).iterdir()}


def test_a_moved_branch_and_a_fixed_commit(hub: Hub) -> None:
    first = hub.add("lab/bert", model())
    before = resolve("lab/bert")
    second = hub.add("lab/bert", model(b"2"))
    after = resolve("lab/bert@main")
    assert [snapshot_name(folder) for folder in (before, after)] == [("lab/bert", first), ("lab/bert", second)]
    assert (resolve(f"lab/bert@{first}") / "model.safetensors").read_bytes() == b"1" * 4000


def test_a_cut_download_is_completed_or_an_error(hub: Hub) -> None:
    """Never a file that is not complete."""
    hub.add("lab/bert", model())
    hub.cut["model.safetensors"] = 1000
    with pytest.raises(HubError) as caught:
        resolve("lab/bert")
    assert "cannot be fetched" in str(caught.value)
    hub.cut.clear()
    assert (resolve("lab/bert") / "model.safetensors").read_bytes() == b"1" * 4000


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lab/none", "neither a folder here nor a model at"),
        ("lab/private", "if the model is private, run: hf auth login"),
        ("lab/gated", "access is restricted. Accept its conditions"),
        ("lab/bert@nightly", "lab/bert has no revision nightly"),
    ],
)
def test_one_error_with_a_remedy(hub: Hub, text: str, message: str) -> None:
    hub.add("lab/bert", model())
    hub.add("lab/private", model())
    hub.add("lab/gated", model())
    hub.private.add("lab/private")
    hub.gated.add("lab/gated")
    with pytest.raises(HubError) as caught:
        resolve(text)
    assert f"--tokenizer {text}: " in str(caught.value)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_without_a_network(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is in the cache is used; otherwise one error with the command to fetch it elsewhere."""
    hub.add("lab/bert", model())
    folder = resolve("lab/bert")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert resolve("lab/bert") == folder
    with pytest.raises(HubError) as caught:
        resolve("lab/other@v1")
    assert "hf download lab/other --revision v1 --include 'config.json'" in str(caught.value)
    assert "HF_HOME on a shared file system" in str(caught.value)


def test_a_mistyped_path_is_none_of_a_hub(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lab").mkdir()
    with pytest.raises(HubError, match=r"lab/bart: no such folder; lab has none\. Correct the path, or rename lab if"):
        resolve("lab/bart")
    (tmp_path / "lab" / "base").mkdir()
    with pytest.raises(HubError, match=r"lab/bart: no such folder; lab has base\. Correct the path"):
        resolve("lab/bart")
    hub.add("lab/bert", model())
    assert snapshot_name(resolve("lab/bert")) is not None
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(HubError, match="lab has base"):
        resolve("lab/bart")


def test_a_folder_comes_first_and_is_said(hub: Hub, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    (tmp_path / "lab" / "bert").mkdir(parents=True)
    assert resolve("lab/bert") == Path("lab/bert")
    assert not hub.paths
    assert "the folder of this name is used" in caplog.text
    hub.add("lab/bert", model())
    assert snapshot_name(resolve("lab/bert@main")) is not None
    caplog.clear()
    assert resolve("lab/bert") == Path("lab/bert")
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "not the model on the hub; for that, use lab/bert@main" in record.getMessage()


@pytest.mark.parametrize("text", ["/a/b", "a/", "a/b/c", "./a", "../a", "a b", "", "a@", "a//b", "-x/../y", "ä/b"])
def test_what_is_no_name(text: str) -> None:
    assert parse_name(text) is None


def test_a_build_with_the_name_of_a_tokenizer(hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_tokenizer(tmp_path / "tok")
    hub.add("lab/tok", {**{path.name: path.read_bytes() for path in source.iterdir()}, **FORBIDDEN})
    write_text(tmp_path / "a.txt", ["the of and to in"] * 30)
    for name, output in (("lab/tok", "named"), (str(source), "folder")):
        words = ["build", "--input", "a.txt", "--tokenizer", name, "--sequence-length", "16", "--output", output]
        assert main(words) == 0, capsys.readouterr().err
    assert tree(tmp_path / "named") == tree(tmp_path / "folder")
    missing = ["build", "--input", "a.txt", "--tokenizer", "lab/no", "--sequence-length", "16", "--output", "no"]
    assert main(missing) == 1
    assert capsys.readouterr().err.count("error:") == 1
    assert not (tmp_path / "no").exists()

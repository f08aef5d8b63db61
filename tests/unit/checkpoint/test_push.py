"""`maskvr export --push` against a server that answers what huggingface_hub asks, and the model loaded by its name."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from transformers import AutoModelForMaskedLM, AutoTokenizer

from maskvr_ds.checkpoint import push
from maskvr_ds.cli import main
from tests.support.hub import Hub, serve

RUN = Path(__file__).parents[2] / "data" / "acf4fb5" / "run_zero0"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with serve() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        template = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no_token"))
        monkeypatch.setenv("HF_TOKEN", hub.token)
        yield hub


def export(tmp_path: Path, *more: str) -> int:
    shutil.copytree(RUN, tmp_path / "run", dirs_exist_ok=True)
    return main(["export", "--checkpoint", str(tmp_path / "run"), "--output", str(tmp_path / "model"), *more])


@torch.no_grad()
def logits(source: str | Path, **more: Any) -> torch.Tensor:
    ids = torch.arange(5, 25).reshape(2, 10)
    return AutoModelForMaskedLM.from_pretrained(source, **more).eval()(ids).logits


def test_model_loaded_by_name_is_the_export(hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert export(tmp_path, "--push", "lab/mine", "--private") == 0, capsys.readouterr().err
    commit = hub.branches["lab/mine"]["main"]
    assert capsys.readouterr().out.splitlines()[-1] == (
        f"uploaded as lab/mine (private): {hub.url}/lab/mine/commit/{commit}"
    )
    stored = hub.repositories["lab/mine"][commit]
    assert stored == {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= stored.keys()
    assert b'pipeline("fill-mask", model="lab/mine")' in stored["README.md"]
    assert hub.private == {"lab/mine"}
    assert hub.verified == hub.objects.keys() != set(), "large files are confirmed"
    asked = ("create", "preupload", "batch", "upload", "verify", "commit")
    assert {kind: hub.requests["PUT" if kind == "upload" else "POST", kind] for kind in asked} == dict.fromkeys(
        asked, 1
    )

    assert torch.equal(logits("lab/mine"), logits(tmp_path / "model"))
    assert AutoTokenizer.from_pretrained("lab/mine").mask_token == "[MASK]"
    assert (tmp_path / "cache" / "models--lab--mine" / "snapshots" / commit).is_dir()


def test_upload_to_an_existing_model_is_another_commit(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its visibility and its other files stay. A name without an owner is the user's."""
    first = hub.add("ada/mine", {"NOTES.md": b"mine", "config.json": b"{}"})
    assert export(tmp_path, "--push", "mine") == 0, capsys.readouterr().err
    assert "uploaded as ada/mine (public): " in capsys.readouterr().out
    commit = hub.branches["ada/mine"]["main"]
    assert commit != first
    assert hub.repositories["ada/mine"][commit]["NOTES.md"] == b"mine"
    assert hub.repositories["ada/mine"][commit]["config.json"] != b"{}"


def no_token(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")


def wrong_token(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_another")


def read_only_token(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.role = "read"


def public_model(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("lab/mine", {"config.json": b"{}"})


def offline(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def unreachable(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")


REFUSED = [
    (no_token, "lab/mine", "there is no token for http"),
    (wrong_token, "lab/mine", "does not accept the token (401); log in with `hf auth login`"),
    (read_only_token, "lab/mine", "the token of ada may only read; log in with"),
    (public_model, "lab/mine", "lab/mine exists and is public, and --private is for new models; "),
    (offline, "lab/mine", "offline mode is set (HF_HUB_OFFLINE); unset it, or upload from a machine with access"),
    (unreachable, "lab/mine", "http://127.0.0.1:9 cannot be reached ("),
    (no_token, "a/b/c", "OWNER/NAME expected"),
]


@pytest.mark.parametrize(("fault", "name", "message"), REFUSED, ids=lambda value: getattr(value, "__name__", ""))
def test_refused_before_the_export(
    hub: Hub,
    tmp_path: Path,
    fault: Any,
    name: str,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    fault(hub, monkeypatch)
    assert export(tmp_path, "--push", name, "--private") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: --push {name}: ")
    assert message in line
    assert not (tmp_path / "model").exists()
    assert hub.requests["POST", "create"] == 0


@pytest.mark.parametrize(("owner", "message"), [("others", "(403); "), ("lab", "answers 404: ")])
def test_an_upload_that_fails_leaves_the_export(
    hub: Hub,
    tmp_path: Path,
    owner: str,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """No rights in another organization; a hub that forgets the model between creation and upload."""
    if owner == "lab":
        monkeypatch.setattr(push.HfApi, "create_repo", lambda *_, **__: None)
    assert export(tmp_path, "--push", f"{owner}/mine") == 1
    error = capsys.readouterr().err
    assert f"error: --push {owner}/mine: {hub.url} " in error
    assert message in error
    assert error.endswith(f"to upload it later: hf upload {owner}/mine {tmp_path / 'model'} .\n")
    assert (tmp_path / "model" / "model.safetensors").is_file()


def test_private_without_push_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert export(tmp_path, "--private") == 1
    assert capsys.readouterr().err == "error: --private is an option of --push NAME\n"
    assert not (tmp_path / "model").exists()


def test_a_hub_that_is_lost_after_the_upload(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A completed upload is not reported as one that failed."""
    upload = push.HfApi.upload_folder

    def upload_then_lose(*arguments: Any, **options: Any) -> Any:
        commit = upload(*arguments, **options)
        monkeypatch.setattr(push.HfApi, "model_info", lambda *_, **__: pytest.fail("asked after the upload"))
        return commit

    monkeypatch.setattr(push.HfApi, "upload_folder", upload_then_lose)
    assert export(tmp_path, "--push", "lab/mine", "--private") == 0, capsys.readouterr().err
    assert "uploaded as lab/mine (private): " in capsys.readouterr().out

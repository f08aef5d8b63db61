"""`maskvr plan`: output, JSON, picture, calibration by measurements, and one line for each fault."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from maskvr_ds.cli.main import main
from maskvr_ds.config import ConfigError, deepspeed_config_path
from maskvr_ds.config.deepspeed import read_deepspeed_config
from maskvr_ds.planning.calibration import Measurement, fit, predicted, read_measurements
from maskvr_ds.planning.hardware import GPUS
from maskvr_ds.planning.memory import memory
from maskvr_ds.planning.step_time import Calibration
from maskvr_ds.planning.zero import zero_settings
from tests.support.corpora import SPECIAL, make_corpus
from tests.support.documents import rows_of

GPU_RESULT = Path(__file__).parents[3] / "docs/results/gpu/train_bert_base.json"
WORDS = ["plan", "--config", "bert_base_4k", "--gpu", "h100", "--gpus-per-node", "8"]
SIZES = ["--sequence-length", "128", "--vocab-size", "30522"]


def run(*words: str) -> int:
    return main([*WORDS, *words])


def plan_json(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert run("--json", *words) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def fault(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert run(*words) == 1
    printed = capsys.readouterr()
    assert not printed.out
    assert printed.err.startswith("error: ")
    return printed.err


def test_text_and_json_agree(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--nodes", "2", "--link", "100GbE", *SIZES]
    found = plan_json(capsys, *words)
    (phase,) = found["phases"]
    assert run(*words) == 0
    text = capsys.readouterr().out
    assert f"{phase['micro']} × accumulation {phase['accumulation']}" in text
    assert f"{phase['tokens_per_second']:,.0f} tokens/s" in text
    assert f"{1e3 * sum(phase['step'].values()):,.1f} ms" in text
    assert len(phase["stages"]) == 8
    assert [scale["gpus"] for scale in phase["scales"]] == [8, 16, 32, 64, 128, 256, 512]


def test_the_model_to_start_from_is_fetched_without_its_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By name on a hub: its own sizes, not BERT-base's."""
    asked = []

    def download(name: str, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((name, revision, allow_patterns))
        content = {"model_type": "modernbert", "hidden_size": 64, "num_hidden_layers": 4, "vocab_size": 100}
        (tmp_path / "config.json").write_text(json.dumps(content), encoding="utf-8")
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    sizes = ["--sequence-length", "1024", "--vocab-size", "100"]
    found = plan_json(capsys, "--config", "modernbert_domain", "--nodes", "1", *sizes)
    assert asked == [("answerdotai/ModernBERT-base", None, ["config.json"])]
    assert found["parameters"]["token embeddings"] == 100 * 64
    assert found["parameters"]["layers"] == 4 * (4 * 64**2 + 3 * 64 * 1152 + 2 * 64)


def test_sizes_come_from_the_corpus(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus = make_corpus(tmp_path / "corpus", length=64, words=300)
    (phase,) = plan_json(capsys, "--nodes", "1", "--set", f"data.path={corpus}")["phases"]
    assert (phase["sequence_length"], phase["predictions"]) == (64, 9)
    assert "--vocab-size" in fault(capsys, "--nodes", "1", "--set", f"data.path={tmp_path / 'none'}")


def test_padding_and_documents_are_those_of_the_corpus(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Counted over a mixture whose second corpus is read twice; without the corpus, the output says so."""
    first = make_corpus(tmp_path / "first", rows=6, padded_last_row=True)
    second = make_corpus(tmp_path / "second", rows=3, seed=1)
    words = ["--nodes", "1", "--set", "batch.global_size=64", "--set", "data.path=null"]
    words += ["--set", f"data.mixture=[{{path: {first}}}, {{path: {second}, weight: 2}}]"]
    rows = plan_json(capsys, *words)["phases"][0]
    assert (rows["attention"], rows["pairs_share"]) == ("rows", 1)
    # 16 of the 12 rows' 384 positions.
    assert rows["padding"] == pytest.approx(16 / 384)
    documents = plan_json(capsys, *words, "--set", "data.attention=documents")["phases"][0]
    pairs, separator = 0, SPECIAL.index("[SEP]")
    for folder in (first, second):
        _, ids, _ = rows_of(folder)
        for row in ids.tolist():
            # Padding is a document of its own behind the last separator.
            number = np.cumsum([0, *(token == separator for token in row[:-1])])
            pairs += sum(a == b for a in number for b in number)
    assert documents["pairs_share"] == pytest.approx(pairs / (9 * 32**2))
    assert documents["padding"] == rows["padding"]
    assert run(*words, "--set", "data.attention=documents") == 0
    text = capsys.readouterr().out
    assert "rows          4% of the positions are padding, which costs what tokens cost; " in text
    assert f"{documents['tokens_per_second'] * (1 - 16 / 384):,.0f} tokens/s without it" in text
    assert f"attention within documents, {pairs / (9 * 32**2):.1%} of the pairs of positions, by Flash Attent" in text
    assert run("--nodes", "1", *SIZES, "--set", "data.attention=documents") == 0
    assert "whose lengths only the corpus knows: counted over complete rows" in capsys.readouterr().out


def test_picture(tmp_path: Path) -> None:
    assert run("--nodes", "1", *SIZES, "--plot", str(tmp_path / "plan.png")) == 0
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


def test_loads_no_torch() -> None:
    code = (
        "import sys\nfrom maskvr_ds.cli.main import main\n"
        f"assert main({[*WORDS, '--nodes', '1', *SIZES, '--measured', str(GPU_RESULT)]!r}) == 0\n"
        "print([m for m in ('torch', 'deepspeed', 'transformers', 'matplotlib') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "[]"


# Calibration


def test_a_calibrated_model_predicts_what_was_measured() -> None:
    (measured,) = read_measurements(GPU_RESULT)
    assert measured.step_seconds == pytest.approx(256 * 128 / 398_434.67)
    gpu, calibration = fit([measured], GPUS["h100"])
    assert gpu.product_rate(2) == pytest.approx(790.2e12, rel=1e-3)
    assert predicted(measured, gpu, calibration) == pytest.approx(measured.step_seconds, rel=1e-4)
    assert calibration.activations == pytest.approx(1.0, abs=0.05)


def test_measured_memory_scales_the_activations() -> None:
    (measured,) = read_measurements(GPU_RESULT)
    doubled = replace(measured, memory=2 * (measured.memory or 0))
    factor = fit([doubled], GPUS["h100"])[1].activations
    found = memory(measured.sizes, measured.zero, measured.work, ranks=1, fused=False, factor=factor)
    assert found.total == pytest.approx(doubled.memory)


@pytest.mark.parametrize("first", [2, 4])
def test_each_precision_has_its_own_rate(first: int) -> None:
    """In any order of the files; a precision that was not measured takes the other's share of its data sheet's rate."""
    (half,) = read_measurements(GPU_RESULT)
    config = read_deepspeed_config(deepspeed_config_path("zero0_fp32"))
    single = replace(half, zero=zero_settings(config), product_rate=60e12, step_seconds=8 * half.step_seconds)
    assert (half.zero.element, single.zero.element) == (2, 4)
    given = sorted((half, single), key=lambda one: one.zero.element != first)
    gpu, calibration = fit(given, GPUS["h100"])
    assert (gpu.product_rate(2), gpu.product_rate(4)) == (pytest.approx(half.product_rate), pytest.approx(60e12))
    other = fit(given[::-1], GPUS["h100"])[1]
    assert (calibration.compute, calibration.host) == (pytest.approx(other.compute), pytest.approx(other.host))
    only, _ = fit(given[:1], GPUS["h100"])
    assert only.half_share == only.single_share == (gpu.half_share if first == 2 else gpu.single_share)


@pytest.mark.parametrize("gib", [1.2, 1000.0])
def test_measured_memory_that_cannot_be_is_refused(gib: float) -> None:
    (measured,) = read_measurements(GPU_RESULT)
    with pytest.raises(ConfigError, match=r"peak_memory_gib .* below 20 times expected"):
        fit([replace(measured, memory=gib * 2**30)], GPUS["h100"])


def synthetic(folder: Path, sizes: list[tuple[str, int]], truth: Calibration) -> list[Measurement]:
    """Measurements (preset, micro-batch) of a machine on which the model is right with the factors `truth`."""
    content = json.loads(GPU_RESULT.read_text(encoding="utf-8"))
    del content["peak_memory_gib"]  # of another size
    found = []
    for preset, micro in sizes:
        what = f"{preset}, L = 128, zero1_bf16, 1 ranks × {micro} sequences"
        path = folder / f"{preset}_{micro}.json"
        path.write_text(json.dumps({**content, "what": what}), encoding="utf-8")
        (one,) = read_measurements(path)
        gpu = replace(GPUS["h100"], half_share=one.product_rate / GPUS["h100"].half)
        rate = micro * 128 / predicted(one, gpu, truth)
        path.write_text(json.dumps({**content, "what": what, "tokens_per_second_median": rate}), encoding="utf-8")
        found += read_measurements(path)
    return found


def test_factors_stay_equal_where_measurements_do_not_tell_them_apart(tmp_path: Path) -> None:
    measurements = synthetic(tmp_path, [("bert-large", 4096), ("bert-large", 8192)], Calibration(1.5, 1.5))
    slower = [replace(one, step_seconds=one.step_seconds * (1 + 0.01 * i)) for i, one in enumerate(measurements)]
    _, found = fit(slower, GPUS["h100"])
    assert found.host == pytest.approx(found.compute, rel=0.5)


def test_two_measurements_give_two_factors(tmp_path: Path) -> None:
    """Times of known factors, at sizes where the GPU and where the host decides, give these factors back."""
    truth = Calibration(compute=1.3, host=0.7)
    measurements = synthetic(tmp_path, [("bert-base", 512), ("bert-tiny", 8), ("bert-large", 64)], truth)
    _, found = fit(measurements, GPUS["h100"])
    assert (found.compute, found.host) == (pytest.approx(1.3, rel=0.02), pytest.approx(0.7, rel=0.02))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", "not a result of `maskvr benchmark train"),
        ('{"what": 3}', "not a result of `maskvr benchmark train"),
        ({"what": "optimizer step, bert-base, zero1_bf16, rank 0 of 1"}, "not a result of `maskvr benchmark train"),
        ({"tokens_per_second_median": 0}, "tokens_per_second_median is 0"),
        ({"tokens_per_second_median": float("nan")}, "tokens_per_second_median is nan"),
        ({"matrix_product_tflops": None}, "matrix_product_tflops is None"),
        ({"tokens_per_second_median": 5.0}, "times what is predicted"),
        ({"device": "cpu"}, "measured on 'cpu', not on --gpu H100"),
        ({"device": "NVIDIA H200"}, "measured on 'NVIDIA H200', not on --gpu H100"),
        ({"compile": "layers"}, "compile layers, whose effect the model does not know"),
        ({"settings": "masking.strategy=span"}, "settings masking.strategy=span, whose effect"),
        ({"accumulation": 0}, "accumulation is 0"),
        ({"what": "bert-huge, L = 128, zero1_bf16, 1 ranks × 256 sequences"}, "not a result of"),
        ({"what": "bert-base, L = 128, zero9, 1 ranks × 256 sequences"}, "zero9"),
        ({"what": "bert-base, L = 128, zero1_bf16, 0 ranks × 256 sequences"}, "not a result of"),
    ],
)
def test_a_file_that_is_no_measurement_is_refused(
    content: Any, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if isinstance(content, dict):
        content = json.dumps({**json.loads(GPU_RESULT.read_text(encoding="utf-8")), **content})
    path = tmp_path / "measured.json"
    path.write_text(content, encoding="utf-8")
    assert message in fault(capsys, "--nodes", "1", *SIZES, "--measured", str(path))


# Faults


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--nodes", "2", *SIZES], "2 nodes: --link is required"),
        (["--nodes", "2", "--link", "0", *SIZES], "--link 0: expected 8x400G"),
        (["--nodes", "3", "--link", "400", *SIZES], "not a multiple of 24 GPUs; set it to 4080 or 4104"),
        (["--nodes", "1", "--sequence-length", "128", "128", "--vocab-size", "9"], "2 values for 1 phases"),
        (["--nodes", "1", "--sequence-length", "1024", "--vocab-size", "9000"], "exceed model.max_position_embeddings"),
        (["--nodes", "1", *SIZES, "--measured", "/none.json"], "/none.json"),
        (["--nodes", "1", *SIZES, "--set", "deepspeed=zero7"], "zero7"),
        (["--nodes", "1", *SIZES, "--set", "model.hidden_size=98304"], "no ZeRO stage fits"),
    ],
)
def test_faults(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in fault(capsys, *words)


@pytest.mark.parametrize("words", [["--nodes", "0"], ["--nodes", "1", "--gpu", "v100"], ["--nodes", "1e9"]])
def test_faults_of_the_command_line(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        run(*words)
    assert stopped.value.code == 2
    assert "error: argument --" in capsys.readouterr().err


def test_the_corpora_of_the_sizes_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", "--config", "bert_base_4k", *("--nodes", "1", "--gpus-per-node", "8", "--gpu", "h100")]
    sizes = ["--sequence-length", "128", "--vocab-size", "30522"]
    assert main([*words, *sizes]) == 0
    assert "\ncorpora       not read; --sequence-length and --vocab-size\n" in capsys.readouterr().out

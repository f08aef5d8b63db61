"""`maskvr attention` on folders of transformers: figures, the control, a pruned export with equal logits."""

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForMaskedLM, BertConfig, BertForMaskedLM, BertForSequenceClassification

from data_pipeline.shards import Corpus
from maskvr_ds.analysis.attention.heads import Heads
from maskvr_ds.analysis.attention.measure import choose_rows, measure_heads
from maskvr_ds.analysis.health.probe import copy_for_analysis
from maskvr_ds.cli.main import main
from tests.support.corpora import CLS, SEP, SPECIAL, make_corpus

ROWS = 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """corpus, and models `a` and `b` with its vocabulary."""
    folder = tmp_path_factory.mktemp("attention")
    corpus = make_corpus(folder / "corpus", rows=40, length=16, words=91, padded_last_row=True)
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        sizes = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48, "num_hidden_layers": 2}
        model = BertForMaskedLM(BertConfig(vocab_size=96, pad_token_id=0, max_position_embeddings=16, **sizes))
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.data.mul_(4)
        model.save_pretrained(folder / name)
        (folder / name / "tokenizer.json").write_bytes((corpus / "tokenizer/tokenizer.json").read_bytes())
    return folder


@pytest.fixture(autouse=True)
def _no_progress_on_standard_output(caplog: pytest.LogCaptureFixture) -> None:
    """An earlier command in this process may have set INFO, whose lines would precede the JSON."""
    caplog.set_level(logging.WARNING, logger="maskvr_ds")


def attention(capsys: pytest.CaptureFixture[str], *words: object) -> dict:
    assert main(["attention", *map(str, words), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_figures(folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    picture = tmp_path / "heads.png"
    words = (folder / "a", folder / "b", "--data", folder / "corpus", "--rows", ROWS, "--plot", picture)
    found = attention(capsys, *words)
    assert list(found["models"]) == [str(folder / "a"), str(folder / "b"), "random weights"]
    for figures in found["models"].values():
        assert sum(figures["shares"].values()) == pytest.approx(1)
        assert [len(layer) for layer in figures["class_of_heads"]] == [4, 4]
    similarity = torch.tensor(found["similarity_to_first"][str(folder / "b")])
    assert similarity.shape == (2, 4)
    assert ((similarity > 0) & (similarity < 1)).all()
    assert list(found["similarity_to_first"]) == [str(folder / "b"), "random weights"]
    weights = found["weight_similarity_to_first"][str(folder / "b")]
    assert len(weights) == 2
    for n, layer in enumerate(weights):
        pairs = [
            [p.flatten() for name, p in parameters if f"layer.{n}." in name and p.dim() == 2]
            for parameters in (AutoModelForMaskedLM.from_pretrained(folder / m).named_parameters() for m in "ab")
        ]
        expected = torch.nn.functional.cosine_similarity(torch.cat(pairs[0]), torch.cat(pairs[1]), dim=0)
        assert layer["all"] == pytest.approx(expected.item(), abs=1e-5)
        assert len(layer) == 7  # four matrices of the attention, two of the feed-forward part
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_fine_tuned_model_beside_its_encoder(
    folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Before and after: a folder with another head is read without it."""
    before = AutoModelForMaskedLM.from_pretrained(folder / "a")
    tuned = BertForSequenceClassification(before.config)
    tuned.bert.load_state_dict(before.bert.state_dict(), strict=False)
    tuned.bert.encoder.layer[1].attention.self.query.weight.data.mul_(-1)
    tuned.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes((folder / "a/tokenizer.json").read_bytes())
    found = attention(capsys, folder / "a", tmp_path, "--data", folder / "corpus", "--rows", ROWS)
    similarity = torch.tensor(found["similarity_to_first"][str(tmp_path)])
    torch.testing.assert_close(similarity[0], torch.ones(4))
    assert (similarity[1] < 0.999).all()
    first, second = found["weight_similarity_to_first"][str(tmp_path)]
    assert all(value == pytest.approx(1) for value in first.values())
    assert second.pop("attention.self.query") == pytest.approx(-1)
    assert 0 < second.pop("all") < 0.8
    assert all(value == pytest.approx(1) for value in second.values())


def test_attention_to_listed_words(folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Words of the corpus are single tokens: their positions are those of their ids."""
    words = tmp_path / "words.txt"
    words.write_text("w3\nW7\nw50\n", encoding="utf-8")
    options = ("--data", folder / "corpus", "--rows", 40, "--words", f"some={words}")
    found = attention(capsys, folder / "a", *options)["models"][str(folder / "a")]["attention_to"]
    assert list(found) == ["[CLS]", "[SEP]", "punctuation", "same token", "some"]
    model = copy_for_analysis(AutoModelForMaskedLM.from_pretrained(folder / "a"))
    rows = choose_rows(Corpus(folder / "corpus"), 40, torch.device("cpu"))
    listed = torch.tensor([len(SPECIAL) + number for number in (3, 7, 50)])
    expected = torch.zeros(2, 4)
    for ids in rows.plain.input_ids:
        used = ids[ids != 0][None]
        weights = torch.stack(model.mlm.bert(input_ids=used, output_attentions=True).attentions)[:, 0]
        expected += (weights * torch.isin(used[0], listed)).sum(-1).mean(-1).detach() / 40
    assert expected.max() > 0
    torch.testing.assert_close(torch.tensor(found["some"]), expected, rtol=1e-4, atol=1e-5)
    words.write_text("absent\n", encoding="utf-8")
    assert main(["attention", str(folder / "a"), *map(str, options)]) == 1
    assert "none of its 1 words occurs in the 40 rows" in capsys.readouterr().err
    words.write_text("w3\n", encoding="utf-8")
    assert main(["attention", str(folder / "a"), *map(str, options), "--words", f"[CLS]={words}"]) == 1
    assert "two kinds of tokens have the name '[CLS]'" in capsys.readouterr().err


def test_classes_by_the_network(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, few in (("_STEPS", 2), ("_CONSTRUCTED", 3)):
        monkeypatch.setattr(f"maskvr_ds.analysis.attention.network.{name}", few)
    words = (folder / "a", "--data", folder / "corpus", "--rows", 2, "--classifier", "network")
    found = attention(capsys, *words)
    assert found["classifier"] == "network"
    maps = [name for layer in found["models"][str(folder / "a")]["class_of_heads"] for name in layer]
    assert sum(found["trained_on"].values()) <= 2 * len(maps)
    assert main(["attention", *map(str, words)]) == 0
    assert "classes by a network, trained on maps of which the rule is sure: " in capsys.readouterr().out


def test_rows_of_three_tokens_have_no_pattern(folder: Path) -> None:
    model = copy_for_analysis(AutoModelForMaskedLM.from_pretrained(folder / "a"))
    rows = choose_rows(Corpus(folder / "corpus"), ROWS, torch.device("cpu"))
    plain, mask = rows.plain, torch.ones_like(rows.plain.input_ids, dtype=torch.bool)
    mask[1, 3:] = False
    found = measure_heads(model, replace(rows, plain=replace(plain, attention_mask=mask)))
    assert len(found.classes[0][0]) == ROWS - 1
    four = replace(plain.map(lambda column: column[[0, 2, 3, 4]]), attention_mask=None)
    torch.testing.assert_close(found.entropy, measure_heads(model, replace(rows, plain=four)).entropy)
    mask[:, 3:] = False
    with pytest.raises(ValueError, match="all rows have fewer than 4 tokens"):
        measure_heads(model, replace(rows, plain=replace(plain, attention_mask=mask)))


def test_shares_to_kinds_of_tokens_are_sums_of_weights(folder: Path) -> None:
    model = copy_for_analysis(AutoModelForMaskedLM.from_pretrained(folder / "a"))
    rows = choose_rows(Corpus(folder / "corpus"), 40, torch.device("cpu"))  # with the padded one
    found = measure_heads(model, rows)
    expected = {CLS: torch.zeros(2, 4), SEP: torch.zeros(2, 4)}
    for ids in rows.plain.input_ids:
        used = ids[ids != 0][None]
        weights = torch.stack(model.mlm.bert(input_ids=used, output_attentions=True).attentions)[:, 0]
        for token, total in expected.items():
            total += (weights * (used[0] == token)).sum(-1).mean(-1).detach() / 40
    torch.testing.assert_close(torch.tensor(found.attention["[CLS]"]).float(), expected[CLS], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.tensor(found.attention["[SEP]"]).float(), expected[SEP], rtol=1e-4, atol=1e-5)


def test_the_pruned_model_has_the_logits_of_the_model_with_heads_off(
    folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    target = tmp_path / "pruned"
    words = (folder / "a", "--data", folder / "corpus", "--rows", ROWS, "--off", "zero", "--prune", 3)
    found = attention(capsys, *words, "--export-pruned", target)["heads"]
    assert (target / "tokenizer.json").is_file()
    assert [len(layer) for layer in found["increase"]] == [4, 4]
    without_layers = found["increase_without_layer"]
    off = torch.zeros(2, 4, dtype=torch.bool)
    for entry in found["pruning"]:
        off[entry["layer"], entry["head"]] = True
    model = copy_for_analysis(AutoModelForMaskedLM.from_pretrained(folder / "a"))
    rows = choose_rows(Corpus(folder / "corpus"), ROWS, torch.device("cpu"))
    heads, batch = Heads(model, rows.masked), rows.masked
    assert heads.loss(off) == pytest.approx(found["pruning"][-1]["loss"], rel=1e-5)
    for n in range(2):
        layer = (torch.arange(2) == n)[:, None].expand(2, 4)
        assert heads.loss(layer) - heads.loss() == pytest.approx(without_layers[n], abs=1e-5)
    with heads.switches.gated((~off).float()), torch.no_grad():
        expected = model.mlm(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    pruned = AutoModelForMaskedLM.from_pretrained(target).eval()
    logits = pruned(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--export-pruned", "x"], "give --prune N"),
        (["--export-pruned", "x", "--prune", "1", "--off", "uniform"], "choose --off zero"),
        (["--task", "sst2", "--words", "x=y"], "--words is an option of the rows of a corpus"),
        (["--task", "sst2", "--classifier", "network"], "--classifier is an option of the rows of a corpus"),
    ],
)
def test_options_that_contradict(folder: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str) -> None:
    assert main(["attention", str(folder / "a"), "--data", str(folder / "corpus"), *words]) == 1
    assert said in capsys.readouterr().err


def test_an_architecture_without_attention_weights(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = BertForMaskedLM.base_model.fget  # type: ignore[attr-defined]

    def without(self: BertForMaskedLM) -> object:
        base = forward(self)
        if not getattr(base, "_silent", False):
            base._silent = True
            base.register_forward_hook(lambda _, args, output: output.__setitem__("attentions", None) or output)
        return base

    monkeypatch.setattr(BertForMaskedLM, "base_model", property(without))
    assert main(["attention", str(folder / "a"), "--data", str(folder / "corpus")]) == 1
    assert "bert of transformers returns no attention weights" in capsys.readouterr().err

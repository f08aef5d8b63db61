"""Initial weights for another vocabulary: old tokens keep what the model knows, new ones start from their pieces."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForMaskedLM, PreTrainedModel

from data_pipeline.build import build
from data_pipeline.shards import Corpus
from data_pipeline.tokenization.tokenizer import Encoder
from data_pipeline.tokenization.training import extend_tokenizer
from maskvr_ds.config import ConfigError, ModelConfig
from maskvr_ds.data.pieces import Pieces, Surface
from maskvr_ds.models import pretrained
from maskvr_ds.models.architectures import transformers_config
from maskvr_ds.models.encoder import MaskedLanguageModel
from maskvr_ds.models.initial_folder import InitialWeights, for_corpus, table_rows, weights_digest
from maskvr_ds.models.new_vocabulary import RowSources
from maskvr_ds.run_folder.checkpoints import Checkpoint, CheckpointError, CheckpointState
from maskvr_ds.training.resume import resolve_model_config
from tests.support.architectures import INSTALLED, section
from tests.support.tokenizers import DOMAIN, KINDS, bert, save

NEW = ("kubernetes", "fibrillation", "myokarditis")


@dataclass
class World:
    """tokenizer: of the models; extended: with three words more; corpus, other: built with the extended one, and with a
    tokenizer that has its tokens in another order."""

    root: Path
    tokenizer: Path
    extended: Path
    corpus: Corpus
    other: Corpus

    def pieces(self, word: str) -> list[int]:
        return list(
            Tokenizer.from_file(str(self.tokenizer / "tokenizer.json")).encode(word, add_special_tokens=False).ids
        )


def shuffled(source: Path, target: Path) -> Path:
    """The tokenizer with its non-special tokens in reverse order, and without one of them."""
    target.mkdir()
    content = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))
    tokens = list(content["model"]["vocab"])
    tokens = [*tokens[:5], *(token for token in reversed(tokens[5:]) if token != "##ubern")]
    content["model"]["vocab"] = {token: i for i, token in enumerate(tokens)}
    (target / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    config = (source / "tokenizer_config.json").read_text(encoding="utf-8")
    (target / "tokenizer_config.json").write_text(config, encoding="utf-8")
    return target


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp("vocabulary")
    tokenizer = bert(root / "tokenizer")
    text = root / "text.txt"
    text.write_text(DOMAIN * 40, encoding="utf-8")
    extend_tokenizer([text], tokenizer, 3, root / "extended")
    for name, folder in (("corpus", root / "extended"), ("other", shuffled(root / "extended", root / "shuffled"))):
        build([text], tokenizer=folder, sequence_length=16, output=root / name, progress=False)
    return World(root, tokenizer, root / "extended", Corpus(root / "corpus"), Corpus(root / "other"))


def config_of(architecture: str, rows: int, **settings: Any) -> Any:
    model = ModelConfig.model_validate(section(architecture, **settings))
    return transformers_config(model, vocab_size=rows, pad_id=0, token_ids={})


def model_folder(
    world: World, folder: Path, architecture: str, padding: int = 0, **settings: Any
) -> tuple[Path, PreTrainedModel]:
    """A model with random weights, none of them 0, and the tokenizer in one folder."""
    torch.manual_seed(5)
    rows = len(Encoder(world.tokenizer).tokenizer.get_vocab()) + padding
    model = AutoModelForMaskedLM.from_config(config_of(architecture, rows, **settings)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    for path in world.tokenizer.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder, model


def adapted(
    folder: Path, corpus: Corpus, vocabulary: Any, new_head: bool | None = None
) -> tuple[Any, list[str], RowSources]:
    """What a run starts with, and the lines that it logs."""
    initial = for_corpus(InitialWeights(folder, weights_digest(folder), new_head), corpus, vocabulary)
    assert initial.rows is not None
    config = transformers_config(ModelConfig(initialize_from=folder), vocab_size=initial.rows.rows, pad_id=0)
    torch.manual_seed(9)
    module = MaskedLanguageModel(config).mlm
    lines = pretrained._read(module, initial)
    return module.eval(), lines, initial.rows


@torch.no_grad()
@pytest.mark.parametrize("padding", [0, 2, 40])
@pytest.mark.parametrize("architecture", INSTALLED)
def test_extended(world: World, tmp_path: Path, architecture: str, padding: int) -> None:
    """Logits of old tokens are those of the model to the bit, those of new ones the means of their pieces'."""
    if padding and architecture not in ("bert", "modernbert", "eurobert"):
        return
    folder, model = model_folder(world, tmp_path / "model", architecture, padding)
    module, lines, rows = adapted(folder, world.corpus, "extend")
    old = len(Encoder(world.tokenizer).tokenizer.get_vocab())
    ids = torch.randint(5, old, (3, 12))
    expected, found = model(ids).logits, module(ids).logits
    assert found.shape[-1] == max(old + 3, old + padding) == rows.rows
    torch.testing.assert_close(found[..., :old], expected[..., :old], rtol=0, atol=1e-5)
    torch.testing.assert_close(found[..., old + 3 :], expected[..., old + 3 :], rtol=0, atol=1e-5)
    names = Encoder(world.extended).tokenizer
    for word in NEW:
        index = names.token_to_id(word)
        assert old <= index < old + 3
        mean = expected[..., world.pieces(word)].mean(-1)
        torch.testing.assert_close(found[..., index], mean, rtol=0, atol=1e-5)
        table = model.get_input_embeddings().weight
        row = module.get_input_embeddings().weight[index]
        torch.testing.assert_close(row, table[world.pieces(word)].mean(0))
    assert torch.equal(module.get_input_embeddings().weight[:old], model.get_input_embeddings().weight[:old])
    assert f"model.vocabulary extend: {old:,} tokens keep their embeddings, 3 start from the mean of their" in lines[1]
    assert (rows.kept, rows.averaged, rows.fresh) == (old, 3, 0)


@torch.no_grad()
def test_an_untied_decoder_is_adapted(world: World, tmp_path: Path) -> None:
    folder, model = model_folder(world, tmp_path / "model", "roberta", tie_word_embeddings=False)
    module, _, _ = adapted(folder, world.corpus, "extend")
    table, decoder = module.get_input_embeddings().weight, module.get_output_embeddings().weight
    assert not torch.equal(table, decoder)
    pieces, index = world.pieces("kubernetes"), Encoder(world.extended).tokenizer.token_to_id("kubernetes")
    torch.testing.assert_close(decoder[index], model.get_output_embeddings().weight[pieces].mean(0))
    torch.testing.assert_close(table[index], model.get_input_embeddings().weight[pieces].mean(0))


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["bert", "modernbert", "deberta-v2"])
def test_matched(world: World, tmp_path: Path, architecture: str) -> None:
    """Another order of the same tokens permutes inputs and logits."""
    folder, model = model_folder(world, tmp_path / "model", architecture, 7)
    module, lines, rows = adapted(folder, world.other, "match")
    ours, theirs = Encoder(world.other.tokenizer_folder).tokenizer, Encoder(world.tokenizer).tokenizer
    common = sorted(ours.get_vocab().keys() & theirs.get_vocab().keys())
    assert (rows.kept, rows.averaged, rows.fresh) == (len(common), 3, 0)
    assert rows.rows == world.other.manifest.vocab_size
    to_old = torch.tensor([theirs.token_to_id(token) for token in common])
    to_new = torch.tensor([ours.token_to_id(token) for token in common])
    places = torch.randint(0, len(common), (3, 12))
    expected, found = model(to_old[places]).logits, module(to_new[places]).logits
    torch.testing.assert_close(found[..., to_new], expected[..., to_old], rtol=0, atol=1e-5)
    assert "model.vocabulary match" in lines[1]


def test_a_token_without_pieces_starts_at_random(world: World, tmp_path: Path) -> None:
    folder, model = model_folder(world, tmp_path / "model", "bert")
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = content["model"]["vocab"]
    # The model does not know the letters of "kubernetes": they have other names there.
    content["model"]["vocab"] = {
        ("Ω" * i if "u" in token else token): i for i, (token, _) in enumerate(vocabulary.items())
    }
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    module, _, rows = adapted(folder, world.corpus, "match")
    assert rows.fresh > 0
    index = Encoder(world.extended).tokenizer.token_to_id("kubernetes")
    assert rows.bounds[index] == rows.bounds[index + 1]
    table = module.get_input_embeddings().weight
    assert table.isfinite().all()
    assert table[index].abs().max() < 0.2
    assert not (table[index] == model.get_input_embeddings().weight).all(1).any()


@torch.no_grad()
def test_a_new_head_has_nothing_to_adapt(world: World, tmp_path: Path) -> None:
    folder, model = model_folder(world, tmp_path / "model", "bert")
    module, lines, _ = adapted(folder, world.corpus, "extend", new_head=True)
    assert len(lines) == 3
    assert torch.equal(module.cls.predictions.bias, torch.zeros_like(module.cls.predictions.bias))
    old = model.get_input_embeddings().weight
    assert torch.equal(module.get_input_embeddings().weight[: len(old)], old)


KINDS_OF_PIECES = ("bert", "roberta", "xlm-roberta", "deberta-v2", "modernbert", "eurobert", "mpnet")


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Pieces, Encoder]]:
    root = tmp_path_factory.mktemp("pieces")
    folders = {kind: bert(root / kind) if kind == "bert" else save(kind, root / kind) for kind in KINDS_OF_PIECES}
    return {kind: (Pieces(folder), Encoder(folder)) for kind, folder in folders.items()}


@pytest.mark.parametrize("ours", KINDS_OF_PIECES)
@pytest.mark.parametrize("theirs", KINDS_OF_PIECES)
def test_pieces_are_those_of_the_text(pieces: dict[str, tuple[Pieces, Encoder]], ours: str, theirs: str) -> None:
    """Every word of one tokenizer, in a text that the other encodes; the text before it is the same."""
    new, (old, encoder) = pieces[ours][0], pieces[theirs]
    unknown = encoder.special_tokens.unk
    before = encoder.encode(["a"])[0].tolist()
    compared = 0
    for token in new.ids:
        surface = new.surface(token)
        if surface is None or not surface.starts_word or not surface.text.isalpha() or not surface.text.isascii():
            continue
        expected = encoder.encode([f"a {surface.text}"])[0].tolist()[len(before) :]
        assert old.pieces(surface) == [piece for piece in expected if piece != unknown], token
        compared += 1
    assert compared > 5
    # Within a kind, a token is its own piece, unless it is special or starts a word of its own.
    if ours == theirs:
        kept = [token for token in new.ids if (s := new.surface(token)) and s.text.isalpha() and s.text.islower()]
        assert sum(new.pieces(new.surface(token)) == [new.ids[token]] for token in kept) > 0.9 * len(kept)


def test_surfaces(pieces: dict[str, tuple[Pieces, Encoder]]) -> None:
    for kind, start, rest in (("bert", "kube", "##ation"), ("roberta", "Ġthe", "the"), ("xlm-roberta", "▁the", "the")):
        found = pieces[kind][0]
        assert found.surface(start) == Surface(start.strip("Ġ▁"), True)
        assert found.surface(rest) == Surface(rest.strip("#"), False)
    assert pieces["roberta"][0].surface("Ã") is None
    # "," after a word is a word of BERT's.
    old = pieces["bert"][0]
    assert old.pieces(Surface(",", False)) == [old.ids[","]]
    assert old.pieces(Surface("ation", False)) == [old.ids["##ation"]]
    assert old.pieces(Surface("東", False)) == []


def test_special_tokens_are_matched_by_role(world: World, tmp_path: Path) -> None:
    """A corpus of RoBERTa's tokenizer, whose <pad> has the id 1; BERT's [PAD] 0, [MASK] 4."""
    text = tmp_path / "text.txt"
    text.write_text(DOMAIN * 40, encoding="utf-8")
    build([text], tokenizer=save("roberta", tmp_path / "r"), sequence_length=16, output=tmp_path / "c", progress=False)
    corpus = Corpus(tmp_path / "c")
    folder, model = model_folder(world, tmp_path / "model", "bert")
    module, _, rows = adapted(folder, corpus, "match")
    old, special = Pieces(folder), corpus.manifest.special_tokens
    for role, token in (("cls", "[CLS]"), ("sep", "[SEP]"), ("pad", "[PAD]"), ("mask", "[MASK]"), ("unk", "[UNK]")):
        row = module.get_input_embeddings().weight[getattr(special, role)]
        assert torch.equal(row, model.get_input_embeddings().weight[old.ids[token]])
    assert rows.averaged > 50


def test_refusals(world: World, tmp_path: Path) -> None:
    folder, _ = model_folder(world, tmp_path / "model", "bert")
    initial = InitialWeights(folder, "")
    with pytest.raises(ConfigError, match=r"or set model.vocabulary to extend to adapt the model to the corpus"):
        for_corpus(initial, world.corpus, "same")
    with pytest.raises(ConfigError, match=r"or set model.vocabulary to match to adapt the model to the corpus"):
        for_corpus(initial, world.other, "same")
    with pytest.raises(ConfigError, match=r"do not have their ids \(.* --extend .*or set model.vocabulary to match"):
        for_corpus(initial, world.other, "extend")
    with pytest.raises(ValueError, match="vocabulary extend needs initialize_from"):
        ModelConfig(vocabulary="extend")
    for path in world.extended.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    content["vocab_size"] += 3
    (folder / "config.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"has the vocabulary of .*; remove the setting, or build the"):
        for_corpus(initial, world.corpus, "extend")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match=r"tokenizer.json: missing, needed for model.vocabulary; load the tokenizer"):
        for_corpus(initial, world.corpus, "match")


def test_tokens_added_to_the_tokenizer_alone_are_new(world: World, tmp_path: Path) -> None:
    """The model's folder has the extended tokenizer already, its table does not."""
    folder, _ = model_folder(world, tmp_path / "model", "bert")
    for path in world.extended.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    module, _, rows = adapted(folder, world.corpus, "extend")
    assert rows.averaged + rows.fresh == 3
    assert module.get_input_embeddings().num_embeddings == world.corpus.manifest.vocab_size


def test_resuming_with_another_setting_is_refused(world: World, tmp_path: Path) -> None:
    folder, _ = model_folder(world, tmp_path / "model", "bert")
    model = ModelConfig(initialize_from=folder, vocabulary="extend")
    digest = weights_digest(folder)
    identity = {"model": {**model.identity(), "initialize_from": digest}}
    settings = {"model.initialize_from": str(folder), "model.vocabulary": "extend"}
    checkpoint = Checkpoint(tmp_path, CheckpointState(1, 1, 1, 0, "float32", [], identity, settings))
    assert resolve_model_config(model, checkpoint)[1] == InitialWeights(folder, digest)
    with pytest.raises(CheckpointError, match=r"started with model.vocabulary extend, and it is same now"):
        resolve_model_config(ModelConfig(initialize_from=folder), checkpoint)


def test_rows_of_padded_tables(world: World, tmp_path: Path) -> None:
    folder, _ = model_folder(world, tmp_path / "model", "bert", 64)
    assert adapted(folder, world.corpus, "extend")[2].rows == table_rows(folder)


assert set(KINDS_OF_PIECES) - {"bert"} <= set(KINDS)

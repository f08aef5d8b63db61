"""Small tokenizers of the kinds that encoders are released with, saved as transformers 5 saves them."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from data_pipeline.tokenization.bert_folder import BERT_ROLES, BertSettings, bert_tokenizer, save_bert

TEXT = [
    "The quick brown fox jumps over the lazy dog; the lazy dogs sleep. It's theirs, isn't it?",
    "Der Käfer möchte über die Brücke, naïve café déjà vu. Ärger, ÉCOLE, garçon!",
    "東京は日本の首都です。漢字かな交じり文、中文没有空格。한국어 단어",
    "def f(x):\n    return x + 1\n\n\nvalue = 3.14159 # 2024-11-27\twith tabs",
    "Emoji 😀 👩‍👩‍👧 and ﬁ ligatures, ½ of it. Ελληνικά, русский язык, עברית",
    "A line ends here.\nThe next one.\nAnd one more.\nFour!\n\nA paragraph.\n\nThe last.\nOne!\n\nEnd",
]
# Llama 3's pattern, which EuroBERT uses.
LLAMA = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
ANGLED = ["<s>", "<pad>", "</s>", "<unk>"]
SQUARE = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


# A text with words that the small tokenizers split.
DOMAIN = "The kubernetes of myokarditis, fibrillation, kubernetes and kubernetes again.\n"


def bert(folder: Path) -> Path:
    """BERT's tokenizer with the characters of the texts above, and few longer pieces."""
    folder.mkdir(parents=True)
    letters = {c for text in (*TEXT, DOMAIN) for c in text.lower() if c.isascii() and not c.isspace()}
    tokens = [*BERT_ROLES.values(), *sorted(letters), *(f"##{c}" for c in sorted(letters))]
    settings = BertSettings(lower_case=True)
    vocabulary = {token: i for i, token in enumerate([*tokens, "kube", "##ation", "##ubern"])}
    save_bert(bert_tokenizer(vocabulary, settings), folder, settings)
    return folder


def byte_bpe(special: list[str], pre_tokenizer: Any, ignore_merges: bool = False, size: int = 420) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        TEXT * 3,
        trainers.BpeTrainer(vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    return tokenizer


def unigram(special: list[str], unk: str, tail: tuple[str, ...] = ()) -> list[tuple[str, float]]:
    """Pieces of a Unigram vocabulary with their scores; the special tokens first."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    trainer = trainers.UnigramTrainer(vocab_size=320, special_tokens=special, unk_token=unk, show_progress=False)
    tokenizer.train_from_iterator(TEXT * 3, trainer)
    pieces = json.loads(tokenizer.to_str())["model"]["vocab"]
    return [(piece, score) for piece, score in pieces] + [(piece, 0.0) for piece in tail]


def roberta(folder: Path, **options: Any) -> None:
    from transformers import RobertaTokenizer

    trained = byte_bpe([*ANGLED, "<mask>"], pre_tokenizers.ByteLevel(add_prefix_space=False))
    model = json.loads(trained.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    RobertaTokenizer(vocab=model["vocab"], merges=merges, **options).save_pretrained(folder)


def charsmap() -> bytes:
    """A compiled map of SentencePiece that writes "A" as "a": a Darts trie of one key, and its values.

    Format: https://github.com/google/sentencepiece, src/normalizer.cc, DecodePrecompiledCharsMap.
    """
    trie = [0] * 0x200
    trie[ord("A")] = ord("A") | 1 << 8 | 0x100 << 10  # label, has a leaf, offset of its unit
    trie[ord("A") ^ 0x100] = 1 << 31  # value 0, the place of "a" in the values
    return struct.pack("<I", 4 * len(trie)) + struct.pack(f"<{len(trie)}I", *trie) + b"a\0"


def xlm_roberta(folder: Path, **options: Any) -> None:
    from transformers import XLMRobertaTokenizer

    XLMRobertaTokenizer(vocab=unigram(ANGLED, "<unk>", ("<mask>",)), **options).save_pretrained(folder)


def camembert(folder: Path, **options: Any) -> None:
    from transformers import CamembertTokenizer

    special = ["<s>NOTUSED", "<pad>", "</s>NOTUSED", "<unk>", "<unk>NOTUSED", "<s>", "</s>"]
    CamembertTokenizer(vocab=unigram(special, "<unk>", ("<mask>",)), **options).save_pretrained(folder)


def albert(folder: Path, **options: Any) -> None:
    from transformers import AlbertTokenizer

    AlbertTokenizer(vocab=unigram(["<pad>", "<unk>", "[CLS]", "[SEP]", "[MASK]"], "<unk>"), **options).save_pretrained(
        folder
    )


def deberta_v2(folder: Path, **options: Any) -> None:
    from transformers import DebertaV2Tokenizer

    vocabulary = unigram(["[PAD]", "[CLS]", "[SEP]", "[UNK]"], "[UNK]")
    DebertaV2Tokenizer(vocab=vocabulary, **options).save_pretrained(folder)


def mpnet(folder: Path, **options: Any) -> None:
    from transformers import MPNetTokenizer

    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["<s>", "<pad>", "</s>", "<unk>", "[UNK]", "<mask>"]
    trainer = trainers.WordPieceTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(TEXT * 3, trainer)
    MPNetTokenizer(vocab=tokenizer.get_vocab(), **options).save_pretrained(folder)


def modernbert(folder: Path) -> None:
    """Byte-level BPE with BERT's special tokens, and runs of spaces as added tokens."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = byte_bpe(SQUARE, pre_tokenizers.ByteLevel(add_prefix_space=False))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.add_tokens([AddedToken(" " * n, normalized=True) for n in range(8, 1, -1)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    roles = {"pad": 0, "unk": 1, "cls": 2, "sep": 3, "mask": 4}
    names = {f"{role}_token": SQUARE[i] for role, i in roles.items()}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)


def eurobert(folder: Path) -> None:
    """Byte-level BPE with Llama 3's pattern, without an unknown token; bos and eos in place of cls and sep."""
    from transformers import PreTrainedTokenizerFast

    step = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer = byte_bpe([], step, ignore_merges=True)
    tokenizer.add_special_tokens(["<|begin_of_text|>", "<|end_of_text|>", "<|mask|>", "<|pad|>", "<|reserved_0|>"])
    ids = [(name, tokenizer.token_to_id(name)) for name in ("<|begin_of_text|>", "<|end_of_text|>")]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A <|end_of_text|>",
        pair="<|begin_of_text|> $A <|end_of_text|> $B:1 <|end_of_text|>:1",
        special_tokens=ids,
    )
    names = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}
    names |= {"mask_token": "<|mask|>", "pad_token": "<|pad|>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)


KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "roberta": (roberta, {}),
    "roberta with a prefix space": (roberta, {"add_prefix_space": True}),
    "xlm-roberta": (xlm_roberta, {}),
    "xlm-roberta with a normalizer": (xlm_roberta, {"_spm_precompiled_charsmap": charsmap()}),
    "camembert": (camembert, {}),
    "albert": (albert, {}),
    "albert cased": (albert, {"do_lower_case": False, "keep_accents": True}),
    "deberta-v2": (deberta_v2, {}),
    "deberta-v2 lower case": (deberta_v2, {"do_lower_case": True, "split_by_punct": True}),
    "deberta-v2 without a prefix": (deberta_v2, {"add_prefix_space": False}),
    "mpnet": (mpnet, {}),
    "mpnet cased": (mpnet, {"do_lower_case": False, "tokenize_chinese_chars": False}),
    "modernbert": (modernbert, {}),
    "eurobert": (eurobert, {}),
}


def save(kind: str, folder: Path) -> Path:
    make, options = KINDS[kind]
    make(folder, **options)
    return folder


def enlarge(folder: Path, size: int) -> Path:
    """Insert unused pieces after the first four special tokens of an XLM-R folder, so that it has `size` tokens, the
    last of which is <mask>: as the released one with its 250,002."""
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = content["model"]["vocab"]
    vocabulary[4:4] = [[f"unused{i}", -100.0] for i in range(size - len(vocabulary))]
    for token in content["added_tokens"]:
        token["id"] = size - 1 if token["content"] == "<mask>" else token["id"]
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    return as_first_released(folder, "xlm-roberta")


def as_first_released(folder: Path, model_type: str) -> Path:
    """Make a folder like the first releases: no class and no special tokens but in tokenizer.json, a config.json."""
    (folder / "tokenizer_config.json").write_text('{"model_max_length": 512}', encoding="utf-8")
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}), encoding="utf-8")
    return folder

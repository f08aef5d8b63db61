"""Faults of configurations, met by `maskvr config` (and by `maskvr train` before a rank starts)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from tests.support.corpora import change_manifest, make_corpus
from tests.support.pairs import make_pairs
from tests.unit.faults.case import Fault, Prepare, cuts, removes, writes
from tests.unit.faults.world import RUN

CONFIG = "maskvr config --config run.yaml"


def sets(what: str, assignment: str, said: str) -> Fault:
    return Fault(what, f"{CONFIG} --set {assignment}", said)


def deepspeed(what: str, text: str, said: str) -> Fault:
    return Fault(what, f"{CONFIG} --set deepspeed=ds.json", said, prepare=writes("ds.json", text))


def model_of(*, without: int = 0, reverse: bool = False, tokenizer: bool = True) -> Prepare:
    """Write the folder `model`, with the corpus' tokenizer: without its last tokens, or with all in reverse order."""

    def prepare(folder: Path) -> None:
        content = json.loads((folder / "corpus/tokenizer/tokenizer.json").read_text(encoding="utf-8"))
        tokens = list(content["model"]["vocab"])
        tokens = [*tokens[:5], *(reversed(tokens[5:]) if reverse else tokens[5 : len(tokens) - without])]
        content["model"]["vocab"] = {token: index for index, token in enumerate(tokens)}
        shutil.copytree(folder / "corpus/tokenizer", folder / "model")
        (folder / "model/vocab.txt").unlink()
        (folder / "model/tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
        if not tokenizer:
            (folder / "model/tokenizer.json").unlink()
        config = {"model_type": "bert", "vocab_size": len(tokens), **RUN["model"]}
        (folder / "model/config.json").write_text(json.dumps(config), encoding="utf-8")
        (folder / "model/model.safetensors").write_bytes(b"")

    return prepare


_MODEL = f"{CONFIG} --set model.initialize_from=model"
VOCABULARIES = [
    Fault(
        "an initial model with fewer tokens",
        _MODEL,
        "corpus: its tokenizer has … tokens, but the model in model has …; build the corpus with that model's "
        "tokenizer (--tokenizer model), or set model.vocabulary to extend to adapt the model to the corpus",
        prepare=model_of(without=2),
    ),
    Fault(
        "an initial model with the tokens in another order",
        _MODEL,
        "corpus: its token ids differ from those of model (…); build the corpus with that model's tokenizer "
        "(--tokenizer model), or set model.vocabulary to match to adapt the model to the corpus",
        prepare=model_of(reverse=True),
    ),
    Fault(
        "a vocabulary that does not extend the model's",
        f"{_MODEL} --set model.vocabulary=extend",
        "corpus: model.vocabulary is extend, and … of the … tokens of model do not have their ids (…); make the "
        "tokenizer with `python -m data_pipeline tokenizer --extend model`, or set model.vocabulary to match",
        prepare=model_of(reverse=True),
    ),
    Fault(
        "a vocabulary to extend that is the same",
        f"{_MODEL} --set model.vocabulary=extend",
        "corpus: model.vocabulary is extend, and its tokenizer has the vocabulary of model; remove the setting, or "
        "build the corpus with the other tokenizer",
        prepare=model_of(),
    ),
    Fault(
        "a vocabulary to match, and no tokenizer of the model",
        f"{_MODEL} --set model.vocabulary=match",
        "model/tokenizer.json: missing, needed for model.vocabulary; load the tokenizer with transformers' "
        "AutoTokenizer and save it there with save_pretrained",
        prepare=model_of(tokenizer=False),
    ),
    sets(
        "a vocabulary to extend without a model",
        "model.vocabulary=extend",
        "model: vocabulary extend needs initialize_from: without it the vocabulary is the corpus'",
    ),
]
FAULTS = [
    sets(
        "a key that does not exist",
        "optimizer.learning_rate=1",
        "optimizer.learning_rate: unknown key; known keys are name, lr, betas, …, gradient_clipping",
    ),
    sets("a key of an earlier version", "mapnet.floor=0.1", "mapnet.floor is now masking.mapnet.floor"),
    sets(
        "a learning rate that is infinite",
        "optimizer.lr=.inf",
        "optimizer.lr: Input should be a finite number (given: inf)",
    ),
    sets(
        "a truth value for a number",
        "optimizer.lr=yes",
        "optimizer.lr: expected a number, found true, as YAML also reads yes, no, on and off",
    ),
    sets(
        "a number of steps that is no integer",
        "training.steps=1.5",
        "training.steps: Input should be a valid integer, got a number with a fractional part (given: 1.5)",
    ),
    sets(
        "a huge seed",
        "seed=100000000000000000000000",
        "seed: Input should be less than or equal to 9223372036854775807 (given: 100000000000000000000000)",
    ),
    sets("a rate above 1", "masking.rate=1.5", "masking.rate: Input should be less than 1 (given: 1.5)"),
    sets(
        "a rate that rises under auto",
        "masking.strategy=auto --set masking.final_rate=0.5",
        "masking: final_rate 0.5 is above rate 0.15; under strategy auto the rate may only fall: exchange the two, or "
        "remove final_rate",
    ),
    sets(
        "a rate that falls below one prediction per row",
        "masking.strategy=auto --set masking.final_rate=0.01",
        "masking.final_rate 0.01: less than one prediction in a row of 14 tokens; set it to at least 0.0357",
    ),
    sets(
        "a corpus too small to measure on",
        "masking.strategy=auto --set masking.auto.rows=100000",
        "masking.auto.rows 100000: …corpus has only … rows",
    ),
    sets(
        "too few rows to measure on",
        "masking.strategy=auto --set masking.auto.rows=4",
        "masking.auto.rows: Input should be greater than or equal to 5 (given: 4)",
    ),
    sets(
        "an unknown strategy",
        "masking.strategy=half",
        "masking.strategy: Input should be 'uniform', 'whole_word', 'span', 'fully_explored', "
        "'frequency', 'mapnet' or 'auto' (given: 'half')",
    ),
    sets(
        "one checkpoint to keep",
        "checkpoint.keep_last=1",
        "checkpoint.keep_last: Input should be greater than or equal to 2 (given: 1)",
    ),
    sets(
        "a path that YAML reads as a number",
        "output_dir=20240601",
        "output_dir: expected a path, found 20240601, which YAML reads as int; put it in quotes (--set "
        "'FIELD=\"20240601\"')",
    ),
    sets(
        "a home folder written as ~",
        "output_dir=~/runs",
        "output_dir: ~/runs: ~ is not replaced by your home folder here; write the full path",
    ),
    sets(
        "an output_dir that is a file",
        "output_dir=run.yaml",
        "output_dir run.yaml: is a file, a folder expected; choose another",
    ),
    sets(
        "an output_dir below a file",
        "output_dir=run.yaml/runs/1",
        "output_dir run.yaml/runs/1: run.yaml is a file, a folder expected; choose another",
    ),
    sets(
        "a batch that micro-batches do not divide",
        "batch.global_size=10",
        "batch.global_size 10 is not a multiple of batch.micro_size 4 × 1 ranks = 4; set "
        "batch.micro_size to 2, or batch.global_size to 8 or 12",
    ),
    Fault(
        "a batch that the ranks do not divide",
        f"{CONFIG} --num-gpus 7",
        "batch.global_size 8 is not a multiple of batch.micro_size 4 × 7 ranks = 28; set "
        "batch.global_size to 28, or to 7 or 14 with a batch.micro_size that divides a rank's share",
    ),
    sets(
        "no corpus there",
        "data.path=nowhere",
        "nowhere: no such folder. Correct the path, or build the corpus first",
    ),
    sets(
        "a folder that is no corpus",
        "data.path=texts",
        "texts/manifest.json: not found. This is not a corpus, or its build has not finished: rerun the build command",
    ),
    sets(
        "rows longer than the positions",
        "model.max_position_embeddings=8",
        "corpus: sequences of 16 tokens exceed model.max_position_embeddings 8",
    ),
    sets(
        "heads that do not divide the width",
        "model.num_attention_heads=3",
        "model: hidden_size 8 is not a multiple of num_attention_heads 3",
    ),
    sets(
        "an unknown preset",
        "model.preset=bert-huge",
        "model.preset: Input should be 'bert-tiny', …, 'modernbert-base' or 'modernbert-large' (given: 'bert-huge')",
    ),
    sets(
        "an unknown DeepSpeed configuration",
        "deepspeed=zero9",
        "deepspeed: 'zero9' is neither a file nor one of zero0_bf16, zero0_fp32, zero1_bf16, zero1_fp16, "
        "zero1_fp32, zero2_bf16, zero2_bf16_offload, zero2_fp16, zero2_fp32, zero3_bf16, …",
    ),
    deepspeed(
        "a DeepSpeed file that is no JSON",
        "{",
        "ds.json: not JSON: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)",
    ),
    deepspeed(
        "a DeepSpeed file with NaN", '{"a": NaN}', "ds.json: a is nan; a finite number of at most 1e+15 expected"
    ),
    deepspeed(
        "a ZeRO stage that does not exist",
        '{"zero_optimization": {"stage": 4}}',
        "ds.json: ZeRO stage 4; supported are 0, 1, 2, 3",
    ),
    deepspeed(
        "a DeepSpeed file with its own optimizer",
        '{"optimizer": {"type": "Adam"}}',
        "ds.json: sets optimizer to {'type': 'Adam'}, which the run's config owns; remove the key (or set"
        ' it to "auto") and set optimizer in the run config',
    ),
    deepspeed(
        "a DeepSpeed file with its own batch size",
        '{"train_batch_size": 8}',
        "ds.json: sets train_batch_size to 8, which the run's config owns; remove the key (or set it to "
        '"auto") and set batch.global_size in the run config',
    ),
    sets(
        "no initial model",
        "model.initialize_from=nowhere/",
        "model.initialize_from nowhere: no such folder; expected a folder written by "
        "save_pretrained or `maskvr export`, or the name of a model on a hub (OWNER/NAME)",
    ),
    Fault(
        "a missing shard",
        CONFIG,
        "corpus/shard-00000.arrow: shard is missing. Copy it again or build the corpus again",
        prepare=removes("corpus/shard-00000.arrow"),
    ),
    Fault(
        "a shard that is cut",
        CONFIG,
        "corpus/shard-00000.arrow: 12,410 bytes expected, 12,409 found. Copy it again or build the corpus again",
        prepare=cuts("corpus/shard-00000.arrow"),
    ),
    Fault(
        "a corpus of unknown words",
        f"{CONFIG} --set data.path=unknown",
        "unknown: nothing to predict: all tokens of its 20 rows for training are special tokens, or unknown to "
        "the tokenizer ([UNK]); build it with a tokenizer that fits the text",
        prepare=lambda folder: make_corpus(folder / "unknown", rows=20, length=16, unknown=True),
    ),
    Fault(
        "a held-out corpus of unknown words",
        f"{CONFIG} --set data.path=known --set data.held_out_path=unknown --set evaluation.every_steps=2",
        "unknown: nothing to predict: all tokens of its 20 rows for evaluation are special tokens, or unknown to "
        "the tokenizer ([UNK]); set data.held_out_path to another corpus, or set evaluation.every_steps=0",
        prepare=lambda folder: [
            make_corpus(folder / name, rows=20, length=16, unknown=name == "unknown") for name in ("known", "unknown")
        ],
    ),
    Fault(
        "attention within documents on sentence pairs",
        f"{CONFIG} --set data.path=pairs --set data.attention=documents --set objectives=[mlm] --set "
        "model.max_position_embeddings=32",
        "pairs: data.attention is documents, and the corpus has sentence pairs (packing sop), whose segments attend to "
        "each other; pack it with --packing full_sequences, or set data.attention to rows",
        prepare=lambda folder: make_pairs(folder / "pairs", "sop", rows=20),
    ),
    sets(
        "attention within documents and an objective of pairs",
        "data.attention=documents --set objectives=[mlm,nsp]",
        "data.attention documents: the two segments of a pair attend to each other, and objectives.nsp is set; set "
        "data.attention to rows, or objectives to [mlm] with a corpus without pairs",
    ),
    sets(
        "attention within documents by an architecture that has its own",
        "data.attention=documents --set 'model={architecture: deberta-v2, settings: {max_position_embeddings: 16, "
        "hidden_size: 8, num_attention_heads: 2, num_hidden_layers: 1, intermediate_size: 8}}'",
        "data.attention is documents, and deberta-v2 of transformers computes attention by code of its own, which "
        "knows no documents; set data.attention to rows, or choose another architecture",
    ),
    sets(
        "late mask tokens with kept and random tokens",
        "masking.late_layer=1",
        "masking: late_layer 1: all predicted positions must be [MASK], which the layers below do not see, and "
        "mask_probability is 0.8; set mask_probability to 1 and random_probability to 0",
    ),
    sets(
        "late mask tokens beyond the layers",
        "masking.late_layer=9 --set masking.mask_probability=1 --set masking.random_probability=0",
        "masking.late_layer 9: [MASK] must enter before the last layer, and bert has 1 layers; set it to at most 0",
    ),
    sets(
        "late mask tokens in an architecture with one layer for all",
        "masking.late_layer=1 --set masking.mask_probability=1 --set masking.random_probability=0 --set "
        "'model={architecture: albert, settings: {max_position_embeddings: 16, hidden_size: 8, num_attention_heads: 2, "
        "num_hidden_layers: 2, intermediate_size: 8}}'",
        "masking.late_layer 1: albert of transformers has no list of its 2 layers, which are called one by one; set "
        "masking.late_layer to 0, or choose another architecture",
    ),
    sets(
        "late mask tokens among the choices of auto, with kept and random tokens",
        "masking.strategy=auto --set masking.auto.late_layers=[1]",
        "masking: auto.late_layers 1: all predicted positions must be [MASK], which the layers below do not see, and "
        "mask_probability is 0.8; set mask_probability to 1 and random_probability to 0",
    ),
    sets(
        "late mask tokens among the choices of auto, beyond the layers",
        "masking.strategy=auto --set masking.auto.late_layers=[9] --set masking.mask_probability=1 --set "
        "masking.random_probability=0",
        "masking.auto.late_layers 9: [MASK] must enter before the last layer, and bert has 1 layers; set it to at most "
        "0",
    ),
    sets(
        "late mask tokens among the choices of auto, in an architecture with one layer for all",
        "masking.strategy=auto --set masking.auto.late_layers=[1] --set masking.mask_probability=1 --set "
        "masking.random_probability=0 --set 'model={architecture: albert, settings: {max_position_embeddings: 16, "
        "hidden_size: 8, num_attention_heads: 2, num_hidden_layers: 2, intermediate_size: 8}}'",
        "masking.auto.late_layers 1: albert of transformers has no list of its 2 layers, which are called one by one; "
        "set masking.auto.late_layers to [], or choose another architecture",
    ),
    sets(
        "late mask tokens in an encoder that is compiled as a whole",
        "masking.late_layer=1 --set masking.mask_probability=1 --set masking.random_probability=0 --set "
        "training.compile=model",
        "training.compile model: an encoder cannot be compiled as a whole with masking.late_layer; set it to layers",
    ),
    Fault(
        "attention within documents on rows without separators",
        f"{CONFIG} --set data.path=endless --set data.attention=documents",
        "endless: data.attention is documents, and none of 20 rows has a separator (token 3), which ends a document: "
        "where documents start is not known; build the corpus again by `python -m data_pipeline build`, or set "
        "data.attention to rows",
        prepare=lambda folder: make_corpus(folder / "endless", rows=20, length=16, separated=False),
    ),
    Fault(
        "attention within documents with one token for two roles",
        f"{CONFIG} --set data.attention=documents",
        "corpus: data.attention is documents, and token 3 is both sep and cls of its tokenizer, so that the ends of "
        "documents cannot be found; build the corpus with a tokenizer that has a token for each, or set data.attention "
        "to rows",
        prepare=lambda folder: change_manifest(
            folder / "corpus", lambda content: content["special_tokens"].update(cls=3)
        ),
    ),
    Fault(
        "a configuration that is no YAML",
        "maskvr config --config a.yaml",
        "config a.yaml: not YAML: while parsing a flow node",
        prepare=writes("a.yaml", "a: ["),
    ),
    Fault(
        "a configuration that is a list",
        "maskvr config --config a.yaml",
        "config a.yaml: a mapping of sections expected, found list",
        prepare=writes("a.yaml", "- 1\n"),
    ),
    Fault(
        "a key given twice",
        "maskvr config --config a.yaml",
        "config a.yaml, line 2: key seed is given twice, first in line 1; remove one of them",
        prepare=writes("a.yaml", "seed: 1\nseed: 2\n"),
    ),
    Fault(
        "aliases that expand without bound",
        "maskvr config --config a.yaml",
        "config a.yaml, line 6: more than 100,000 values, its aliases (*name) written out; remove the aliases",
        prepare=writes(
            "a.yaml", "a0: &a0 [1]\n" + "".join(f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 10))
        ),
    ),
    Fault(
        "a base that leads back",
        "maskvr config --config a.yaml",
        "config a.yaml: base ./a.yaml leads back to itself (a.yaml -> a.yaml)",
        prepare=writes("a.yaml", "base: ./a.yaml\n"),
    ),
    Fault(
        "no such configuration",
        "maskvr config --config nowhere.yaml",
        "config 'nowhere.yaml': neither a file nor a recipe (albert_base_4k, bert_base_4k, "
        "bert_base_4k_auto, bert_base_4k_frequency, bert_base_4k_fully_explored, bert_base_4k_mapnet, …",
    ),
    Fault(
        "an assignment without a value",
        f"{CONFIG} --set seed",
        "--set seed: section.field=value expected",
    ),
]

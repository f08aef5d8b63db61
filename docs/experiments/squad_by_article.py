"""A training and an evaluation set for `maskvr evaluate --tasks squad squad_v2` from evaluation sets of SQuAD alone.

    python docs/experiments/squad_by_article.py --v2 dev-v2.0.json.gz --xquad xquad.en.json.gz --output squad

For whom the published training sets are out of reach. No article is in both sets of a task. squad_v2: the file of
version 2.0, its first articles for training, the last ones for evaluation. squad: the answerable questions of that file
for training, XQuAD's articles that it does not have for evaluation.
"""

import argparse
import gzip
import json
from pathlib import Path
from typing import Any

Articles = list[dict[str, Any]]


def read(path: Path) -> Articles:
    content = path.read_bytes()
    articles: Articles = json.loads(gzip.decompress(content) if path.suffix == ".gz" else content)["data"]
    return articles


def answerable(articles: Articles) -> Articles:
    """Without questions that have no answer."""
    return [
        {
            **article,
            "paragraphs": [
                {**paragraph, "qas": [question for question in paragraph["qas"] if not question.get("is_impossible")]}
                for paragraph in article["paragraphs"]
            ],
        }
        for article in articles
    ]


def questions(articles: Articles) -> int:
    return sum(len(paragraph["qas"]) for article in articles for paragraph in article["paragraphs"])


def write(folder: Path, version: str, train: Articles, dev: Articles) -> None:
    shared = {article["title"] for article in train} & {article["title"] for article in dev}
    assert not shared, shared
    folder.mkdir(parents=True, exist_ok=True)
    for name, articles in (("train", train), ("dev", dev)):
        text = json.dumps({"version": version, "data": articles}, ensure_ascii=False)
        (folder / f"{name}-v{version}.json").write_text(text, encoding="utf-8")
        print(f"{folder}: {name}: {len(articles)} articles, {questions(articles):,} questions")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--v2", required=True, type=Path, help="a file of SQuAD 2.0")
    parser.add_argument("--xquad", required=True, type=Path, help="XQuAD's English file")
    parser.add_argument("--train-articles", type=int, default=11, help="articles of --v2 to train squad_v2 on")
    parser.add_argument("--output", required=True, type=Path)
    arguments = parser.parse_args()
    second, cut = read(arguments.v2), arguments.train_articles
    if not 0 < cut < len(second):
        parser.error(f"--train-articles {cut}: {arguments.v2} has {len(second)} articles, and both sets need some")
    titles = {article["title"] for article in second}
    others = [article for article in read(arguments.xquad) if article["title"] not in titles]
    write(arguments.output / "squad_v2", "2.0", second[:cut], second[cut:])
    write(arguments.output / "squad", "1.1", answerable(second), others)


if __name__ == "__main__":
    main()

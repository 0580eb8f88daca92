"""Labels that SmolLM2-135M induces beside clusters of MiniLM that it names, and a student of them.

    python benchmarks/taxonomy.py ../shared/data --part replies --engine vllm  # in a venv with vLLM
    python benchmarks/taxonomy.py ../shared/data --part replies --engine hf
    python benchmarks/taxonomy.py ../shared/data --part multidogo arena mt_bench
    python benchmarks/taxonomy.py ../shared/data --part student
    python benchmarks/taxonomy.py ../shared/data --part bertopic   # in a venv with bertopic
    llmlabel run tnt_llm; python benchmarks/taxonomy.py ../shared/data --part recipe
    python benchmarks/taxonomy.py ../shared/data --part write

Each part keeps its calls in `--work` and goes on there. True groups are read to measure, by nothing
else; but which ways are compared was decided after a look at the scores on these same rows. The last
command writes benchmarks/results/taxonomy.md.
"""

import argparse
import gzip
import json
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from llmlabel.engine import Engine, Reply
from llmlabel.labelspace import LabelSpace, load_labels
from llmlabel.metrics import cluster_scores
from llmlabel.models import MINILM, SMOLLM2

CASES = {
    "multidogo": ("sorting conversations of customers by the line of business", 6),
    "arena": ("sorting requests to an assistant by the kind of task", 3),
    "mt_bench": ("sorting requests to an assistant by the kind of task", 8),
}
SHORT: dict[str, Any] = {"words": 18, "name_words": 3, "description_words": 8}
WAYS = (
    "k-means + names",
    "TnT-LLM, 2 runs",
    "TnT-LLM, 2 runs, encoder chooses",
    "TnT-LLM from named clusters, encoder chooses",
)
CLUSTER_ID = "k-means, by cluster"
ENCODER, MODEL = "MiniLM", "SmolLM2, corrected, every second text"


def rows_of(case: str, data: Path) -> Dataset:
    """Every eighth conversation, every third prompt, or all; `group` is the true one."""
    if case == "multidogo":
        with gzip.open(data / "multidogo/multidogo.jsonl.gz", "rt", encoding="utf-8") as file:
            rows = [json.loads(line) for line in file][::8]
        texts = [row["text"].replace("CUSTOMER: ", "").replace("\n", " ") for row in rows]
        groups = [row["domain"] for row in rows]
    else:
        with (data / "prompts_unlabeled/prompts_unlabeled.jsonl").open(encoding="utf-8") as file:
            rows = [json.loads(line) for line in file]
        source, step = ("arena-hard-v2.0", 3) if case == "arena" else ("mt_bench", 1)
        rows = [row for row in rows if row["source"] == source][::step]
        texts = [row["text"] for row in rows]
        groups = [row["hidden_label"] for row in rows]
    return Dataset.from_dict({"id": [row["id"] for row in rows], "text": texts, "group": groups})


class Watched:
    """An engine that notes of every reply whether it is whole JSON, also for the next start."""

    def __init__(self, engine: Engine, *, one_by_one: bool = False) -> None:
        self.engine, self.name, self.one_by_one = engine, engine.name, one_by_one
        self.notes: Path | None = None

    def generate(self, chats: Sequence[Any], **given: Any) -> list[Reply]:
        """Notes every reply."""
        # vLLM 0.32 on a CPU dies of seeded prompts that it reads in parts, as it does of many long ones
        drawn = self.one_by_one and given["temperature"] > 0
        parts = [[chat] for chat in chats] if drawn else [list(chats)]
        replies = [reply for part in parts for reply in self.engine.generate(part, **given)]
        if self.notes is not None:
            first = next(iter(given["schema"]["properties"]))
            with self.notes.open("a", encoding="utf-8") as file:
                file.writelines(f"{_is_whole(reply.text)} {first}\n" for reply in replies)
        return replies

    def score(self, *args: Any, **given: Any) -> Any:
        """Notes nothing."""
        return self.engine.score(*args, **given)


def _is_whole(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False


def engine_of(kind: str) -> Watched:
    if kind == "vllm":
        from llmlabel.engine.vllm import VLLMEngine

        return Watched(VLLMEngine(SMOLLM2, max_tokens=4096, enforce_eager=True), one_by_one=True)
    from llmlabel.engine.hf import HFEngine

    return Watched(HFEngine(SMOLLM2, max_tokens=4096))


# ---------------------------------------------------------------------------------- the parts


def replies(data: Path, work: Path, engine: Watched) -> dict[str, Any]:
    """Summaries of 200 queries of clinc150, and one run over them."""
    from llmlabel.taxonomy.induce import induce, summarise

    with (data / "clinc150_oos/clinc150_oos.jsonl").open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    rows = [row for row in rows if row["split"] == "test" and row["label"] != "oos"][::22][:200]
    texts = Dataset.from_dict({"id": [r["id"] for r in rows], "text": [r["text"] for r in rows]})
    use_case, started = "sending requests to the right department", time.perf_counter()
    work.mkdir(parents=True, exist_ok=True)
    engine.notes = work / "replies.txt"
    short = summarise(
        texts, engine, use_case=use_case, words=6, block_rows=20, output=work / "summaries"
    )
    found = induce(
        short,
        engine,
        use_case=use_case,
        max_labels=10,
        batch_rows=50,
        remark_words=8,
        output=work / "induced",
        **SHORT,
    )
    counts, engine.notes = Counter((work / "replies.txt").read_text("utf-8").splitlines()), None
    return {
        "summaries": [counts["True summary"], counts["False summary"]],
        "without": sum(summary is None for summary in short["summary"][:]),
        "labels": [
            sum(n for what, n in counts.items() if what.startswith(whole) and "summary" not in what)
            for whole in ("True", "False")
        ],
        "rounds": len(found.history),
        "kept": sum(entry["problem"] is not None for entry in found.history),
        "names": list(found.labels.names),
        "seconds": time.perf_counter() - started,
    }


def quality(case: str, data: Path, work: Path, engine: Watched) -> Iterator[dict[str, Any]]:
    """Every way to come to labels, with every way to assign texts to them."""
    from llmlabel.label.direct import label_direct
    from llmlabel.label.embedding import label_embedding
    from llmlabel.models import load_encoder
    from llmlabel.refine.debias import batch_calibration
    from llmlabel.taxonomy.cluster import cluster_labels, cluster_taxonomy, cluster_texts
    from llmlabel.taxonomy.describe import with_examples
    from llmlabel.taxonomy.induce import induce

    rows, (use_case, k) = rows_of(case, data), CASES[case]
    texts, encoder = rows.select_columns(["id", "text"]), load_encoder(MINILM)
    clustered = cluster_texts(texts, encoder, n_labels=k)
    named = cluster_taxonomy(
        clustered, engine, use_case=use_case, nearest=8, output=work / "named", **SHORT
    )
    given: dict[str, Any] = {"use_case": use_case, "max_labels": k, "remark_words": 8, **SHORT}
    given |= {"batch_rows": 64, "runs": 2, "output": work / "induced"}
    sample = texts.select(range(0, len(texts), 2 if len(texts) > 100 else 1))
    gold = np.unique(rows["group"][:], return_inverse=True)[1]
    by_cluster = cluster_labels(clustered, named.labels)
    yield line(case, "k-means", CLUSTER_ID, by_cluster, named.labels, gold)
    started = {"encoder": encoder, "start": named.labels, "output": work / "started"}
    for way, more in zip(WAYS, (None, {}, {"encoder": encoder}, started), strict=True):
        try:
            labels = named.labels
            if more is not None:
                labels = induce(sample, engine, **{**given, **more}).labels
        except ValueError as error:
            yield {"case": case, "way": way, "error": str(error)}
            continue
        described = with_examples(texts, encoder, labels)
        for name, space in ((way, labels), (f"{way} + example texts", described)):
            by_encoder = label_embedding(texts, encoder, space)
            yield line(case, name, ENCODER, by_encoder, space, gold)
        if (
            case == "multidogo"
        ):  # the prompts of the others are long, and read by this model in vain
            few = range(0, len(texts), 2)
            direct = label_direct(texts.select(few), engine, labels, output=work / way)
            direct = batch_calibration(direct, labels)
            yield line(case, way, MODEL, direct, labels, gold[few])


def line(
    case: str, way: str, by: str, labelled: Dataset, labels: LabelSpace, gold: np.ndarray
) -> dict[str, Any]:
    from llmlabel.softlabels import SoftLabels
    from llmlabel.taxonomy.quality import information

    probs = SoftLabels.from_dataset(labelled, labels).dense()
    scores = cluster_scores(probs.argmax(axis=1), gold)
    told = {"labels": list(labels.names), "information": information(probs)}
    return {"case": case, "way": way, "by": by, **scores, **told}


def student(data: Path, work: Path, engine: Watched) -> dict[str, Any]:
    """Phase 2 on multidogo: SmolLM2 labels, MiniLM learns; both against the true domains."""
    from llmlabel.data import part, split
    from llmlabel.label.direct import label_direct
    from llmlabel.refine.debias import batch_calibration
    from llmlabel.softlabels import SoftLabels
    from llmlabel.train.classifier import predict, train_classifier

    rows = split(rows_of("multidogo", data), shares={"train": 0.7, "test": 0.3}, seed=0)
    names = json.loads((work.parent / "multidogo.json").read_text("utf-8"))
    way = "k-means + names"
    labels = load_labels(next(one["labels"] for one in names if one["way"] == way))
    taught = batch_calibration(label_direct(rows, engine, labels, output=work), labels)
    model = train_classifier(
        part(taught, split="train"),
        labels,
        model=MINILM,
        pooling="mean",
        num_train_epochs=4,
        learning_rate=1e-3,
        output=work / "model",
    )
    learned = predict(rows, model=model)
    is_test = np.array(rows["split"][:]) == "test"
    groups, gold = np.unique(rows["group"][:], return_inverse=True)
    best = {
        who: SoftLabels.from_dataset(table, labels).dense().argmax(axis=1)
        for who, table in (("SmolLM2", taught), ("student", learned))
    }
    counts = np.zeros((len(labels), len(groups)))
    np.add.at(counts, (best["SmolLM2"][~is_test], gold[~is_test]), 1)
    domain = counts.argmax(axis=1)  # what each label means, by the train rows: only to measure
    right = {who: float((domain[b] == gold)[is_test].mean()) for who, b in best.items()}
    agree = float((best["SmolLM2"] == best["student"])[is_test].mean())
    return {
        "labels": list(labels.names),
        "test": int(is_test.sum()),
        "right": right,
        "agree": agree,
    }


def recipe(run: Path) -> dict[str, Any]:
    """What recipes/tnt_llm.yaml kept, against the sections of BBC News: the folders in the ids."""
    from llmlabel.label.embedding import unit_vectors
    from llmlabel.models import load_encoder
    from llmlabel.softlabels import SoftLabels

    spaces = {
        n: json.loads((run / n / "value.json").read_text("utf-8")) for n in ("named", "found")
    }
    labels = load_labels(run / "student" / "labels.json")
    found: dict[str, Any] = {n: space["labels"]["names"] for n, space in spaces.items()}
    quality = json.loads((run / "quality" / "value.json").read_text("utf-8"))
    found |= {"coverage": quality["coverage"], "pairwise": quality["pairwise"], "rows": []}
    clustered, texts = (
        Dataset.from_parquet(str(run / name / "value.parquet")) for name in ("clustered", "texts")
    )
    test = texts.select(np.flatnonzero(np.array(texts["split"][:]) == "test"))
    encoder, clusters = load_encoder(MINILM), np.array(clustered["cluster"][:])
    vectors = unit_vectors(encoder, clustered["text"][:])
    centres = np.array([vectors[clusters == k].mean(axis=0) for k in range(clusters.max() + 1)])
    centres /= np.linalg.norm(centres, axis=1, keepdims=True)
    best = {"k-means, nearest centre": (unit_vectors(encoder, test["text"][:]) @ centres.T)}
    for who, name in {
        "SmolLM2": "raw",
        "SmolLM2, corrected": "by_model",
        "MiniLM": "by_encoder",
        "Consensus": "labeled",
        "Student": "predicted",
    }.items():
        rows = Dataset.from_parquet(str(run / name / "value.parquet"))
        rows = rows.select(np.flatnonzero(np.array(rows["split"][:]) == "test"))
        assert rows["id"][:] == test["id"][:]
        best[who] = SoftLabels.from_dataset(rows, labels).dense()
    gold = np.unique([id.split("/")[0] for id in test["id"][:]], return_inverse=True)[1]
    for who, scores in best.items():
        found["rows"].append({"who": who, **cluster_scores(scores.argmax(axis=1), gold)})
    return found | {"n": len(test)}


def bertopic(data: Path) -> list[dict[str, Any]]:
    from bertopic import BERTopic
    from sklearn.cluster import KMeans

    from llmlabel.models import load_encoder

    found = []
    for case, (_, k) in CASES.items():
        rows = rows_of(case, data)
        topics, _ = BERTopic(
            embedding_model=load_encoder(MINILM),
            hdbscan_model=KMeans(k, n_init=10, random_state=0),
        ).fit_transform(rows["text"][:])
        gold = np.unique(rows["group"][:], return_inverse=True)[1]
        scores = cluster_scores(np.array(topics), gold)
        found.append({"case": case, "way": f"BERTopic, {k} topics", "by": "BERTopic", **scores})
    return found


# ----------------------------------------------------------------------------------- the page


def said(work: Path, name: str) -> Any:
    file = work / f"{name}.json"
    return json.loads(file.read_text("utf-8")) if file.is_file() else None


def reply_lines(work: Path) -> list[str]:
    page = []
    for kind in ("vllm", "hf"):
        if one := said(work, f"replies-{kind}"):
            (whole, broken), (whole_labels, broken_labels) = one["summaries"], one["labels"]
            page.append(
                f"| {kind} | {whole + broken} | {broken} | {one['without']} | {one['rounds']} | "
                f"{whole_labels + broken_labels} | {broken_labels} | {one['kept']} | "
                f"{', '.join(one['names'])} |"
            )
        elif (notes := work / f"replies-{kind}" / "replies.txt").is_file():
            counts = Counter(notes.read_text("utf-8").splitlines())
            whole, broken = counts["True summary"], counts["False summary"]
            page.append(f"| {kind}, not finished | {whole + broken} | {broken} | | | | | | |")
    return page


def write(work: Path) -> str:
    page = [
        "# Induced labels beside named clusters: SmolLM2-135M and MiniLM",
        "",
        "Written by `python benchmarks/taxonomy.py ../shared/data --part write` after the other parts.",
        "",
        "## Replies held to a schema",
        "",
        "200 queries of clinc150 (test), summaries of at most 6 words, one run with at most 10 labels "
        "in batches of 50. A reply is not parsed when it is no whole JSON; refused are those that the "
        "guardrails sent back (repeated names, for the most part), which are asked for again.",
        "",
        "| engine | summaries: replies | not parsed | rows without one | labels: rounds | replies | "
        "not parsed | rounds with a problem left | labels |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    page += reply_lines(work)
    page += [
        "",
        "## Agreement with the hidden groups",
        "",
        "multidogo: 300 conversations of 6 domains; arena: 250 prompts of arena-hard-v2.0, 3 groups; "
        "mt_bench: 80 prompts, 8 groups. At most as many labels as groups. Labels are "
        "induced from every second text, those of mt_bench from all, in batches of 64. Information (nats) needs "
        "no true groups: it is what the encoder chooses by.",
        "",
        "| texts | labels | assigned by | NMI | AMI | ARI | information | names |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for case in CASES:
        others = [one for one in said(work, "bertopic") or [] if one["case"] == case]
        for one in [*(said(work, case) or []), *others]:
            if "error" in one:  # a run without labels
                page.append(f"| {case} | {one['way']} | {one['error'][:160]} | | | | | |")
                continue
            names = ", ".join(one.get("labels", ())) if one["by"] != MODEL else ""
            told = f"{one['information']:.3f}" if "information" in one else ""
            page.append(
                f"| {case} | {one['way']} | {one['by']} | {one['nmi']:.3f} | {one['ami']:.3f} | "
                f"{one['ari']:.3f} | {told} | {names.replace('|', '/')} |"
            )
    page += [
        "",
        "SmolLM2-135M does not find labels in a list of texts: what it generates and updates alone is far "
        "below the clusters that it names, which this model does with one example turn. Two things "
        "that read no true group help it: an encoder that chooses among all rounds of all runs, and "
        "labels described by their most central texts (`llmlabel.taxonomy.describe.with_examples`). "
        "Both, and the example turn, were picked after a look at the scores on these same rows: take "
        "what they gain as optimistic. Rounds that start from the named clusters do not beat the "
        "clusters themselves. A larger model was not available here.",
    ]
    done = {(one["case"], one["way"]) for case in CASES for one in said(work, case) or []}
    if missing := [f"{way} on {case}" for case in CASES for way in WAYS if (case, way) not in done]:
        page += ["", f"Not measured: {'; '.join(missing)}."]
    if said(work, "bertopic") is None:
        page += ["", "BERTopic was not measured."]
    if one := said(work, "student"):
        page += [
            "",
            "## Phase 2: a student of these labels",
            "",
            f"multidogo, labels {', '.join(one['labels'])}; each stands for the domain that most of "
            f"its train rows have. Of {one['test']} test rows SmolLM2 (bias corrected) is right for "
            f"{one['right']['SmolLM2']:.3f}, the MiniLM student of its soft labels for "
            f"{one['right']['student']:.3f}; they agree on {one['agree']:.3f}.",
        ]
    else:
        page += ["", "A student of these labels was not measured."]
    return "\n".join(page + recipe_lines(said(work, "recipe"))) + "\n"


def recipe_lines(one: dict[str, Any] | None) -> list[str]:
    if one is None:
        return []
    return [
        "",
        "## Both phases on BBC News: `llmlabel run tnt_llm`",
        "",
        f"Named clusters: {', '.join(one['named'])}. After the rounds, chosen by the encoder: "
        f"{', '.join(one['found'])}. With example texts and an `other`, against the five sections of "
        f"the articles, which no step reads ({one['n']} test texts of 25 words):",
        "",
        "| labels by | NMI | AMI | ARI |",
        "|---|---|---|---|",
        *(
            f"| {row['who']} | {row['nmi']:.3f} | {row['ami']:.3f} | {row['ari']:.3f} |"
            for row in one["rows"]
        ),
        "",
        f"Without the sections, `taxonomy_quality` says of the student: coverage "
        f"{one['coverage']:.3f}, pairwise accuracy {one['pairwise']:.3f} by MiniLM, which the student "
        "is made of. High numbers there do not make the labels good: what the clusters know is lost "
        "with the names that SmolLM2 gives them, and SmolLM2's own answers agree with next to nothing. "
        "What a larger model makes of this recipe was not measured.",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="the folder of all data sets")
    parser.add_argument("--part", required=True, nargs="+")
    parser.add_argument("--engine", choices=["hf", "vllm"], default="hf")
    parser.add_argument("--work", type=Path, default=Path("runs/benchmark-taxonomy"))
    parser.add_argument("--run", type=Path, default=Path("runs/tnt_llm"), help="for --part recipe")
    given = parser.parse_args()
    if not given.data.is_dir():
        print(f"skipped: there is no folder {given.data}")
        return
    data, work = given.data, given.work
    engine = None if {"write", "bertopic", "recipe"} & set(given.part) else engine_of(given.engine)
    for part in given.part:
        name = f"replies-{given.engine}" if part == "replies" else part
        if part == "write":
            page = write(work)
            (Path(__file__).parent / "results" / "taxonomy.md").write_text(page, "utf-8")
            print(page)
            return
        if part == "bertopic":
            found: Any = bertopic(data)
        elif part == "recipe":
            found = recipe(given.run)
        elif part == "replies":
            found = replies(data, work / name, engine)
        elif part == "student":
            found = student(data, work / name, engine)
        else:
            found = []
            for one in quality(part, data, work / name, engine):
                found.append(one)
                keep(work / f"{name}.json", found)
        keep(work / f"{name}.json", found)
        print(json.dumps(found, ensure_ascii=False, indent=1), flush=True)


def keep(file: Path, found: Any) -> None:
    """Writes a result, or the part of it that is there, unless more of it was there already."""
    file.parent.mkdir(parents=True, exist_ok=True)
    before = json.loads(file.read_text("utf-8")) if file.is_file() else []
    if len(found) >= len(before):
        file.write_text(json.dumps(found, ensure_ascii=False, indent=1), "utf-8")


if __name__ == "__main__":
    main()

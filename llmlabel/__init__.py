"""Many texts and few or no labels to a model that can be trusted.

The public names below are loaded when they are first used, so that `import llmlabel` needs neither
torch nor transformers nor vLLM.
"""

from importlib import import_module
from typing import Any

_HOMES = {
    "LabelSpace": "labelspace",
    "load_labels": "labelspace",
    "save_labels": "labelspace",
    "import_labels": "labelspace.sources",
    "diff_labels": "labelspace.versions",
    "merge_labels": "labelspace.versions",
    "carry_over": "refine.carry",
    "load": "data",
    "save": "data",
    "first_words": "data",
    "split": "data",
    "part": "data",
    "SoftLabels": "softlabels",
    "HFEngine": "engine.hf",
    "VLLMEngine": "engine.vllm",
    "OpenAIEngine": "engine.openai",
    "CachedEngine": "engine.cache",
    "label_direct": "label.direct",
    "label_embedding": "label.embedding",
    "embed": "label.embedding",
    "embed_labels": "label.embedding",
    "label_neighbours": "label.neighbours",
    "label_prototypes": "label.neighbours",
    "label_test_time": "label.neighbours",
    "label_cache": "label.neighbours",
    "label_singular": "label.singular",
    "label_zero_shot": "label.zeroshot",
    "bias_curve": "label.zeroshot",
    "choose_seen_bias": "label.zeroshot",
    "label_weak": "label.weak",
    "measure_functions": "label.weak",
    "extract_concepts": "label.concepts",
    "calibrate_concepts": "label.concepts",
    "label_concepts": "label.concepts",
    "label_hierarchy": "label.hierarchy",
    "label_selftrain": "label.selftrain",
    "label_at_scale": "label.scale",
    "judge": "label.judge",
    "choose_demonstrations": "label.demonstrations",
    "shortlist": "label.shortlist",
    "batch_calibration": "refine.debias",
    "content_free_calibration": "refine.debias",
    "domain_context_calibration": "refine.debias",
    "match_prior": "refine.debias",
    "shift_prior": "refine.debias",
    "summarise": "taxonomy.induce",
    "induce": "taxonomy.induce",
    "with_other": "taxonomy.induce",
    "cluster_texts": "taxonomy.cluster",
    "cluster_taxonomy": "taxonomy.cluster",
    "taxonomy_quality": "taxonomy.quality",
    "discover": "taxonomy.discover",
    "extract": "taxonomy.ontology",
    "type_terms": "taxonomy.term_typing",
    "vote_types": "taxonomy.term_typing",
    "ensemble_typing": "taxonomy.term_typing",
    "fit_isa": "taxonomy.isa",
    "isa_edges": "taxonomy.isa",
    "choose_edges": "taxonomy.edges",
    "frechet_predict": "refine.geometry",
    "read_orders": "refine.orders",
    "measure_bias": "refine.bias",
    "aggregate": "refine.aggregate",
    "add_votes": "refine.votes",
    "measure_annotators": "refine.annotators",
    "aggregate_spans": "refine.views",
    "adapt_bands": "refine.adapt",
    "gold_labels": "refine.adapt",
    "mix_gold": "refine.adapt",
    "correct_missing": "refine.adapt",
    "compress": "refine.compress",
    "restore": "refine.compress",
    "keep_confident": "select",
    "chosen": "select",
    "select_uncertain": "select.uncertain",
    "select_rad": "select.robust",
    "select_llkd": "select.learnable",
    "drop_near_duplicates": "select.duplicates",
    "review_queue": "select.review",
    "train_classifier": "train.classifier",
    "predict": "train.classifier",
    "distill": "train.distill",
    "train_tagger": "train.tokens",
    "predict_spans": "train.tokens",
    "train_prompt": "train.prompt_tuning",
    "train_seq2set": "train.seq2set",
    "predict_label_sets": "train.seq2set",
    "find_memorised": "train.memorisation",
    "measure_memorised": "train.memorisation",
    "fit_temperature": "calibrate.temperature",
    "apply_temperature": "calibrate.temperature",
    "fit_conformal": "calibrate.conformal",
    "predict_sets": "calibrate.conformal",
    "write_report": "report",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'llmlabel' has no attribute {name!r}")
    return getattr(import_module(f"llmlabel.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__

"""Label spaces from and to SKOS, OWL and OBO.

| suffix | read as | written as |
|---|---|---|
| .ttl | SKOS where it has concepts, else classes; Turtle | SKOS, Turtle |
| .owl | the same; RDF/XML or Turtle, by its beginning | OWL, Turtle |
| .rdf, .nt, .jsonld | the same; RDF/XML, N-Triples, JSON-LD | |
| .obo | OBO 1.4 | OBO 1.4 |

What becomes of the parts:

- id: the whole IRI or OBO id, which nobody else's label changes. An id that is none is written as
  `urn:llmlabel:` (in OBO `llmlabel:`) and its percent code, and read back as it was;
- name: `skos:prefLabel` or `rdfs:label` in the language asked for, else without a language, else
  in the first language; `name` in OBO;
- description: `skos:definition`, `skos:scopeNote`, `rdfs:comment` or `def`, and "also: " with the
  alternative names, which are none of another language beside a name that is not;
- parents: `skos:broader` (and the opposite of `skos:narrower`), `rdfs:subClassOf`, `is_a`. A parent
  that has no name, such as a restriction of OWL, and `owl:Thing` are no parents.

What is deprecated or obsolete is left out. Nothing is fetched: no import of an ontology, no remote
context of a JSON-LD file.
"""

import json
import re
import warnings
import xml.sax
from collections.abc import Iterable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any
from urllib.parse import quote, unquote

from llmlabel.labelspace import LabelSpace

WRITTEN = (".ttl", ".owl", ".obo")
SUFFIXES = (*WRITTEN, ".rdf", ".nt", ".jsonld")
_BASE = "urn:llmlabel:"
_OBO_BASE = "llmlabel:"
_IRI = re.compile(r"(https?://|urn:)[^\x00-\x20<>\"{}|^`\\]+")
_OBO_ID = re.compile(r"[\w.:-]+|https?://[\w.~/#:-]+", re.ASCII)
_RDF = "http://www.w3.org/1999/02/22-rdf-syntax-ns#"
_RDFS = "http://www.w3.org/2000/01/rdf-schema#"
_OWL = "http://www.w3.org/2002/07/owl#"
_SKOS = "http://www.w3.org/2004/02/skos/core#"


@dataclass(frozen=True)
class Read:
    """The entries of a label file (see `llmlabel.labelspace.files`), and what did not become one.

    Attributes:
        entries: in the order of the file.
        told: kind of change (see `llmlabel.labelspace.clean.RULES`) -> what it happened to.
    """

    entries: list[dict[str, Any]]
    told: dict[str, list[tuple[str, ...]]] = field(default_factory=dict)


def read(text: str, suffix: str, *, language: str = "en", base: str = "") -> Read:
    """The entries of an ontology file.

    Args:
        text: The content of the file.
        suffix: One of `SUFFIXES`.
        language: The preferred language of names and descriptions.
        base: A beginning of ids, such as `http://www.yso.fi/onto/yso/`, that they are without.

    Raises:
        ValueError: The file is broken, or has neither concepts nor classes.
        ImportError: rdflib or fastobo is not installed.
    """
    if suffix == ".obo":
        return _read_obo(text, base)
    graph = _parsed(text, suffix)
    return _read_graph(graph, language, base)


def write(labels: LabelSpace, suffix: str) -> str:
    """The content of a file of one of the types `WRITTEN`, from which `read` makes equal labels.

    Raises:
        ValueError: The labels have `parent_probs`, which none of these can hold.
    """
    if labels.parent_probs:
        raise ValueError(
            f"a {suffix} cannot hold parent_probs; save as .yaml, .json, .jsonl or .csv, or leave "
            "them out with dataclasses.replace(labels, parent_probs=())"
        )
    if suffix == ".obo":
        return _to_obo(labels)
    return _to_turtle(labels, skos=suffix == ".ttl")


# ---------------------------------------------------------------------------------------- RDF


def _rdflib() -> ModuleType:
    try:
        import rdflib
    except ImportError:
        raise ImportError(
            "SKOS and OWL files need rdflib; pip install 'llmlabel[ontologies]'"
        ) from None
    return rdflib


def _parsed(text: str, suffix: str) -> Any:
    rdflib = _rdflib()
    start = text.lstrip()[:200]
    if suffix == ".owl":
        suffix = ".rdf" if start.startswith(("<?xml", "<!DOCTYPE", "<!--", "<rdf:RDF")) else ".ttl"
        if re.match(r"(Prefix|Ontology)\s*\(", start) or start.startswith("<Ontology"):
            raise ValueError("this is OWL in another syntax than RDF; save it as RDF/XML or Turtle")
    kinds = {".ttl": "turtle", ".rdf": "xml", ".nt": "nt", ".jsonld": "json-ld"}
    if suffix == ".jsonld":
        _check_contexts(text)
    graph = rdflib.Graph()
    try:
        with warnings.catch_warnings():  # its own reader of JSON-LD uses what it deprecates
            warnings.simplefilter("ignore", DeprecationWarning)
            graph.parse(data=text, format=kinds[suffix])
    except xml.sax.SAXParseException as error:
        line = error.getLineNumber()
        raise ValueError(f"line {line} is not RDF/XML: {error.getMessage()}") from None
    except Exception as error:  # rdflib raises whatever its parsers do
        line = getattr(error, "lines", None)
        place = "" if line is None else f"line {line + 1}: "
        said = getattr(error, "_why", "") or " ".join(f"{error}".split()) or type(error).__name__
        raise ValueError(f"{place}not {kinds[suffix]}: {said}") from None
    return graph


def _check_contexts(text: str) -> None:
    """Refuses what rdflib would fetch."""
    try:
        waiting = [json.loads(text)]
    except ValueError as error:
        raise ValueError(f"not JSON: {error}") from None
    while waiting:
        match waiting.pop():
            case dict(mapping):
                waiting += mapping.values()
                contexts = mapping.get("@context")
                contexts = contexts if isinstance(contexts, list) else [contexts]
                if remote := [context for context in contexts if isinstance(context, str)]:
                    raise ValueError(
                        f"the context {remote[0]!r} is on another machine and is not fetched; put "
                        "its content in its place"
                    )
            case list(values):
                waiting += values


def _read_graph(graph: Any, language: str, base: str) -> Read:
    rdflib = _rdflib()
    uri = rdflib.URIRef
    typed = _subjects(graph, [uri(_SKOS + "Concept")])
    if typed:
        up, down = [uri(_SKOS + "broader")], [uri(_SKOS + "narrower")]
        names = [uri(_SKOS + "prefLabel"), uri(_RDFS + "label")]
    else:
        typed = _subjects(graph, [uri(_OWL + "Class"), uri(_RDFS + "Class")])
        up, down = [uri(_RDFS + "subClassOf")], []
        names = [uri(_RDFS + "label"), uri(_SKOS + "prefLabel")]
    if not typed:
        raise ValueError("it has neither a skos:Concept nor an owl:Class or rdfs:Class")
    said = [uri(_SKOS + "definition"), uri(_SKOS + "scopeNote"), uri(_RDFS + "comment")]
    also, old = uri(_SKOS + "altLabel"), uri(_OWL + "deprecated")
    entries: list[dict[str, Any]] = []
    told: dict[str, list[tuple[str, ...]]] = {}
    for node in typed:
        id = _id_of(str(node), base)
        if any(str(value).lower() in ("true", "1") for value in graph.objects(node, old)):
            told.setdefault("deprecated", []).append((id,))
            continue
        parents = [parent for link in up for parent in graph.objects(node, link)]
        parents += [parent for link in down for parent in graph.subjects(link, node)]
        named = [str(parent) for parent in parents if isinstance(parent, uri)]
        if len(named) < len(parents):
            told.setdefault("unnamed parent", []).append((id,))
        name, foreign = _literal(graph, node, names, language)
        if foreign:
            told.setdefault("other language", []).append((id, name))
        if not name:
            name = unquote(re.split(r"[/#:]", str(node).rstrip("/#"))[-1])
            told.setdefault("no name", []).append((id, name))
        entry = _entry(id, name, _literal(graph, node, said, language)[0])
        synonyms, others = _literals(graph, node, also, language)
        _add_synonyms(entry, synonyms if foreign or not others else [])
        kept = [_id_of(parent, base) for parent in named if parent != _OWL + "Thing"]
        entries.append({**entry, "parents": list(dict.fromkeys(kept))})
    return Read(entries, told)


def _subjects(graph: Any, kinds: list[Any]) -> list[Any]:
    """What is of one of the types, in the order of the file, without the words of OWL itself."""
    rdf_type = _rdflib().URIRef(_RDF + "type")
    found = [node for kind in kinds for node in graph.subjects(rdf_type, kind)]
    named = [node for node in found if isinstance(node, _rdflib().URIRef)]
    own = [node for node in named if not str(node).startswith((_OWL, _RDFS, _RDF))]
    return list(dict.fromkeys(own))


def _literal(graph: Any, node: Any, links: list[Any], language: str) -> tuple[str, bool]:
    for link in links:
        found, foreign = _literals(graph, node, link, language)
        if found:
            return found[0], foreign
    return "", False


def _literals(graph: Any, node: Any, link: Any, language: str) -> tuple[list[str], bool]:
    """Of the best language that there is (asked for, none, the first); whether it is another."""
    literal = _rdflib().Literal
    values = [value for value in graph.objects(node, link) if isinstance(value, literal)]
    asked = language.lower()
    by_rank: dict[tuple[int, str], list[str]] = {}
    for value in values:
        tag = (value.language or "").lower()
        near = tag.split("-")[0] == asked.split("-")[0]  # en-GB for en
        rank = 0 if tag == asked else 1 if near else 3 if tag else 2
        if text := str(value).strip():
            by_rank.setdefault((rank, tag), []).append(text)
    if not by_rank:
        return [], False
    best = min(by_rank)
    return by_rank[best], best[0] == 3


def _id_of(iri: str, base: str) -> str:
    if iri.startswith(_BASE):
        return unquote(iri.removeprefix(_BASE))
    return (iri.removeprefix(base) or iri) if base else iri


def _iri(id: str) -> str:
    plain = _IRI.fullmatch(id) and not id.startswith(_BASE)
    return f"<{id if plain else _BASE + quote(id, safe='')}>"


def _to_turtle(labels: LabelSpace, *, skos: bool) -> str:
    # By hand, because rdflib sorts the labels, and their order is that of the columns of a matrix.
    kind, name, description, parent, whole = (
        ("skos:Concept", "skos:prefLabel", "skos:definition", "skos:broader", "skos:ConceptScheme")
        if skos
        else ("owl:Class", "rdfs:label", "rdfs:comment", "rdfs:subClassOf", "owl:Ontology")
    )
    scheme = f"<{_BASE}/>"  # of no label: a / in an id is written as %2F
    prefixes = {"skos": _SKOS} if skos else {"owl": _OWL, "rdfs": _RDFS}
    lines = [f"@prefix {short}: <{iri}> ." for short, iri in prefixes.items()]
    lines += ["", f"{scheme} a {whole} ."]
    for label, id in enumerate(labels.ids):
        facts = [f"{_iri(id)} a {kind}", f"{name} {_quoted(labels.names[label])}"]
        if labels.descriptions[label]:
            facts.append(f"{description} {_quoted(labels.descriptions[label])}")
        if labels.parents[label]:
            facts.append(f"{parent} {', '.join(map(_iri, labels.parents[label]))}")
        if skos:
            facts.append(f"skos:inScheme {scheme}")
            if not labels.parents[label]:
                facts.append(f"skos:topConceptOf {scheme}")
        lines += ["", " ;\n    ".join(facts) + " ."]
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)  # Turtle has the same escapes in a short string


# ---------------------------------------------------------------------------------------- OBO


def _fastobo() -> ModuleType:
    try:
        import fastobo
    except ImportError:
        raise ImportError("OBO files need fastobo; pip install 'llmlabel[ontologies]'") from None
    return fastobo


def _read_obo(text: str, base: str) -> Read:
    fastobo = _fastobo()
    try:
        document = fastobo.loads(text)
    except SyntaxError as error:
        raise ValueError(f"line {error.lineno} is not OBO: {error.msg}") from None
    entries: list[dict[str, Any]] = []
    told: dict[str, list[tuple[str, ...]]] = {}
    for frame in document:
        if not isinstance(frame, fastobo.term.TermFrame):
            continue
        id = _obo_id_of(frame.id, base)
        clauses: dict[str, list[Any]] = {}
        for clause in frame:
            clauses.setdefault(clause.raw_tag(), []).append(clause)
        if any(clause.obsolete for clause in clauses.get("is_obsolete", [])):
            told.setdefault("deprecated", []).append((id,))
            continue
        name = next((clause.name for clause in clauses.get("name", [])), "").strip()
        definition = next((clause.definition for clause in clauses.get("def", [])), "")
        entry = _entry(id, name or id, definition.strip())
        if not name:
            told.setdefault("no name", []).append((id, id))
        _add_synonyms(entry, (clause.synonym.desc for clause in clauses.get("synonym", [])))
        parents = [_obo_id_of(clause.term, base) for clause in clauses.get("is_a", [])]
        entries.append({**entry, "parents": parents})
    if not entries:
        raise ValueError("it has no [Term]")
    return Read(entries, told)


def _obo_id_of(ident: Any, base: str) -> str:
    fastobo = _fastobo()
    if isinstance(ident, fastobo.id.PrefixedIdent):
        id = f"{ident.prefix}:{ident.local}"
    elif isinstance(ident, fastobo.id.UnprefixedIdent):
        id = ident.unescaped
    else:
        id = str(ident)
    if id.startswith(_OBO_BASE):
        return unquote(id.removeprefix(_OBO_BASE))
    return (id.removeprefix(base) or id) if base else id


def _to_obo(labels: LabelSpace) -> str:
    fastobo = _fastobo()
    term, xrefs = fastobo.term, fastobo.xref.XrefList
    idents = dict(zip(labels.ids, map(_ident, labels.ids), strict=True))
    frames = []
    for label, id in enumerate(labels.ids):
        clauses = [term.NameClause(labels.names[label])]
        if labels.descriptions[label]:
            clauses.append(term.DefClause(labels.descriptions[label], xrefs()))
        clauses += [term.IsAClause(idents[parent]) for parent in labels.parents[label]]
        frames.append(str(term.TermFrame(idents[id], clauses)))
    return "\n".join(["format-version: 1.4\n", *frames])


def _ident(id: str) -> Any:
    fastobo = _fastobo()
    plain = _OBO_ID.fullmatch(id) and not id.startswith(_OBO_BASE)
    written = id if plain else _OBO_BASE + quote(id, safe="")
    prefix, _, local = written.partition(":")
    if prefix and local:
        return fastobo.id.PrefixedIdent(prefix, local)
    return fastobo.id.UnprefixedIdent(written)


# --------------------------------------------------------------------------------------- both


def _entry(id: str, name: str, description: str) -> dict[str, Any]:
    entry = {"id": id, "name": name}
    return {**entry, "description": description} if description else entry


def _add_synonyms(entry: dict[str, Any], synonyms: Iterable[str]) -> None:
    others = dict.fromkeys(other.strip() for other in synonyms if other.strip() != entry["name"])
    if others:
        also = "also: " + ", ".join(others)
        entry["description"] = (
            f"{entry['description']} ({also})" if "description" in entry else also
        )

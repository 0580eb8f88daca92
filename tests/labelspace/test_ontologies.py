"""SKOS, OWL and OBO; that names and parents survive a file is tested in test_files.py."""

import subprocess
import sys
from pathlib import Path

import pytest

from llmlabel.labelspace import LabelSpace, load_labels, ontologies, save_labels
from llmlabel.labelspace.files import parse, write
from llmlabel.labelspace.sources import import_labels

SKOS = """
@prefix skos: <http://www.w3.org/2004/02/skos/core#> .
@prefix owl: <http://www.w3.org/2002/07/owl#> .
@prefix y: <http://y.org/> .
y:scheme a skos:ConceptScheme ; skos:prefLabel "All" ; skos:hasTopConcept y:p2 .
y:p2 a skos:Concept ; skos:topConceptOf y:scheme ;
    skos:prefLabel "Wirtschaft"@de, "economy"@en, "talous"@fi ; skos:narrower y:p1 .
y:p1 a skos:Concept ; skos:broader y:p2, y:p4 ;
    skos:prefLabel "trade"@en-GB, "kauppa"@fi, "Handel" ;
    skos:altLabel "commerce"@en, "business"@en, "kaupankäynti"@fi ;
    skos:definition "Buying and selling."@en .
y:p3 a skos:Concept ; skos:broader y:p2 ; skos:prefLabel "vanha"@fi ; owl:deprecated true .
y:p4 a skos:Concept ; skos:prefLabel "työ"@fi, "arbete"@sv ; skos:scopeNote "Työ."@fi ;
    skos:broader y:p3 .
y:p5 a skos:Concept ; skos:prefLabel "muu" ; skos:altLabel "other"@en, "muu", "övriga"@sv .
y:p6 a skos:Concept .
[] a skos:Concept ; skos:prefLabel "nobody" .
"""


def test_skos() -> None:
    read = ontologies.read(SKOS, ".ttl", base="http://y.org/")
    assert read.entries == [
        {"id": "p2", "name": "economy", "parents": []},
        {
            "id": "p1",
            "name": "trade",
            "description": "Buying and selling. (also: commerce, business)",
            "parents": ["p2", "p4"],
        },
        {"id": "p4", "name": "työ", "description": "Työ.", "parents": ["p3"]},
        {"id": "p5", "name": "muu", "description": "also: other", "parents": []},
        {"id": "p6", "name": "p6", "parents": []},
    ]
    assert read.told == {
        "deprecated": [("p3",)],
        "other language": [("p4", "työ")],
        "no name": [("p6", "p6")],
    }


def test_alternative_names_are_of_the_language_of_the_name() -> None:
    finnish = ontologies.read(SKOS, ".ttl", language="fi").entries
    assert finnish[1]["description"] == "Buying and selling. (also: kaupankäynti)"
    german = ontologies.read(SKOS, ".ttl", language="de")
    assert german.entries[1] == {
        "id": "http://y.org/p1",
        "name": "Handel",
        "description": "Buying and selling.",
        "parents": ["http://y.org/p2", "http://y.org/p4"],
    }
    assert [name for _, name in german.told["other language"]] == ["työ"]


def test_the_language_of_skos() -> None:
    names = {
        language: [
            entry["name"] for entry in ontologies.read(SKOS, ".ttl", language=language).entries
        ]
        for language in ("fi", "sv", "en-GB")
    }
    assert names["fi"] == ["talous", "kauppa", "työ", "muu", "p6"]
    assert names["sv"] == ["Wirtschaft", "Handel", "arbete", "muu", "p6"]
    assert names["en-GB"] == ["economy", "trade", "työ", "muu", "p6"]


def test_ids_are_whole_iris(tmp_path: Path) -> None:
    path = tmp_path / "y.ttl"
    path.write_text(SKOS, "utf-8")
    cleaning = import_labels(path)
    assert cleaning.labels.ids[:2] == ("http://y.org/p2", "http://y.org/p1")
    told = {change.kind: change.items for change in cleaning.changes}
    assert told["unknown parent"] == (("http://y.org/p4", "http://y.org/p3"),)
    assert told["deprecated"] == (("http://y.org/p3",),)
    assert import_labels(path, base="http://y.org/", language="fi").labels.index("talous") == 0


def test_skos_in_other_syntaxes(tmp_path: Path) -> None:
    import rdflib

    expected = load_labels(
        [
            {"id": "http://y.org/a", "name": "ä > b"},
            {
                "id": "http://y.org/b",
                "name": "b",
                "description": "of b",
                "parent": "http://y.org/a",
            },
        ]
    )
    graph = rdflib.Graph().parse(data=write(expected, Path("l.ttl")), format="turtle")
    for suffix, kind in ((".rdf", "xml"), (".nt", "nt"), (".jsonld", "json-ld"), (".owl", "xml")):
        path = tmp_path / f"l{suffix}"
        graph.serialize(path, format=kind, encoding="utf-8")
        labels = load_labels(path)
        assert dict(zip(labels.ids, labels.texts(), strict=True)) == {
            "http://y.org/a": "ä > b",
            "http://y.org/b": "b: of b",
        }
        assert dict(zip(labels.ids, labels.parents, strict=True))["http://y.org/b"] == (
            "http://y.org/a",
        )


OWL = """<?xml version="1.0"?>
<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"
    xmlns:rdfs="http://www.w3.org/2000/01/rdf-schema#" xmlns:owl="http://www.w3.org/2002/07/owl#">
  <owl:Class rdf:about="http://x.org/o#Dog">
    <rdfs:label xml:lang="en">Dog</rdfs:label>
    <rdfs:comment>Barks.</rdfs:comment>
    <rdfs:subClassOf rdf:resource="http://x.org/o#Pet"/>
    <rdfs:subClassOf>
      <owl:Restriction><owl:onProperty rdf:resource="http://x.org/o#eats"/></owl:Restriction>
    </rdfs:subClassOf>
  </owl:Class>
  <owl:Class rdf:about="http://x.org/o#Pet">
    <rdfs:subClassOf rdf:resource="http://www.w3.org/2002/07/owl#Thing"/>
    <rdfs:subClassOf rdf:resource="http://x.org/o#Dog"/>
  </owl:Class>
  <owl:Class rdf:about="http://x.org/o#Old">
    <owl:deprecated rdf:datatype="http://www.w3.org/2001/XMLSchema#boolean">true</owl:deprecated>
  </owl:Class>
  <owl:Class rdf:about="http://x.org/o#Cat">
    <rdfs:subClassOf rdf:resource="http://x.org/o#Old"/>
    <owl:deprecated rdf:datatype="http://www.w3.org/2001/XMLSchema#boolean">false</owl:deprecated>
  </owl:Class>
</rdf:RDF>
"""


def test_owl(tmp_path: Path) -> None:
    path = tmp_path / "o.owl"
    path.write_text(OWL)
    cleaning = import_labels(path, base="http://x.org/o#")
    labels = cleaning.labels
    assert labels == LabelSpace(
        ids=("Dog", "Pet", "Cat"),
        names=("Dog", "Pet", "Cat"),
        descriptions=("Barks.", "", ""),
        parents=(("Pet",), (), ()),
    )
    assert {change.kind: change.items for change in cleaning.changes} == {
        "deprecated": (("Old",),),
        "unnamed parent": (("Dog",),),
        "no name": (("Pet", "Pet"), ("Cat", "Cat")),
        "unknown parent": (("Cat", "Old"),),
        "cycle": (("Pet", "Dog"),),
    }
    with pytest.raises(ValueError, match=r"o\.owl: label 'http://x\.org/o#Cat' has the unknown"):
        load_labels(path)


def test_classes_of_rdfs_as_in_schema_org() -> None:
    text = """
    @prefix rdfs: <http://www.w3.org/2000/01/rdf-schema#> .
    @prefix s: <https://schema.org/> .
    rdfs:Class a rdfs:Class .
    s:Thing a rdfs:Class ; rdfs:label "Thing" .
    s:Place a rdfs:Class ; rdfs:label "Place" ; rdfs:subClassOf s:Thing .
    s:name a <http://www.w3.org/1999/02/22-rdf-syntax-ns#Property> ; rdfs:label "name" .
    """
    for suffix in (".ttl", ".owl"):
        labels = parse(ontologies.read(text, suffix).entries, multilabel=False)
        assert labels.names == ("Thing", "Place")
        assert labels.parents == ((), ("https://schema.org/Thing",))


OBO = """format-version: 1.2
ontology: x

[Term]
id: X:1
name: thing
def: "A \\"thing\\"." [X:me]
synonym: "object" EXACT []
synonym: "thing" RELATED []

[Term]
id: X:2
name: big, bad thing
is_a: X:1 ! thing
is_a: X:3 {source="me"} ! old

[Term]
id: X:3
name: old
is_obsolete: true

[Term]
id: X:4
is_a: X:4

[Typedef]
id: part_of
name: part of
"""


def test_obo(tmp_path: Path) -> None:
    path = tmp_path / "x.obo"
    path.write_text(OBO)
    cleaning = import_labels(path, base="X:")
    assert cleaning.labels == LabelSpace(
        ids=("1", "2", "4"),
        names=("thing", "big, bad thing", "4"),
        descriptions=('A "thing". (also: object)', "", ""),
        parents=((), ("1",), ()),
    )
    assert {change.kind: change.items for change in cleaning.changes} == {
        "deprecated": (("3",),),
        "no name": (("4", "4"),),
        "unknown parent": (("2", "3"),),
        "self-loop": (("4", "4"),),
    }


def test_what_is_written() -> None:
    labels = load_labels(
        [
            {"id": "http://y.org/a", "name": "A"},
            {"id": "b c", "name": 'say "b"', "parent": "http://y.org/a"},
        ]
    )
    assert write(labels, Path("l.ttl")) == (
        "@prefix skos: <http://www.w3.org/2004/02/skos/core#> .\n\n"
        "<urn:llmlabel:/> a skos:ConceptScheme .\n\n"
        '<http://y.org/a> a skos:Concept ;\n    skos:prefLabel "A" ;\n'
        "    skos:inScheme <urn:llmlabel:/> ;\n    skos:topConceptOf <urn:llmlabel:/> .\n\n"
        '<urn:llmlabel:b%20c> a skos:Concept ;\n    skos:prefLabel "say \\"b\\"" ;\n'
        "    skos:broader <http://y.org/a> ;\n    skos:inScheme <urn:llmlabel:/> .\n"
    )
    assert '<urn:llmlabel:b%20c> a owl:Class ;\n    rdfs:label "say' in write(labels, Path("l.owl"))
    assert write(labels, Path("l.obo")) == (
        "format-version: 1.4\n\n[Term]\nid: http://y.org/a\nname: A\n\n"
        '[Term]\nid: llmlabel:b%20c\nname: say \\"b\\"\nis_a: http://y.org/a\n'
    )


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("l.ttl", "@prefix a: <b> .\na:b a:c ;;; \n", r"l\.ttl: line \d+: not turtle: "),
        ("l.ttl", "", "it has neither a skos:Concept nor an owl:Class"),
        ("l.rdf", "<a><b></a>", "line 1 is not RDF/XML: mismatched tag"),
        ("l.nt", "nonsense\n", "not nt: "),
        ("l.jsonld", "{", "not JSON: "),
        (
            "l.jsonld",
            '{"@context": "https://x.org/c", "a": 1}',
            "'https://x.org/c' is on another machine",
        ),
        ("l.jsonld", '[{"@context": [{}, "c.jsonld"]}]', "the context 'c.jsonld' is on another"),
        ("l.owl", "Prefix(:=<a>)\nOntology(<a>)", "OWL in another syntax than RDF"),
        ("l.obo", "[Term]\nid: a b c\n", "line 2 is not OBO: "),
        ("l.obo", "format-version: 1.2\n", r"it has no \[Term\]"),
    ],
)
def test_bad_files_are_one_line(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    for read in (load_labels, import_labels):
        with pytest.raises(ValueError, match=message) as caught:
            read(tmp_path / name)
        assert "\n" not in str(caught.value)
        assert str(caught.value).startswith(str(tmp_path / name))


@pytest.mark.parametrize(("module", "name"), [("rdflib", "l.ttl"), ("fastobo", "l.obo")])
def test_without_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, name: str
) -> None:
    save_labels(load_labels(["a", "b"]), tmp_path / name)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"need {module}; pip install 'llmlabel\[ontologies\]'"):
        load_labels(tmp_path / name)


def test_nothing_is_imported_for_other_files() -> None:
    program = (
        "import sys; from llmlabel.labelspace.sources import import_labels; import_labels(['a', 'b']);"
        "print({'rdflib', 'fastobo', 'datasets', 'torch'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.stdout.strip(), done.stderr) == ("set()", "")


def test_a_turtle_of_an_external_entity_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text("secret")
    (tmp_path / "l.rdf").write_text(
        f'<!DOCTYPE r [<!ENTITY x SYSTEM "{tmp_path}/secret.txt">]>'
        '<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#" '
        'xmlns:s="http://www.w3.org/2004/02/skos/core#">'
        '<s:Concept rdf:about="http://x.org/a"><s:prefLabel>a&x;</s:prefLabel></s:Concept>'
        '<s:Concept rdf:about="http://x.org/b"><s:prefLabel>b</s:prefLabel></s:Concept></rdf:RDF>'
    )
    assert "secret" not in "".join(load_labels(tmp_path / "l.rdf").names)

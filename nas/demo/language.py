"""The demo's language: short stories about a fixed little world, an lm-eval task pack about them, and a word-level tokenizer.

A story asks of a model, in small, what real text asks: facts to remember (feed-forward layers), verbs that agree with a distant
subject, holders and numbers mentioned earlier (attention, depth). All of it is a pure function of a seed; the world itself never
changes. The tasks are told in stories whose opening sentence, chosen by its hash, no corpus uses, whatever the two seeds are.

It draws text and writes files; it trains, scores and registers nothing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import count
from pathlib import Path
from random import Random

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


def _list(words: str) -> tuple[str, ...]:
    return tuple(words.split())


GIRLS = _list("Anna Bella Clara Dora Emma Fiona Greta Hanna Ines Julia Karla Lena Mira Nora Olga Petra")
BOYS = _list("Adam Boris Carlo David Emil Felix Georg Hugo Ivan Jonas Karl Leo Max Noel Oskar Paul")
TOWNS = _list("Arden Brook Cale Dunmore Eston Fell Garth Holm Irby Kelso Lorn Marden Norby Oxley Penrith Rye")
TRADES = _list("baker potter farmer tailor miller weaver doctor painter singer sailor mason hunter teacher writer barber cook")
HOBBIES = _list("music chess poems stars maps clocks kites drums stones masks riddles letters ships dances bells songs")
CROPS = _list("beans leeks peas onions carrots pumpkins roses tulips wheat barley rice melons herbs grapes garlic corn")
FOODS = _list("plums nuts berries seeds roots leaves worms snails honey moss apples bread cheese eggs flies grass")
HOMES = _list("caves trees barns ponds fields hills swamps forests cellars gardens rivers deserts attics meadows cliffs islands")
COLOURS = _list("red blue green grey black white brown golden silver purple orange pink")
DAYS = _list("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
PLACES = _list("market mill harbour castle bridge church school station library bakery tower park")
NUMBERS = _list("one two three four five six seven eight nine ten eleven twelve")
PREPOSITIONS = _list("near behind beside below above before")
ANIMALS = {
    singular: singular + "s"
    for singular in _list(
        "bear bird camel cat cow crab crow dog donkey duck frog goat hare hen horse lamb lion mole monkey "
        "parrot pig pigeon rabbit rat raven seal snake spider swan tiger toad turtle whale badger beaver"
    )
} | {"fox": "foxes", "goose": "geese", "mouse": "mice", "wolf": "wolves", "finch": "finches"}
"""Singular -> plural."""
ITEMS = {
    singular: singular + "s"
    for singular in _list("lamp rope cup key coin drum book ring shell spoon candle basket hammer mirror ball hat bottle flute stick button")
} | {"brush": "brushes", "box": "boxes", "knife": "knives", "scarf": "scarves"}
"""Singular -> plural."""
VERBS = {plural + "s": plural for plural in _list("sing dance jump sleep run eat swim hide wait play dream walk climb rest")} | {
    "cries": "cry",
    "watches": "watch",
}
"""Third person singular -> plural."""
SEEING = {"sees": "see", "knows": "know", "follows": "follow", "hears": "hear"}
"""Verbs of a relative clause, third person singular -> plural."""

ATTRIBUTES = {
    "eats": FOODS,
    "grows": CROPS,
    "lives in": HOMES,
    "comes from": TOWNS,
    "is": COLOURS,
    "likes": HOBBIES,
    "fears": tuple(ANIMALS.values()),
    "works as a": TRADES,
}
"""What is true of every animal of a kind -> its possible values."""

END = "</s>"
UNKNOWN = "<unk>"

_WORLD_SEED = "the world of the demo"
_HELD_OUT_SHARE = 8
"""One opening sentence in so many belongs to the tasks."""
_MAX_ADDEND = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """A few sentences with one place where only one word is right: a stretch of a story, or a question of a task."""

    context: str
    answer: str
    wrong: tuple[str, ...]
    tail: str = "."

    @property
    def text(self) -> str:
        return f"{self.context} {self.answer}{self.tail}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Person:
    """Someone in one story, and what they carry all through it."""

    name: str
    item: str


Cast = tuple[Person, Person]
SceneOf = Callable[[Random, Cast], Scene]
"""Draws a scene for a cast of names."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Noun:
    word: str
    is_singular: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Fact:
    """Something that is always true in the world: `stem value.`"""

    stem: str
    value: str
    range: tuple[str, ...]
    """Every value that a fact of this kind can have."""


@cache
def facts() -> tuple[Fact, ...]:
    """What every story takes for granted; the same for every seed. Each animal's facts are told in the plural and in the singular."""
    rng = Random(_WORLD_SEED)
    found: list[Fact] = []

    def add(stems: list[str], values: tuple[str, ...]) -> None:
        dealt = [values[index % len(values)] for index in range(len(stems))]
        rng.shuffle(dealt)
        found.extend(Fact(stem=stem, value=value, range=values) for stem, value in zip(stems, dealt, strict=True))

    for phrase, values in ATTRIBUTES.items():
        add([f"every {animal} {phrase}" for animal in ANIMALS], values)
    return tuple(found)


def _fact(rng: Random, cast: Cast) -> Scene:
    fact = rng.choice(facts())
    return Scene(context=f"{_mention(rng, cast)} said {fact.stem}", answer=fact.value, wrong=_others(rng, fact.range, fact.value))


def _agreement(rng: Random, cast: Cast) -> Scene:
    """The verb has the number of the first noun, whatever nouns stand between them."""
    subject, near, far, seeing = _noun(rng), _noun(rng), _noun(rng), rng.choice(tuple(SEEING))
    phrase = rng.choice(
        (
            f"{rng.choice(PREPOSITIONS)} the {near.word}",
            f"{rng.choice(PREPOSITIONS)} the {far.word} {rng.choice(PREPOSITIONS)} the {near.word}",
            f"that the {near.word} {seeing if near.is_singular else SEEING[seeing]}",
        )
    )
    verb = rng.choice(tuple(VERBS))
    answer, wrong = (verb, VERBS[verb]) if subject.is_singular else (VERBS[verb], verb)
    return Scene(context=f"{_mention(rng, cast)} said the {subject.word} {phrase}", answer=answer, wrong=(wrong,))


def _recall(rng: Random, cast: Cast) -> Scene:
    """What someone carries was said before."""
    person, other = rng.sample(cast, 2)
    return Scene(context=f"Now {person.name} has the", answer=person.item, wrong=(other.item, *_others(rng, tuple(ITEMS), person.item, other.item)[:2]))


def _sum(rng: Random, cast: Cast) -> Scene:
    """Some, and then more or fewer: how many now."""
    name, item = rng.choice(cast).name, rng.choice(tuple(ITEMS))
    less, more = sorted((rng.randint(1, _MAX_ADDEND), rng.randint(1, _MAX_ADDEND)))
    pronoun = "she" if name in GIRLS else "he"
    if found := rng.random() < 0.5:
        before, change, after = rng.choice(((less, more, less + more), (more, less, less + more)))
    else:
        before, change, after = less + more, *rng.choice(((less, more), (more, less)))
    had = f"{name} had {NUMBERS[before - 1]} {item if before == 1 else ITEMS[item]}."
    return Scene(
        context=f"{had} {pronoun.title()} {'found' if found else 'lost'} {NUMBERS[change - 1]}. Now {pronoun} has",
        answer=NUMBERS[after - 1],
        wrong=_others(rng, NUMBERS, NUMBERS[after - 1]),
        tail=f" {item if after == 1 else ITEMS[item]}.",
    )


_QUESTIONS: dict[str, SceneOf] = {
    "demo_agreement": _agreement,
    "demo_facts": _fact,
    "demo_recall": _recall,
    "demo_sums": _sum,
}
_STORY = (_recall, _recall, _sum, _agreement, _fact, _fact, _fact, _fact)


_YAML_HEAD = """task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {name}.jsonl
test_split: test
"""
_MULTIPLE_CHOICE = (
    _YAML_HEAD
    + """output_type: multiple_choice
doc_to_text: "{{{{context}}}}"
doc_to_choice: choices
doc_to_target: gold
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1
"""
)
_ROLLING = (
    _YAML_HEAD
    + """output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list:
  - metric: bits_per_byte
metadata:
  version: 1
"""
)


def write_corpus(folder: Path, *, seed: int, num_documents: int) -> Path:
    """Write `corpus.jsonl`, one story per line under "text", and return its path."""
    rng = Random(f"corpus {seed}")
    path = folder / "corpus.jsonl"
    _write_rows(path, ({"text": _story(rng, held_out=False)} for _ in range(num_documents)))
    return path


def write_tasks(folder: Path, *, seed: int, documents_per_task: int) -> Path:
    """Write a folder of lm-eval tasks (YAML, and jsonl beside it), all of them from held-out stories, and return it.

    `demo_agreement`, `demo_facts`, `demo_recall` and `demo_sums` are multiple choice (acc); `demo_bits` is the rolling likelihood of
    whole stories (bits_per_byte). No document occurs twice.
    """
    for name, scene_of in _QUESTIONS.items():
        rng = Random(f"{name} {seed}")
        _write_rows(folder / f"{name}.jsonl", _distinct((_question(rng, scene_of) for _ in count()), documents_per_task))
        _write(folder / f"{name}.yaml", _MULTIPLE_CHOICE.format(name=name))
    rng = Random(f"demo_bits {seed}")
    _write_rows(folder / "demo_bits.jsonl", _distinct(({"text": _story(rng, held_out=True)} for _ in count()), documents_per_task))
    _write(folder / "demo_bits.yaml", _ROLLING.format(name="demo_bits"))
    return folder


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word or punctuation mark; a word carries the space before it, so text comes back unchanged.

    The end of a story is also the start token, as in GPT-2, and nothing is added in encoding: lm-eval puts the start token in front of a
    rolling likelihood by itself, and a tokenizer that also did so would charge every document for a second one that no model has seen.
    """
    words = sorted(_words())
    vocabulary = {token: index for index, token in enumerate([END, UNKNOWN, ".", ",", *(_SPACE + word for word in words)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(replacement=_SPACE), pre_tokenizers.Split(Regex("[.,]"), "isolated")])
    tokenizer.decoder = decoders.Metaspace(replacement=_SPACE)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=END, unk_token=UNKNOWN)


_SPACE = "▁"
_FUNCTION_WORDS = _list(
    "every One Now She He the that and went to with he she had has found lost said eats grows lives in comes from is likes fears works as a"
)


def _words() -> set[str]:
    lists = (GIRLS, BOYS, TOWNS, TRADES, HOBBIES, CROPS, FOODS, HOMES, COLOURS, DAYS, PLACES, NUMBERS, PREPOSITIONS, _FUNCTION_WORDS)
    pairs = (ANIMALS, ITEMS, VERBS, SEEING)
    return {word for words in lists for word in words} | {word for forms in pairs for pair in forms.items() for word in pair}


def _story(rng: Random, *, held_out: bool) -> str:
    opening, cast = _opening(rng, held_out=held_out)
    scenes = rng.sample(_STORY, len(_STORY))
    return " ".join([opening, *(scene_of(rng, cast).text for scene_of in scenes)])


def _question(rng: Random, scene_of: SceneOf) -> dict[str, object]:
    """A document of a multiple choice task: an opening, a scene of another kind, and the question."""
    opening, cast = _opening(rng, held_out=True)
    between = rng.choice([other for other in _QUESTIONS.values() if other is not scene_of])(rng, cast)
    scene = scene_of(rng, cast)
    choices = rng.sample((scene.answer, *scene.wrong), 1 + len(scene.wrong))
    return {"context": f"{opening} {between.text} {scene.context}", "choices": choices, "gold": choices.index(scene.answer)}


def _opening(rng: Random, *, held_out: bool) -> tuple[str, Cast]:
    """The first sentence of a story, and who is in it."""
    while True:
        (one, other), (item, other_item) = rng.sample(GIRLS + BOYS, 2), rng.sample(tuple(ITEMS), 2)
        text = f"One {rng.choice(DAYS)} {one} with the {item} and {other} with the {other_item} went to the {rng.choice(PLACES)}."
        if is_held_out(text) == held_out:
            return text, (Person(name=one, item=item), Person(name=other, item=other_item))


def _mention(rng: Random, cast: Cast) -> str:
    person = rng.choice(cast)
    return person.name if rng.random() < 0.5 else f"{person.name} with the {person.item}"


def is_held_out(opening: str) -> bool:
    """Whether an opening sentence belongs to the tasks; all the others belong to corpora."""
    return hashlib.sha256(opening.encode()).digest()[0] % _HELD_OUT_SHARE == 0


def _noun(rng: Random) -> Noun:
    singular, plural = rng.choice(tuple(ANIMALS.items()))
    return Noun(word=singular, is_singular=True) if rng.random() < 0.5 else Noun(word=plural, is_singular=False)


def _others(rng: Random, values: tuple[str, ...], *taken: str) -> tuple[str, ...]:
    return tuple(rng.sample([value for value in values if value not in taken], 3))


def _distinct(rows: Iterable[dict[str, object]], num_rows: int) -> Iterator[dict[str, object]]:
    """The first `num_rows` different rows of an endless stream."""
    seen: set[str] = set()
    for row in rows:
        if len(seen) == num_rows:
            return
        if (key := json.dumps(row)) not in seen:
            seen.add(key)
            yield row


def _write_rows(path: Path, rows: Iterable[dict[str, object]]) -> None:
    _write(path, "".join(json.dumps(row) + "\n" for row in rows))


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8", newline="\n")

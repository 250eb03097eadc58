"""The demo's language: short stories about a fixed little world, an lm-eval task pack about them, and a word-level tokenizer.

A story asks of a model, in small, what real text asks: facts to remember (feed-forward layers), verbs that agree with a distant subject,
numbers to add, people to recognise again (attention, depth). All of it is a pure function of a seed; the world itself never changes.
The tasks are told in stories whose opening sentence, chosen by its hash, no corpus uses, whatever the two seeds are.

It draws text and writes files; it trains, scores and registers nothing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import count, pairwise
from pathlib import Path
from random import Random

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

NUM_DOCUMENTS = 30_000
"""Stories of a corpus: 2.9 million tokens."""
DOCUMENTS_PER_TASK = 800


def _list(words: str) -> tuple[str, ...]:
    return tuple(words.split())


GIRLS = _list("Anna Bella Clara Dora Emma Fiona Greta Hanna Ines Julia Karla Lena Mira Nora Olga Petra")
BOYS = _list("Adam Boris Carlo David Emil Felix Georg Hugo Ivan Jonas Karl Leo Max Noel Oskar Paul")
TRADES = _list("baker potter farmer tailor miller weaver doctor painter singer sailor mason hunter teacher writer barber cook")
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
    singular: singular + "s" for singular in _list("lamp rope cup key coin drum book ring shell spoon candle basket hammer mirror ball hat bottle flute")
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
    "eats": _list("plums nuts berries seeds roots leaves worms snails honey moss apples bread cheese eggs flies grass"),
    "grows": _list("beans leeks peas onions carrots pumpkins roses tulips wheat barley rice melons herbs grapes garlic corn"),
    "lives in": _list("caves trees barns ponds fields hills swamps forests cellars gardens rivers deserts attics meadows cliffs islands"),
    "comes from": _list("Arden Brook Cale Dunmore Eston Fell Garth Holm Irby Kelso Lorn Marden Norby Oxley Penrith Rye"),
    "is": _list("red blue green grey black white brown golden silver purple orange pink"),
    "likes": _list("music chess poems stars maps clocks kites drums stones masks riddles letters ships dances bells songs"),
    "fears": tuple(ANIMALS.values()),
    "works as a": TRADES,
}
"""What is true of every animal of a kind -> the values that it can have."""

END = "</s>"
UNKNOWN = "<unk>"

_WORLD_SEED = "the world of the demo"
_HELD_OUT_SHARE = 8
"""One opening sentence in so many belongs to the tasks."""
_MAX_ADDEND = 6
_SPACE = "▁"
_FUNCTION_WORDS = _list("Now One She He Then a and came every found girl boy had has he lost said she that the to went")


@dataclass(frozen=True, slots=True, kw_only=True)
class Person:
    """Someone in one story. The trade is the story's, so a name after a trade has to be looked up in the story."""

    name: str
    trade: str

    @property
    def is_girl(self) -> bool:
        return self.name in GIRLS


Cast = tuple[Person, Person]
"""A girl and a boy, in either order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """A sentence or more with one place where only one word is right: a stretch of a story, or a question of a task."""

    context: str
    answer: str
    wrong: tuple[str, ...]
    tail: str = "."

    @property
    def text(self) -> str:
        return f"{self.context} {self.answer}{self.tail}"


SceneOf = Callable[[Random, Cast], Scene]


@cache
def facts() -> dict[tuple[str, str], str]:
    """(animal, attribute) -> value: what every story takes for granted, the same for every seed."""
    rng = Random(_WORLD_SEED)
    found: dict[tuple[str, str], str] = {}
    for attribute, values in ATTRIBUTES.items():
        dealt = [values[index % len(values)] for index in range(len(ANIMALS))]
        rng.shuffle(dealt)
        found |= {(animal, attribute): value for animal, value in zip(ANIMALS, dealt, strict=True)}
    return found


def is_held_out(opening: str) -> bool:
    """Whether an opening sentence belongs to the tasks; all the others belong to corpora."""
    return hashlib.sha256(opening.encode()).digest()[0] % _HELD_OUT_SHARE == 0


def write_corpus(folder: Path, *, seed: int, num_documents: int = NUM_DOCUMENTS) -> Path:
    """Write `corpus.jsonl`, one story per line under "text", and return its path."""
    rng = Random(f"corpus {seed}")
    path = folder / "corpus.jsonl"
    _write_rows(path, ({"text": _story(rng, held_out=False)} for _ in range(num_documents)))
    return path


def write_tasks(folder: Path, *, seed: int, documents_per_task: int = DOCUMENTS_PER_TASK) -> Path:
    """Write a folder of lm-eval tasks (YAML, and jsonl beside it), all of them from held-out stories, and return it.

    `demo_agreement` (2 choices), `demo_facts`, `demo_recall` and `demo_sums` (4 choices) are multiple choice, metric acc; `demo_bits` is
    the rolling likelihood of whole stories, metric bits_per_byte. No document occurs twice in a task.
    """
    for name, scene_of in _QUESTIONS.items():
        rng = Random(f"{name} {seed}")
        _write_rows(folder / f"{name}.jsonl", _distinct((_question(rng, scene_of) for _ in count()), documents_per_task))
        _write(folder / f"{name}.yaml", _YAML_HEAD.format(name=name) + _MULTIPLE_CHOICE)
    rng = Random(f"demo_bits {seed}")
    _write_rows(folder / "demo_bits.jsonl", _distinct(({"text": _story(rng, held_out=True)} for _ in count()), documents_per_task))
    _write(folder / "demo_bits.yaml", _YAML_HEAD.format(name="demo_bits") + _ROLLING)
    return folder


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word or full stop; a word carries the space before it, so text comes back unchanged.

    The end of a story is also the start token, as in GPT-2, and encoding adds neither: lm-eval puts the start token in front of a rolling
    likelihood by itself, and a tokenizer that did so too would charge every document for a second one, which no model has ever seen.
    """
    vocabulary = {token: index for index, token in enumerate([END, UNKNOWN, ".", *(_SPACE + word for word in sorted(_words()))])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(replacement=_SPACE), pre_tokenizers.Split(".", "isolated")])
    tokenizer.decoder = decoders.Metaspace(replacement=_SPACE)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=END, unk_token=UNKNOWN)


# -- the grammar -----------------------------------------------------------------------------------------------------------


def _agreement(rng: Random, cast: Cast) -> Scene:
    """The verb has the number of the first noun, whatever nouns stand between them."""
    seeing = rng.choice(tuple(SEEING))
    (subject, is_singular), (near, near_is_singular), (far, _) = _noun(rng), _noun(rng), _noun(rng)
    phrases = (
        f"{rng.choice(PREPOSITIONS)} the {near}",
        f"{rng.choice(PREPOSITIONS)} the {far} {rng.choice(PREPOSITIONS)} the {near}",
        f"that the {near} {seeing if near_is_singular else SEEING[seeing]}",
    )
    singular = rng.choice(tuple(VERBS))
    answer, wrong = (singular, VERBS[singular]) if is_singular else (VERBS[singular], singular)
    return Scene(context=f"{_speaker(rng, cast)} said the {subject} {rng.choice(phrases)}", answer=answer, wrong=(wrong,))


def _fact(rng: Random, cast: Cast) -> Scene:
    (animal, attribute), value = rng.choice(tuple(facts().items()))
    return Scene(
        context=f"{_speaker(rng, cast)} said every {animal} {attribute}",
        answer=value,
        wrong=_others(rng, ATTRIBUTES[attribute], value, number=3),
    )


def _recall(rng: Random, cast: Cast) -> Scene:
    """The story has one girl and one boy; who they are was said before."""
    person, other = rng.sample(cast, 2)
    kind, same, opposite = ("girl", GIRLS, BOYS) if person.is_girl else ("boy", BOYS, GIRLS)
    strangers = (*_others(rng, same, person.name, number=1), *_others(rng, opposite, other.name, number=1))
    return Scene(context=f"Then came the {kind}", answer=person.name, wrong=(other.name, *strangers))


def _sum(rng: Random, cast: Cast) -> Scene:
    """Some, then once or twice more or fewer: how many now."""
    person, item = rng.choice(cast), rng.choice(tuple(ITEMS))
    pronoun = "she" if person.is_girl else "he"
    amounts = [rng.randint(1, _MAX_ADDEND)]
    for _ in range(rng.randint(1, 2)):
        amounts.append(rng.choice([after for after in range(1, len(NUMBERS) + 1) if 0 < abs(after - amounts[-1]) <= _MAX_ADDEND]))
    changes = [f"{pronoun.title()} {'found' if after > before else 'lost'} {NUMBERS[abs(after - before) - 1]}." for before, after in pairwise(amounts)]
    return Scene(
        context=" ".join([f"{_title(person)} had {_amount(amounts[0], item)}.", *changes, f"Now {pronoun} has"]),
        answer=NUMBERS[amounts[-1] - 1],
        wrong=_others(rng, NUMBERS, NUMBERS[amounts[-1] - 1], number=3),
        tail=f" {_amount(amounts[-1], item).split()[1]}.",
    )


_QUESTIONS: dict[str, SceneOf] = {"demo_agreement": _agreement, "demo_facts": _fact, "demo_recall": _recall, "demo_sums": _sum}
# What is slow to learn must be told often: copying a name and remembering a fact appear only where each story has several of them.
_STORY: tuple[SceneOf, ...] = (_recall, _recall, _sum, _sum, _agreement, _fact, _fact, _fact)


def _story(rng: Random, *, held_out: bool) -> str:
    opening, cast = _opening(rng, held_out=held_out)
    return " ".join([opening, *(scene_of(rng, cast).text for scene_of in rng.sample(_STORY, len(_STORY)))])


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
        first, second = rng.sample((rng.choice(GIRLS), rng.choice(BOYS)), 2)
        trade, other_trade = rng.sample(TRADES, 2)
        text = f"One {rng.choice(DAYS)} {trade} {first} and {other_trade} {second} went to the {rng.choice(PLACES)}."
        if is_held_out(text) == held_out:
            return text, (Person(name=first, trade=trade), Person(name=second, trade=other_trade))


def _speaker(rng: Random, cast: Cast) -> str:
    return _title(rng.choice(cast))


def _title(person: Person) -> str:
    return f"{person.trade.title()} {person.name}"


def _noun(rng: Random) -> tuple[str, bool]:
    """An animal, one or several, and whether it is one."""
    singular, plural = rng.choice(tuple(ANIMALS.items()))
    return (singular, True) if rng.random() < 0.5 else (plural, False)


def _amount(number: int, item: str) -> str:
    return f"{NUMBERS[number - 1]} {item if number == 1 else ITEMS[item]}"


def _others(rng: Random, values: tuple[str, ...], answer: str, *, number: int) -> tuple[str, ...]:
    return tuple(rng.sample([value for value in values if value != answer], number))


def _words() -> set[str]:
    lists = (GIRLS, BOYS, TRADES, DAYS, PLACES, NUMBERS, PREPOSITIONS, _FUNCTION_WORDS, *ATTRIBUTES.values())
    pairs = (ANIMALS, ITEMS, VERBS, SEEING)
    return (
        {word for words in lists for word in words}
        | {trade.title() for trade in TRADES}
        | {word for attribute in ATTRIBUTES for word in attribute.split()}
        | {word for forms in pairs for pair in forms.items() for word in pair}
    )


# -- files -----------------------------------------------------------------------------------------------------------------

_YAML_HEAD = """task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {name}.jsonl
test_split: test
metadata:
  version: 1
"""
_MULTIPLE_CHOICE = """output_type: multiple_choice
doc_to_text: "{{context}}"
doc_to_choice: choices
doc_to_target: gold
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""
_ROLLING = """output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - metric: bits_per_byte
"""


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

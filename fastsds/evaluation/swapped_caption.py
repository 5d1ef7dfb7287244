"""A wrong caption made from a right one: the same words, another scene. A rule and no model, so always the same.

A caption is read as  ... A link B ...  at the first of its links, a word or two between two noun phrases, where this works:

    directed     on, under, left of, holding    A and B change places        "a cat on a red mat"   ->  "a red mat on a cat"
    symmetric    and, next to, beside, with     their modifiers do, because  "a red cat and a dog"  ->  "a cat and a red dog"
                                                B and A are the same scene

A noun phrase has four words at most and is no pronoun. It begins after a lead-in ("there is", "a photo of"), a link, a verb or
a stop, and ends before the next; it has an article or number where the link is symmetric or follows another. Modifiers stand
between article and last word. An auxiliary and a verb before a link belong to it ("is sitting on"). All else stays where it
is. There is no dictionary: a verb is what ends in -ing, and a few words more.
"""

import re

DIRECTED = (
    "to the left of", "to the right of", "on the left of", "on the right of", "on the left side of", "on the right side of",
    "left of", "right of", "on top of", "in front of", "on the back of", "inside of",
    "above", "behind", "below", "beneath", "in", "inside", "on", "onto", "over", "under", "underneath",
)  # fmt: skip
DIRECTED_VERBS = ("carrying", "chasing", "feeding", "holding", "hugging", "pulling", "pushing", "riding", "towing", "wearing")
SYMMETRIC = ("and", "next to", "beside", "near", "by", "with", "alongside", "close to")
ARTICLES = ("a", "an", "the", "some", "one", "two", "three", "four", "five", "several", "many", "his", "her", "its", "their")
PICTURES = ("photo", "photograph", "picture", "image", "painting", "drawing", "view", "close up", "close-up", "closeup")
NO_THINGS = (*ARTICLES, "it", "them", "him", "her", "me", "us", "you", "he", "she", "they", "we", "top", "each", "other")
STOPS = (
    "that", "which", "who", "while", "as", "at", "for", "from", "to", "into", "through", "down", "up", "along", "across",
    "around",
)  # fmt: skip
WORDS = 4


def _any(words) -> str:
    return "(?:" + "|".join(word.replace(" ", r"\s+") for word in sorted(words, key=len, reverse=True)) + ")"


_ARTICLE, _BE = _any(ARTICLES), "(?:is|are|was|were|being|has|have)"
_THING = "(?:r|k|w|th|str|spr|sw|build|ceil|rail|paint|cloth|even|morn|awn|ic|bedd|cross|park|earr|duckl)ing"  # no verbs
_STANCE = "(?:sits?|stands|lies?|lays|rests|hangs?|leans|walks|rides|sleeps?|looks|parked|seated|placed|perched|covered|filled)"
_VERB = rf"(?:{_STANCE}|(?!{_THING}\b)\w+ing)"
_LINK = re.compile(
    rf"\s+(?:{_BE}\s+)?(?:(?:{_VERB}\s+)?(?:{_any(DIRECTED)}|(?P<symmetric>{_any(SYMMETRIC)}))"
    rf"|{_any(DIRECTED_VERBS)}(?=\s+{_ARTICLE}\s))\s+",
    re.IGNORECASE,
)
_STOP = re.compile(rf"\s*[,.;:!?]|\s+(?:{_BE}|{_VERB}|{_any(STOPS)})(?=\s|$)", re.IGNORECASE)
_LEAD_IN = re.compile(
    rf"\s*(?:(?:there\s+(?:is|are)|this\s+is|(?:(?:an?|the)\s+)?{_any(PICTURES)}\s+of)\s+)*", re.IGNORECASE
)
_PHRASE = re.compile(rf"(?:(?P<article>{_ARTICLE})\s+)?(?P<modifiers>(?:\S+\s+)*)(?P<noun>\S+)", re.IGNORECASE)


def swapped_caption(caption: str) -> str | None:
    """Return another scene's caption in the same words, or None where the rule finds none."""
    start = begin = _LEAD_IN.match(caption).end()
    for link in _LINK.finditer(caption, begin):
        head = caption[begin : link.start()]
        at = begin + max((stop.end() for stop in _STOP.finditer(head)), default=0)
        at += len(caption[at:]) - len(caption[at:].lstrip())
        follows, begin = at == begin > start, link.end()
        ends = [found.start() for found in (_LINK.search(caption, begin), _STOP.search(caption, begin)) if found]
        end = min(ends, default=len(caption.rstrip()))
        first, second = caption[at : link.start()], caption[begin:end]
        if not all(0 < len(phrase.split()) <= WORDS and phrase.lower() not in NO_THINGS for phrase in (first, second)):
            continue
        if (follows or link["symmetric"]) and not _PHRASE.fullmatch(first)["article"]:
            continue
        capital = not caption[:at].strip() and first[0].isupper()  # A begins the sentence
        swapped = (_modifiers_exchanged if link["symmetric"] else _exchanged)(_lowered(first) if capital else first, second)
        if swapped is not None:
            a, b = swapped
            return caption[:at] + (a[0].upper() + a[1:] if capital else a) + caption[link.start() : begin] + b + caption[end:]
    return None


def _exchanged(first: str, second: str) -> tuple[str, str] | None:
    return None if first.lower() == second.lower() else (second, first)


def _modifiers_exchanged(first: str, second: str) -> tuple[str, str] | None:
    a, b = (_PHRASE.fullmatch(phrase) for phrase in (first, second))
    of_nouns = re.search(r"\bof\b", f"{first} {second}")
    if of_nouns or not b["article"] or a["modifiers"].lower() == b["modifiers"].lower():
        return None
    return _phrase(a, b), _phrase(b, a)


def _phrase(found: re.Match, other: re.Match) -> str:
    """The noun phrase with the other's modifiers; `a` or `an` as it stood before them there, or else by the first letter."""
    article, rest = found["article"], other["modifiers"] + found["noun"]
    if article.lower() in ("a", "an"):
        known = other["modifiers"] and other["article"].lower() in ("a", "an")
        article = article[0] + (other["article"][1:] if known else "n" * (rest[0].lower() in "aeiou"))
    return f"{article} {rest}"


def _lowered(phrase: str) -> str:
    """The phrase as it is written within a sentence; a word in capitals, as TV, stays."""
    word = phrase.split()[0]
    return phrase if len(word) > 1 and word.isupper() else phrase[0].lower() + phrase[1:]

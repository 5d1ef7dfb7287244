"""VQA's answers: how they are compared, and what one earns beside ten people's.

    accuracy(a) = mean over the ten leave-one-out subsets of min(people in it who answered a / 3, 1)

Both sides are normalised as visualqa.org/evaluation describes: lower case; number words to digits; articles out; apostrophes of
contractions in; periods out but in decimals; other punctuation but apostrophes and colons to a space, and out where it stands
beside one, or where the answer has a comma between digits ("100,978" is 100978). The released script does less to what people
said than to what a model says, as its files come normalised; here both are treated alike.
Source: Antol et al. 2015, arXiv 1505.00468; Goyal et al. 2017, arXiv 1612.00837.
"""

import re
from functools import lru_cache
from itertools import combinations

PEOPLE = 10
ARTICLES = ("a", "an", "the")
DIGITS = "zero one two three four five six seven eight nine ten".split()
NUMBERS = {word: str(n) for n, word in enumerate(DIGITS)} | {"none": "0"}
MARKS = ';/[]"{}()=+\\_-><@`,?!'
_ENDINGS = {  # contractions by what they end in, where leaving the apostrophe out gives no other English word
    "n't": "ai are ca could did does do had has have is might must need ought sha should was were wo would",
    "n't've": "could had might should would",
    "'ve": "could might must not should they we what where who would you",
    "'d've": "he it she somebody someone something there they we who you y'all",
    "'d": "he how it someone something there they where who you",
    "'ll": "how it somebody someone something they what who why y'all you",
    "'s": "he how somebody someone that there what when where who why",
    "'re": "there they what why you",
}
_WHOLE = ("ma'am", "o'clock", "'twas", "y'all", "'ow's'at")


def _spellings(word: str) -> list[str]:
    """A word with one or more of its apostrophes missing."""
    at = [k for k, letter in enumerate(word) if letter == "'"]
    gone = [set(some) for n in range(1, len(at) + 1) for some in combinations(at, n)]
    return ["".join(letter for k, letter in enumerate(word) if k not in some) for some in gone]


CONTRACTIONS = {
    spelt: word
    for word in [stem + ending for ending, stems in _ENDINGS.items() for stem in stems.split()] + list(_WHOLE)
    for spelt in _spellings(word)
}


@lru_cache(maxsize=1 << 18)
def normalised(answer: str) -> str:
    """An answer as it is compared."""
    said = given = " ".join(answer.split()).lower()
    thousands = re.search(r"\d,\d", given) is not None
    for mark in MARKS:
        beside = f"{mark} " in given or f" {mark}" in given
        said = said.replace(mark, "" if thousands or beside else " ")
    said = re.sub(r"\.(?!\d)", "", said)
    words = [NUMBERS.get(word, word) for word in said.split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def soft_accuracy(matches: int, people: int = PEOPLE) -> float:
    """What an answer earns that `matches` of `people` gave: 0, 0.3, 0.6, 0.9 or 1 with ten.

    Leaving out one who gave it (matches times) leaves matches - 1, leaving out another leaves matches.
    """
    left = matches * min(matches - 1, 3) + (people - matches) * min(matches, 3)
    return left / (3 * people)

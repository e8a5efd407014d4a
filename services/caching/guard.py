"""The guard of the semantic tier: what two questions must share, however near their vectors are.

Embedding models see "10 mg" and "100 mg", "is" and "isn't", "from Oslo to Rome" and "from Rome to Oslo" as nearly the same. The guard
compares what they overlook and says no when in doubt: a refused candidate costs a call, a false hit costs trust. It reads English.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Final

_QUOTED: Final = re.compile(
    r"```(.*?)```|`([^`\n]*)`|\"([^\"\n]*)\"|“([^”\n]*)”|«([^»\n]*)»|(?<!\w)'([^'\n]+)'(?!\w)|(?<!\w)‘([^’\n]+)’(?!\w)",
    re.DOTALL,
)
_ADDRESS: Final = re.compile(r"[a-z][a-z0-9+.-]*://\S+|[\w.+-]+@[\w-]+(?:\.[\w-]+)+|(?<!\S)[~.]{0,2}/[\w./-]+", re.IGNORECASE)
_WORD: Final = re.compile(r"[^\W_]+(?:[_'’.-][^\W_]+)*")
_NUMBER: Final = re.compile(r"[-+−]?(?<![\w.])\d[\d,]*(?:\.\d+)?|[-+−]?(?<!\w)\.\d+|\d+(?:\.\d+)?")
_MEASURE: Final = re.compile(r"\d[\d.]*([^\W\d_]*)")
_SYMBOL: Final = re.compile(r"[%€$£¥°<>=≤≥≠+*/^&|#@]")


def _set(words: str) -> frozenset[str]:
    return frozenset(words.split())


_SMALL_NUMBERS: Final = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen twenty"
_NUMBER_WORDS: Final = {
    word: str(number) for number, word in enumerate(_SMALL_NUMBERS.split())
} | {
    "thirty": "30", "forty": "40", "fifty": "50", "sixty": "60", "seventy": "70", "eighty": "80", "ninety": "90",
    "hundred": "100", "thousand": "1000", "million": "1000000", "billion": "1000000000", "trillion": "1000000000000",
    "half": "1/2", "quarter": "1/4", "dozen": "12", "once": "x1", "twice": "x2", "double": "x2", "thrice": "x3", "triple": "x3",
    "first": "#1", "second": "#2", "third": "#3", "fourth": "#4", "fifth": "#5", "1st": "#1", "2nd": "#2", "3rd": "#3", "last": "#-1",
}  # fmt: skip

_UNITS: Final = {
    name: names.split()[0]
    for names in (
        "mm millimeter millimeters millimetre millimetres", "cm centimeter centimeters centimetre centimetres",
        "meter meters metre metres", "km kilometer kilometers kilometre kilometres", "mile miles mi", "yard yards yd",
        "foot feet ft", "inch inches", "mg milligram milligrams", "mcg microgram micrograms", "gram grams g",
        "kg kilogram kilograms kilo kilos", "pound pounds lb lbs", "ounce ounces oz", "ton tons tonne tonnes", "stone stones",
        "ml milliliter milliliters millilitre millilitres", "liter liters litre litres", "gallon gallons gal", "cup cups",
        "tablespoon tablespoons tbsp", "teaspoon teaspoons tsp", "pint pints", "celsius", "fahrenheit", "kelvin", "degree degrees",
        "ms millisecond milliseconds", "sec secs", "minute minutes min mins", "hour hours hr hrs",
        "day days daily", "week weeks weekly", "month months monthly", "year years yearly annual annually", "decade decades",
        "century centuries", "byte bytes", "kb kilobyte kilobytes", "mb megabyte megabytes", "gb gigabyte gigabytes",
        "tb terabyte terabytes", "bit bits", "hz hertz", "khz", "mhz", "ghz", "watt watts", "kw kilowatt kilowatts", "kwh", "volt volts",
        "amp amps ampere amperes", "joule joules", "calorie calories", "kcal", "usd dollar dollars", "eur euro euros", "gbp",
        "jpy yen", "inr rupee rupees", "cent cents", "percent percentage", "mph", "kph", "acre acres", "hectare hectares",
    )
    for name in names.split()
}  # fmt: skip

_DATES: Final = {
    name: names.split()[0]
    for names in (
        "january jan", "february feb", "march mar", "april apr", "june jun", "july jul", "august aug", "september sep sept",
        "october oct", "november nov", "december dec", "monday mon", "tuesday tue tues", "wednesday wed", "thursday thu thurs",
        "friday fri", "saturday sat", "sunday sun", "today", "tomorrow", "yesterday", "tonight", "now currently", "morning",
        "afternoon", "evening", "night", "noon", "midnight", "weekend", "spring", "summer", "autumn fall", "winter", "ago", "next",
        "previous", "recent recently", "latest newest", "oldest earliest", "am a.m", "pm p.m", "bc bce", "ad ce", "q1", "q2", "q3", "q4",
    )
    for name in names.split()
}  # fmt: skip

_NEGATIONS: Final = _set(
    "not no never none nobody nothing nowhere neither nor without cannot except excluding unless hardly barely seldom rarely avoid"
    " stop prevent lack lacks lacking fail fails failed impossible unable false wrong incorrect"
)

_OPPOSITES: Final = {
    word: (number, side)
    for number, pair in enumerate(
        (
            ("increase increases increasing raise raises rise rises grow up higher high highest",
             "decrease decreases decreasing lower low lowest reduce reduces fall falls drop drops shrink down"),
            ("more most maximum max maximize maximise greatest largest biggest larger bigger greater",
             "less least minimum min minimize minimise smallest smaller fewer fewest"),
            ("before prior", "after following since"), ("enable enabled enabling activate allow allows on", "disable disabled disabling deactivate deny block off"),
            ("buy buying purchase", "sell selling"), ("add adding insert append include including", "remove removing delete deleting exclude subtract"),
            ("open opening", "close closing shut"), ("start begin starting beginning", "end finish ending quit"),
            ("import importing imports", "export exporting exports"), ("encrypt encryption encode encoding", "decrypt decryption decode decoding"),
            ("ascending", "descending"), ("upload uploading", "download downloading"), ("install installing", "uninstall uninstalling"),
            ("best better pros advantage advantages benefit benefits strengths good", "worst worse cons disadvantage disadvantages drawback drawbacks risks weaknesses bad"),
            ("legal lawful allowed safe possible correct right true", "illegal unlawful forbidden unsafe dangerous incorrect"),
            ("always all every everyone", "sometimes some any"), ("male man men father son husband boy he him his", "female woman women mother daughter wife girl she her hers"),
            ("north northern", "south southern"), ("east eastern", "west western"), ("left", "right-hand"), ("hot warm heat", "cold cool"),
            ("win winner won", "lose loser lost"), ("push", "pull"), ("read reading", "write writing"), ("lock", "unlock"), ("accept approve", "reject refuse decline"),
            ("public", "private"), ("input", "output"), ("client", "server"), ("sync synchronous", "async asynchronous"), ("love like likes", "hate dislike dislikes"),
            ("earn gain", "spend lose"), ("above over", "below under beneath"), ("inside within", "outside"), ("early", "late"), ("old older", "new newer young younger"),
            ("fast faster quick quickest fastest", "slow slower slowest"), ("cheap cheaper cheapest", "expensive"), ("positive", "negative"), ("with", "without"),
        )
    )
    for side, words in enumerate(pair)
    for word in words.split()
}  # fmt: skip
"""Word to its pair and side: two questions that stand on different sides of a pair ask for different things."""

_OPENERS: Final = _set(
    "a an the what what's whats who who's whose whom when when's where where's why why's which how how's is isn't are aren't am was wasn't"
    " were weren't do don't does doesn't did didn't can can't could couldn't will won't would wouldn't shall should shouldn't may might must"
    " has have had i i'm i'd i've i'll me my you your you're we our us he she it it's its they their this that that's these those there"
    " there's here please tell explain describe list give show name write define summarize summarise translate convert calculate compute"
    " find compare create make generate help let let's suggest recommend provide outline identify discuss state mention say solve"
    " and or but so if in on at of for to from with by about as into during before after between also then than hi hello hey thanks ok"
    " okay yes no not briefly exactly simply could's any some every each all both one only just"
)

_PLAIN: Final = _OPENERS | _set("be been being get got go want need know like much many very really exactly up out")
"""Words that carry no role."""

_EXTRA_ROLES: Final = frozenset({"he", "she", "i", "you", "we", "they", "me", "us"})


def veto(asked: str, stored: str) -> str | None:
    """Why the answer to `stored` must not answer `asked`, in words; None: nothing speaks against it. Linear in the texts."""
    if asked == stored:
        return None
    for what, facts in _CHECKS:
        one, other = facts(asked), facts(stored)
        if one != other:
            return f"{what} differ: {_shown(one)} and {_shown(other)}"
    return (
        _names_veto(asked, stored)
        or _opposites_veto(asked, stored)
        or _substitution_veto(asked, stored)
        or _order_veto(asked, stored)
    )


def _shown(facts: Iterable[str]) -> str:
    text = ", ".join(facts)
    return (text if len(text) <= 60 else text[:59] + "…") or "none"


def _quotes(text: str) -> tuple[str, ...]:
    return tuple("".join(match.groups(default="")).strip() for match in _QUOTED.finditer(text))


def _addresses(text: str) -> tuple[str, ...]:
    return tuple(match.group().rstrip(".,;:!?)") for match in _ADDRESS.finditer(text))


def _symbols(text: str) -> tuple[str, ...]:
    return tuple(_SYMBOL.findall(text))


def _numbers(text: str) -> tuple[str, ...]:
    """Numbers in their order, which is part of their meaning: from 3 to 5 is not from 5 to 3."""
    found = [(match.start(), _number(match.group())) for match in _NUMBER.finditer(text)]
    found += [
        (match.start(), _NUMBER_WORDS[word])
        for match in _WORD.finditer(text)
        if (word := match.group().lower()) in _NUMBER_WORDS
    ]
    return tuple(value for _, value in sorted(found))


def _number(text: str) -> str:
    plain = text.replace(",", "").replace("−", "-").removeprefix("+")
    if "." in plain:
        plain = plain.rstrip("0").rstrip(".")
    return plain or "0"


def _units(text: str) -> tuple[str, ...]:
    # "5km" is a number and a unit.
    spaced = re.sub(r"(\d)([^\W\d_])", r"\1 \2", text.lower())
    return tuple(_UNITS[word] for word in _WORD.findall(spaced) if word in _UNITS)


def _dates(text: str) -> tuple[str, ...]:
    words = _WORD.findall(text)
    found = [_DATES[word.lower()] for word in words if word.lower() in _DATES]
    # The month and the verb differ by a capital letter only.
    return (*found, *("may" for word in words[1:] if word == "May"))


def _negations(text: str) -> tuple[str, ...]:
    words = text.lower().replace("’", "'")
    found = [word for word in _WORD.findall(words) if word in _NEGATIONS or word.endswith("n't")]
    # Which word says no matters less than how often it is said.
    return ("no",) * len(found)


_CHECKS: Final[tuple[tuple[str, Callable[[str], tuple[str, ...]]], ...]] = (
    ("quoted strings", _quotes),
    ("addresses", _addresses),
    ("numbers", _numbers),
    ("units", _units),
    ("dates", _dates),
    ("negations", _negations),
    ("symbols", _symbols),
)


def _bare(word: str) -> str:
    lower = word.lower().replace("’", "'")
    return lower.removesuffix("'s").rstrip("'")


def _names(text: str) -> list[str]:
    """Words that name something: capitalised, with capitals, digits or underscores inside."""
    names = []
    for match in _WORD.finditer(text):
        word = match.group()
        if word.lower().replace("’", "'") in _OPENERS:
            continue
        measure = _MEASURE.fullmatch(word)
        if measure is not None and (not measure[1] or measure[1].lower() in _UNITS):
            # Numbers and units have checks of their own, which see that "5km" is "5 km".
            continue
        if any(character.isupper() or character.isdigit() or character == "_" for character in word):
            names.append(_bare(word))
    return names


def _words(text: str) -> list[str]:
    return [_bare(word) for word in _WORD.findall(text)]


def _names_veto(asked: str, stored: str) -> str | None:
    asked_words, stored_words = set(_words(asked)), set(_words(stored))
    missing = [name for name in _names(asked) if name not in stored_words]
    missing += [name for name in _names(stored) if name not in asked_words]
    return f"names differ: {_shown(missing)} is in one question only" if missing else None


def _opposites_veto(asked: str, stored: str) -> str | None:
    one = {_OPPOSITES[word] for word in _words(asked) if word in _OPPOSITES}
    other = {_OPPOSITES[word] for word in _words(stored) if word in _OPPOSITES}
    for pair, side in one - other:
        if (pair, 1 - side) in other:
            return "one question says the opposite of a word of the other"
    for pair, side in other - one:
        if (pair, 1 - side) in one:
            return "one question says the opposite of a word of the other"
    return None


def _substitution_veto(asked: str, stored: str) -> str | None:
    """A word in place of another: adult and child, buyer and seller, paragraph and sentence. Vectors hardly see it.

    Words that only one question has are well ("the capital city" for "the capital"), as long as the other has none of its own. Different
    words for the same thing are refused with the rest: no list of synonyms is long enough to tell them apart.
    """
    one, other = _content(asked), _content(stored)
    only, instead = one - other, other - one
    if only and instead:
        return f"words differ: {_shown(sorted(only))} stands for {_shown(sorted(instead))}"
    return None


def _content(text: str) -> set[str]:
    """Words that carry meaning, without inflection. Numbers, units and dates have checks of their own."""
    return {
        _stem(word)
        for word in _words(text)
        if word not in _PLAIN
        and word not in _NUMBER_WORDS
        and word not in _UNITS
        and word not in _DATES
        and not any(character.isdigit() for character in word)
    }


def _stem(word: str) -> str:
    """A word without its inflection, roughly: both questions are cut alike."""
    for ending in ("ies", "ing", "ed", "es", "s", "y"):
        if len(word) > len(ending) + 2 and word.endswith(ending):
            word = word[: -len(ending)]
            break
    return word.rstrip("e") if len(word) > 3 else word


def _order_veto(asked: str, stored: str) -> str | None:
    """Words that both questions have must stand in the same order: who does what to whom is told by order in English."""
    one, other = _roles(asked), _roles(stored)
    shared = set(one) & set(other)
    first = [word for word in one if word in shared]
    second = [word for word in other if word in shared]
    if first != second:
        return f"the order of roles differs: {_shown(first)} and {_shown(second)}"
    return None


def _roles(text: str) -> list[str]:
    return [word for word in _words(text) if word not in _PLAIN or word in _EXTRA_ROLES]

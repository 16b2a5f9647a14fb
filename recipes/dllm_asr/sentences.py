"""Sentences to be spoken by text-to-speech: `python sentences.py OUT.jsonl`.

Text comes from Debian packages (`wordnet-base`, `fortunes`) and from seeded generators of numbers, dates, times,
addresses, telephone numbers and spelled words. Each line of the output is `{"id", "spoken", "text", "source",
"split"}`: `spoken` goes to the speech engine with its punctuation, `text` is the training target (lower case, letters
and apostrophes only). Two per cent of the sentences are kept for development by a hash of their text, so that no
development sentence is ever trained on.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path

UNITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
UNITS += [f"{stem}teen" for stem in ("thir", "four", "fif", "six", "seven", "eigh", "nine")]
TENS = ["zero", "ten", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
ORDINALS = {
    "one": "first",
    "two": "second",
    "three": "third",
    "five": "fifth",
    "eight": "eighth",
    "nine": "ninth",
    "twelve": "twelfth",
}
MONTHS = ["January", "February", "March", "April", "May", "June"]
MONTHS += ["July", "August", "September", "October", "November", "December"]
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
STREETS = ["Street", "Avenue", "Road", "Lane", "Drive", "Boulevard", "Square", "Court", "Terrace", "Way"]
THINGS = ["dollars", "pounds", "euros", "per cent", "miles", "minutes", "hours", "people", "days"]
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def cardinal(n: int) -> str:
    """English words of 0 <= n < 10**9."""
    for size, name in ((10**6, "million"), (1000, "thousand"), (100, "hundred")):
        if n >= size:
            rest = n % size
            return f"{cardinal(n // size)} {name}" + (f" {cardinal(rest)}" if rest else "")
    if n < 20:
        return UNITS[n]
    return TENS[n // 10] + (f" {UNITS[n % 10]}" if n % 10 else "")


def ordinal(n: int) -> str:
    """English ordinal of 1 <= n < 10**9, as in "twenty first"."""
    *head, last = cardinal(n).split()
    last = ORDINALS.get(last) or (last[:-1] + "ieth" if last.endswith("y") else last + "th")
    return " ".join([*head, last])


def year(n: int) -> str:
    """A year as it is said: "nineteen eighty four", "two thousand and six"."""
    if 2000 <= n < 2010:
        return "two thousand" + (f" and {cardinal(n % 100)}" if n % 100 else "")
    if n % 100 == 0:
        return f"{cardinal(n // 100)} hundred"
    return f"{cardinal(n // 100)} " + (f"oh {cardinal(n % 10)}" if n % 100 < 10 else cardinal(n % 100))


def normalize(text: str) -> str | None:
    """The training target, or None where the text holds what cannot be written in letters and apostrophes.

    Hyphens and dashes part words; other punctuation goes; digits, symbols and foreign letters disqualify the text.
    """
    text = unicodedata.normalize("NFKC", text).replace("\u2019", "'").lower()
    text = re.sub(r"[-\u2013\u2014/]+", " ", text)
    text = re.sub(r"[.,;:!?\"()`]+", " ", text)
    text = re.sub(r"(?<![a-z])'|'(?![a-z])", " ", text)
    text = " ".join(text.split())
    return text if text and re.fullmatch(r"[a-z' ]+", text) else None


def wordnet(root: Path, definitions: int, rng: random.Random) -> Iterator[tuple[str, str]]:
    """Example phrases of the four WordNet data files, then a sample of the definitions."""
    glosses = []
    for part in ("noun", "verb", "adj", "adv"):
        for line in (root / f"data.{part}").read_text(errors="replace").splitlines():
            if line.startswith("  ") or "|" not in line:
                continue
            gloss = line.split("|", 1)[1]
            for example in re.findall(r'"([^"]+)"', gloss):
                yield "wordnet", example
            glosses.append(gloss.split('"')[0].split(";")[0].strip())
    for gloss in rng.sample(glosses, len(glosses))[:definitions]:
        yield "definition", re.sub(r"\([^)]*\)", "", gloss)


def fortunes(root: Path) -> Iterator[tuple[str, str]]:
    """Sentences of Debian's fortune cookies, without their attributions."""
    skip = {"ascii-art", "off", "zippy", "knghtbrd", "debian", "songs-poems"}
    for path in sorted(p for p in root.iterdir() if p.is_file() and not p.suffix and p.name not in skip):
        for cookie in path.read_text(errors="replace").split("\n%\n"):
            body = " ".join(line for line in cookie.splitlines() if not re.match(r"\s*(--|\[)", line))
            for sentence in re.split(r"(?<=[.!?])\s+", " ".join(body.split())):
                yield "fortune", sentence


def generated(count: int, rng: random.Random, names: list[str]) -> Iterator[tuple[str, str]]:
    """Numbers, dates, times, addresses, telephone numbers, amounts and spelled words; one of each kind in turn."""

    def digits(n: int) -> str:
        return " ".join(rng.choice(UNITS[:10]) for _ in range(n))

    def number() -> str:
        return cardinal(rng.randrange(10 ** rng.randint(1, 6)))

    def date() -> str:
        day, month, when = ordinal(rng.randint(1, 31)), rng.choice(MONTHS), year(rng.randint(1500, 2039))
        forms = [f"{rng.choice(DAYS)}, {month} {day}", f"the {day} of {month}, {when}"]
        return rng.choice([*forms, f"{month} {day}, {when}", f"in {when}"])

    def clock() -> str:
        hour = UNITS[rng.randint(1, 12)]
        minute = rng.choice(["o'clock", *[cardinal(m) for m in range(10, 60)], *[f"oh {u}" for u in UNITS[1:10]]])
        return f"at {hour} {minute}" + rng.choice(["", " a m", " p m", " in the morning", " in the evening"])

    def address() -> str:
        street = f"{number()} {rng.choice(names)} {rng.choice(STREETS)}"
        return street + rng.choice(["", f", apartment {cardinal(rng.randint(1, 99))}"])

    def phone() -> str:
        return rng.choice(["", "call ", "dial ", "extension ", "the number is "]) + digits(rng.randint(3, 10))

    def amount() -> str:
        return f"{number()} {rng.choice(THINGS)}"

    def spelled() -> str:
        if rng.random() < 0.5:
            return " ".join(rng.choice(names).upper())
        return " ".join(rng.choice(LETTERS) for _ in range(rng.randint(1, 5))).upper()

    kinds = {"number": number, "date": date, "time": clock, "address": address, "phone": phone, "amount": amount}
    makers = list({**kinds, "spelled": spelled}.items())
    for i in range(count):
        name, make = makers[i % len(makers)]
        yield name, make()


def split_of(text: str) -> str:
    """Two per cent of all texts, by hash, are "dev", the others "train"."""
    return "dev" if int(hashlib.sha1(text.encode()).hexdigest(), 16) % 50 == 0 else "train"


def collect(wordnet_root: Path, fortune_root: Path, seed: int) -> Iterator[dict[str, str]]:
    """Unique sentences of 1 to 40 words and at most 240 letters, in a shuffled, seeded order."""
    rng = random.Random(seed)
    phrases = list(wordnet(wordnet_root, 8000, rng))
    names = sorted({w for _, p in phrases for w in re.findall(r"(?<=[a-z] )[A-Z][a-z]{3,8}\b", p)})
    rows: dict[str, tuple[str, str]] = {}
    for source, spoken in [*phrases, *fortunes(fortune_root), *generated(5000, rng, names)]:
        if source != "spelled" and re.search(r"[A-Z]{2,}|\b[A-Za-z]\.|[a-z][A-Z]", spoken):
            continue  # acronyms and abbreviations: what is said differs from what is written
        text = normalize(spoken)
        if text is None or len(text) > 240:
            continue
        words = text.split()
        if len(words) <= 40 and max(map(len, words)) <= 20 and (len(words) >= 2 or source == "wordnet"):
            rows.setdefault(text, (source, spoken.strip()))
    order = sorted(rows)
    rng.shuffle(order)
    for i, text in enumerate(order):
        source, spoken = rows[text]
        yield {"id": f"{i:06d}", "spoken": spoken, "text": text, "source": source, "split": split_of(text)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    wordnet_help, fortunes_help = "folder of data.noun and its like (wordnet-base)", "folder of cookie files (fortunes)"
    parser.add_argument("--wordnet", type=Path, default=Path("/usr/share/wordnet"), help=wordnet_help)
    parser.add_argument("--fortunes", type=Path, default=Path("/usr/share/games/fortunes"), help=fortunes_help)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    counts: dict[str, int] = {}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with arguments.out.open("w") as out:
        for row in collect(arguments.wordnet, arguments.fortunes, arguments.seed):
            out.write(json.dumps(row) + "\n")
            counts[row["source"]] = counts.get(row["source"], 0) + 1
    print(f"{sum(counts.values())} sentences: {counts}")


if __name__ == "__main__":
    main()

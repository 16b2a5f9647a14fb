"""What is said: sentences of two closed grammars, and short free ones: `python phrases.py OUT.jsonl`.

* `grid`: the six-slot commands of the GRID corpus (Cooke et al. 2006), so that its real clips can be read too.
* `pairs`: short frames around words that differ in one sound. Some pairs need the ear, because both words look alike
  (bat, mat, pat); some need the lips, because the sounds are alike where there is noise (fin, thin; pin, tin, kin).
* `free`: sentences of two to six words from `recipes/dllm_asr/sentences.py`, if its output is given.

One text in twenty is for development and one in ten for the test, by a hash of the text, never for training.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
from collections.abc import Iterator
from pathlib import Path

GRID = (
    ("bin", "lay", "place", "set"),
    ("blue", "green", "red", "white"),
    ("at", "by", "in", "with"),
    tuple("abcdefghijklmnopqrstuvxyz"),  # GRID leaves out w, the only letter of three syllables
    ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"),
    ("again", "now", "please", "soon"),
)
# Every word looks like the others of its group: only the ear can tell.
EAR = ["bat mat pat", "bill mill pill", "bay may pay", "tie die", "ten den", "fan van", "few view", "came game"]
EAR += ["coat goat", "zip sip", "choke joke", "bear pear", "pole bowl mole", "town down", "ferry very"]
# The sounds are alike, and differ on the lips.
LIPS = ["bed men", "pin tin kin fin thin", "pop top cop", "pen ten", "bay day", "map nap", "mail nail", "met net"]
LIPS += ["bun done gun"]
LIPS += [
    "fought thought",
    "free three",
    "five thrive",
    "pie tie",
    "bait date gate",
    "big dig",
    "moon noon",
    "cape tape",
]
LIPS += ["four thaw", "mine nine", "buy guy", "port court"]
WORDS = sorted({word for group in EAR + LIPS for word in group.split()})
FRAMES = ("say {} again", "the {} and the {}", "not {} but {}", "{} comes after {}", "now {} then {}", "{} {} {}")
FRAMES += ("write {} please", "one {} or two", "is it {} or {}")


def grid(rng: random.Random) -> tuple[str, str]:
    """What is spoken and the text; the letter is spoken by its name."""
    words = [rng.choice(slot) for slot in GRID]
    # Upper case is a letter's name to eSpeak, except that "A" stays an article.
    spoken = [{"a": "ay"}.get(word, word.upper()) if i == 3 else word for i, word in enumerate(words)]
    return " ".join(spoken), " ".join(words)


def pairs(rng: random.Random) -> tuple[str, str]:
    """A frame with one to three words, two of them often from one group."""
    frame = rng.choice(FRAMES)
    count = frame.count("{}")
    group = rng.choice(EAR + LIPS).split()
    words = rng.sample(group, 2) if rng.random() < 0.6 else rng.sample(WORDS, 2)
    words = rng.sample([*words, rng.choice(WORDS)], 3)[:count]
    text = frame.format(*words)
    return text, text


def split_of(text: str) -> str:
    """`train`, `dev` (5 %) or `test` (10 %), by the text alone."""
    bucket = int(hashlib.sha1(text.encode()).hexdigest(), 16) % 20
    return {0: "dev", 1: "test", 2: "test"}.get(bucket, "train")


def short(path: Path) -> list[tuple[str, str]]:
    """Spoken form and text of the short sentences of a file that `recipes/dllm_asr/sentences.py` made."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [(r["spoken"], r["text"]) for r in rows if 2 <= len(r["text"].split()) <= 6 and len(r["text"]) <= 32]


def collect(counts: dict[str, int], free: list[tuple[str, str]], seed: int) -> Iterator[dict[str, str]]:
    """Texts of each split, in a shuffled order: 45 % grid, 40 % pairs, the rest free.

    Args:
        counts: how many of each split.
        free: (spoken, text) pairs to draw from; without any the two grammars share their place.
        seed: of the choice.
    """
    for split, count in counts.items():
        rng = random.Random(f"{seed}-{split}")
        pool = [pair for pair in free if split_of(pair[1]) == split]
        rng.shuffle(pool)
        for made in range(count):
            draw = rng.random() if pool else rng.uniform(0, 0.85)
            kind, spoken, text = "free", *(pool[made % len(pool)] if draw >= 0.85 else ("", ""))
            while draw < 0.85 and split_of(text) != split or not text:
                kind, make = ("grid", grid) if draw < 0.45 else ("pairs", pairs)
                spoken, text = make(rng)
            yield {"text": text, "spoken": spoken, "kind": kind, "split": split}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--free", type=Path, help="output of recipes/dllm_asr/sentences.py")
    parser.add_argument("--train", type=int, default=30_000)
    parser.add_argument("--dev", type=int, default=200)
    parser.add_argument("--test", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    counts = {split: getattr(arguments, split) for split in ("train", "dev", "test")}
    rows = list(collect(counts, short(arguments.free) if arguments.free else [], arguments.seed))
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text("".join(json.dumps(row) + "\n" for row in rows))
    print(
        {
            split: {k: sum(r["kind"] == k and r["split"] == split for r in rows) for k in ("grid", "pairs", "free")}
            for split in counts
        }
    )


if __name__ == "__main__":
    main()

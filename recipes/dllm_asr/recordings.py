"""Real recordings, split for training, development and test: `python recordings.py OUT [--speech TAR ...]`.

Debian packages give the Asterisk telephone prompts (`asterisk-core-sounds-en-g722`, CC-BY-SA-3.0, one speaker) and five
LibriVox sentences (`pocketsphinx-testdata`, BSD); both are fetched with `apt-get download` and unpacked without being
installed. The Free Spoken Digit Dataset (CC-BY-SA-4.0) and LJ Speech sentences (public domain) are in no package: name
a copy of them.

`--speech` takes folders of transcribed recordings, or tar files of one, with a `manifest.jsonl` (`audio_filepath`,
`text`; `split` and `source` where known): rows of split "train" become training shards by source, the others the set
`dev/FOLDER` or, without a split, `test/FOLDER`. `--librispeech` takes LibriSpeech as openslr.org/12 has it: `train-*`
is for training, `dev-*` for development and `test-*` for test.

Split rules of the rest, by name only: an Asterisk clip is for test where sha1(name) % 5 == 0 and for development where
sha1(name) % 25 is 1 or 6; the digit speakers theo and lucas, all LJ and all LibriVox sentences are for test.
`OUT/speech` gets the shards that `features.py` and `together.py` read, `OUT/test/<set>` and `OUT/dev/<set>` get FLAC
files with a `manifest.jsonl` (`audio_filepath`, `text`, `duration`, and `source` where known).
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import av
import numpy as np
import soundfile
import torch
import torchaudio.functional as AF
from sentences import UNITS, normalize

RATE = 16_000
SHARD_CLIPS = 500  # of one training shard, about an hour
FIRST_SHARD = 9100  # number of the first shard of `--speech` and `--librispeech`; the packages' come before
Clip = tuple[str, np.ndarray, str]  # name, float32 samples at 16 kHz, text as written


def debian(package: str, work: Path) -> Path:
    """The folder a Debian package was unpacked to."""
    target = work / package
    if not target.exists():
        work.mkdir(parents=True, exist_ok=True)
        subprocess.run(["apt-get", "download", "-q", package], cwd=work, check=True)
        (archive,) = work.glob(f"{package}_*.deb")
        subprocess.run(["dpkg", "-x", str(archive), str(target)], check=True)
    return target


def decode(source: object, name: str | None = None) -> np.ndarray:
    """Mono float32 samples at 16 kHz of anything PyAV reads."""
    with av.open(source, format=name) as container:
        resampler = av.AudioResampler("flt", "mono", RATE)
        frames = [f for frame in container.decode(audio=0) for f in resampler.resample(frame)]
        frames += resampler.resample(None)
    return np.concatenate([f.to_ndarray().reshape(-1) for f in frames])


def asterisk(work: Path) -> Iterator[Clip]:
    """Prompts that have a transcript of speech; names keep their folder, as in `digits__7`."""
    texts = {}
    table = next(debian("asterisk-core-sounds-en", work).rglob("core-sounds-en.txt.gz"))
    for line in gzip.decompress(table.read_bytes()).decode(errors="replace").splitlines():
        key, colon, text = line.partition(":")
        if colon and not key.startswith(";"):
            texts[key.strip()] = text.strip()
    clips = sorted(debian("asterisk-core-sounds-en-g722", work).rglob("*.g722"))
    root = next(c for c in clips if c.name == "activated.g722").parent
    for clip in clips:
        key = clip.relative_to(root).with_suffix("").as_posix()
        text = texts.get(key, "")
        if text and not text.startswith("[") and not set("(<") & set(text):  # no tones, remarks or beeps
            yield key.replace("/", "__"), decode(str(clip), "g722"), text


def librivox(work: Path) -> Iterator[Clip]:
    folder = next(debian("pocketsphinx-testdata", work).rglob("librivox/transcription")).parent
    for line in (folder / "transcription").read_text().splitlines():
        text, _, name = line.removeprefix("<s>").partition("</s>")
        name = name.strip().strip("()")
        yield name, decode(str(folder / f"{name}.wav")), text.strip()


def ljspeech(folder: Path) -> Iterator[Clip]:
    for line in (folder / "manifest.jsonl").read_text().splitlines():
        row = json.loads(line)
        yield Path(row["audio_filepath"]).stem, decode(str(folder / row["audio_filepath"])), row["text"]


def digits(source: Path) -> Iterator[Clip]:
    """Clips named `digit_speaker_index`; 8 kHz, so nothing above 4 kHz after resampling."""
    with tarfile.open(source) as tar:
        for member in sorted(tar.getmembers(), key=lambda m: m.name):
            if member.isfile() and member.name.endswith((".flac", ".wav")):
                samples, rate = soundfile.read(tar.extractfile(member), dtype="float32")
                name = Path(member.name).stem
                yield name, AF.resample(torch.from_numpy(samples), rate, RATE).numpy(), UNITS[int(name.split("_")[0])]


def hashed(name: str) -> int:
    return int(hashlib.sha1(name.encode()).hexdigest(), 16)


def speech_folder(source: Path, work: Path) -> Path:
    """The folder with a `manifest.jsonl` that a path is, or that a tar file of it was unpacked to."""
    if source.is_dir():
        return source
    with tarfile.open(source) as tar:
        manifest = next((name for name in tar.getnames() if Path(name).name == "manifest.jsonl"), None)
        if manifest is None:
            raise SystemExit(f"{source} holds no manifest.jsonl")
        # `extractall(filter="data")` is not in every Python 3.11. Files alone are unpacked, none outside of the folder.
        for member in tar:
            target = (work / member.name).resolve()
            if not target.is_relative_to(work.resolve()):
                raise SystemExit(f"{source} holds a file outside of its folder, {member.name}")
            if (file := tar.extractfile(member) if member.isfile() else None) is not None:
                target.parent.mkdir(parents=True, exist_ok=True)
                with file, target.open("wb") as out:
                    shutil.copyfileobj(file, out)
    return (work / manifest).parent


def spoken(folder: Path) -> Iterator[tuple[str, str, Clip]]:
    """Split ("test" where none is said), source, and clip of each row of a manifest."""
    for line in (folder / "manifest.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        path = folder / row["audio_filepath"]
        yield row.get("split", "test"), row.get("source", folder.name), (path.stem, decode(str(path)), row["text"])


def librispeech(folder: Path) -> Iterator[tuple[str, str, Clip]]:
    """Split, source (`train-clean-100` and the like) and clip of every utterance of a LibriSpeech tree."""
    for table in sorted(folder.glob("*/*/*/*.trans.txt")):
        source = table.relative_to(folder).parts[0]
        for line in table.read_text(encoding="utf-8").splitlines():
            name, _, text = line.partition(" ")
            yield source.partition("-")[0], source, (name, decode(str(table.parent / f"{name}.flac")), text.lower())


def write_spoken(out: Path, name: str, clips: Iterable[tuple[str, str, Clip]], first: int) -> int:
    """Writes recordings as they come, training shards from number `first` on; the number after the last."""
    train: dict[str, list[Clip]] = {}
    held: dict[str, list[tuple[Clip, str]]] = {}
    for split, source, clip in clips:
        if split != "train":
            held.setdefault(split, []).append((clip, source))
            continue
        shard = train.setdefault(source, [])
        shard.append(clip)
        if len(shard) == SHARD_CLIPS:
            write_shard(out / "speech" / f"{first}-{source}.npz", train.pop(source))
            first += 1
    for source, rest in sorted(train.items()):
        write_shard(out / "speech" / f"{first}-{source}.npz", rest)
        first += 1
    for split, pairs in held.items():
        write_set(out / split / name, [clip for clip, _ in pairs], [source for _, source in pairs])
    return first


def write_set(folder: Path, clips: list[Clip], sources: list[str] | None = None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "manifest.jsonl").open("w") as manifest:
        for i, (name, samples, text) in enumerate(clips):
            soundfile.write(folder / f"{name}.flac", samples, RATE)
            row = {"audio_filepath": f"{name}.flac", "duration": round(len(samples) / RATE, 3), "text": text}
            manifest.write(json.dumps(row | ({"source": sources[i]} if sources else {})) + "\n")
    print(f"{folder}: {len(clips)} clips, {sum(len(s) for _, s, _ in clips) / RATE:.0f} s", flush=True)


def write_shard(path: Path, clips: list[Clip]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    readable = [(name, samples, target) for name, samples, text in clips if (target := normalize(text))]
    audio = [
        (np.clip(samples / max(1e-4, float(np.abs(samples).max())) * 0.7, -1, 1) * 32767).astype(np.int16)
        for _, samples, _ in readable
    ]
    rows = json.dumps([{"id": name, "text": target, "split": "train"} for name, _, target in readable])
    np.savez(path, audio=np.concatenate(audio), offset=np.cumsum([0, *map(len, audio)]), rows=np.array(rows))
    print(f"{path}: {len(audio)} clips, {sum(map(len, audio)) / RATE / 60:.1f} min", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--fsdd", type=Path, help="tar file of the Free Spoken Digit Dataset")
    parser.add_argument("--lj", type=Path, help="folder of LJ Speech sentences with a manifest.jsonl")
    parser.add_argument("--speech", type=Path, nargs="+", default=[], help="tar files or folders with a manifest.jsonl")
    parser.add_argument("--librispeech", type=Path, help="folder of train-*, dev-* and test-* as unpacked")
    arguments = parser.parse_args()
    for path in (*arguments.speech, *([arguments.librispeech] if arguments.librispeech else ())):
        if not path.exists():
            parser.error(f"there is no {path}")
    for option in ("fsdd", "lj"):
        path = getattr(arguments, option)
        if path is not None and not path.exists():
            print(f"--{option}: there is no {path}, so the set is left out", file=sys.stderr)
            setattr(arguments, option, None)
    out, work = arguments.out, arguments.out / "packages"
    prompts = list(asterisk(work))
    test = [c for c in prompts if hashed(c[0]) % 5 == 0]
    write_set(out / "test" / "asterisk", [c for c in test if len(c[2].split()) >= 3])
    write_set(out / "test" / "asterisk-short", [c for c in test if len(c[2].split()) < 3])
    write_set(out / "dev" / "asterisk", [c for c in prompts if hashed(c[0]) % 25 in (1, 6)])
    train = [c for c in prompts if hashed(c[0]) % 5 and hashed(c[0]) % 25 not in (1, 6)]
    write_shard(out / "speech" / "9000-asterisk.npz", train)
    write_set(out / "test" / "librivox", list(librivox(work)))
    if arguments.lj:
        write_set(out / "test" / "lj", list(ljspeech(arguments.lj)))
    if arguments.fsdd:
        by_speaker: dict[str, list[Clip]] = {}
        for clip in digits(arguments.fsdd):
            by_speaker.setdefault(clip[0].split("_")[1], []).append(clip)
        write_set(out / "test" / "fsdd", [c for speaker in ("theo", "lucas") for c in by_speaker.pop(speaker)])
        for i, (speaker, clips) in enumerate(sorted(by_speaker.items()), 9001):
            write_shard(out / "speech" / f"{i}-fsdd-{speaker}.npz", clips)
    number = FIRST_SHARD
    for source in arguments.speech:
        folder = speech_folder(source, work)
        number = write_spoken(out, folder.name, spoken(folder), number)
    if arguments.librispeech:
        write_spoken(out, "librispeech", librispeech(arguments.librispeech), number)


if __name__ == "__main__":
    main()

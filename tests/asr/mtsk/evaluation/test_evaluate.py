"""The evaluation: conditions and controls are what they say, every model at all its rates, and the files."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from tests.asr.talking import write_video
from tests.asr.tiny_mtsk import lips, speech, tiny_model
from tokenthrift.backbones.generation import Generation
from tokenthrift.cli import main
from tokenthrift.evaluation.wer import ErrorCount
from tokenthrift.mtsk.audiovisual.noise import snr_of
from tokenthrift.mtsk.config import DecodeConfig
from tokenthrift.mtsk.evaluation.conditions import CONTROLS, conditions, degraded, noisy
from tokenthrift.mtsk.evaluation.cost import cost_table, costs, counted
from tokenthrift.mtsk.evaluation.pooling import pooled
from tokenthrift.mtsk.evaluation.runs import evaluate
from tokenthrift.mtsk.evaluation.tables import (
    EvaluationRow,
    comparison_table,
    control_table,
    error_plot,
    measured,
    noise_plot,
    together,
)
from tokenthrift.mtsk.rates import Rates
from tokenthrift.mtsk.sequence import Encoded
from tokenthrift.mtsk.training.clips import Clip
from tokenthrift.quality import read_quality

TEXTS = ["the lazy dog", "a fox", "five"]
LEVELS = ("clean", "0 dB")
ALL: Any = {"tasks": ("avsr", "asr", "vsr")}


def clips() -> list[Clip]:
    seconds = (1.0, 0.5, 0.8)
    return [Clip(text, speech(s, i), lips(s, i)) for i, (text, s) in enumerate(zip(TEXTS, seconds, strict=True))]


def test_controls_spoil_one_stream() -> None:
    items = clips()
    shuffled, still, muted = (degraded(items, control) for control in CONTROLS)
    for i in range(3):
        theirs, ours = shuffled[i].video, items[i].video
        assert theirs is not None
        assert ours is not None
        assert theirs.shape == ours.shape, "as long as before"
        assert not torch.equal(theirs, ours), "nobody keeps the own lips"
        assert shuffled[i].audio is items[i].audio
        frames, silence = still[i].video, muted[i].audio
        assert frames is not None
        assert silence is not None
        assert torch.equal(frames, ours[:1].expand_as(ours))
        assert not silence.any()
        assert muted[i].video is ours
    assert degraded(items, "") == items


def test_shuffled_lips_say_something_else_in_the_same_time() -> None:
    lengths = {"a": (1.0, "one"), "b": (0.52, "One."), "c": (0.6, "two"), "d": (0.96, "three")}
    items = [Clip(text, speech(s, i), lips(s, i)) for i, (s, text) in enumerate(lengths.values())]
    one, also_one, two, three = (clip.video for clip in degraded(items, "shuffled video"))
    pictures = [clip.video for clip in items if clip.video is not None]
    assert torch.equal(one, torch.cat([pictures[3], pictures[3][-1:]]))  # type: ignore[arg-type]
    assert torch.equal(also_one, pictures[2][:13]), "not the lips of the other one"  # type: ignore[arg-type]
    assert torch.equal(two, pictures[3][:15])  # type: ignore[arg-type]
    assert torch.equal(three, pictures[0][:24])  # type: ignore[arg-type]
    for few in (items[:1], items[:2]):
        with pytest.raises(ValueError, match="two texts or more"):
            degraded(few, "shuffled video")


def test_noise_is_at_its_level_and_the_same_for_everybody() -> None:
    items, babble = clips(), speech(5.0, 9)
    for snr in (10.0, 0.0, -5.0):
        for clean, mixed in zip(items, noisy(items, babble, snr, 0), strict=True):
            assert clean.audio is not None
            assert mixed.audio is not None
            assert snr_of(clean.audio, mixed.audio - clean.audio) == pytest.approx(snr, abs=0.1)
    again = noisy(items, babble, 0.0, 0)
    assert all(torch.equal(a.audio, b.audio) for a, b in zip(again, noisy(items, babble, 0.0, 0), strict=True))  # type: ignore[arg-type]
    assert noisy(items, babble, None, 0) == items


def test_conditions() -> None:
    assert conditions([None, 0.0], False) == [(None, ""), (0.0, "")]
    found = conditions([None, 5.0, 0.0, -5.0], True)
    assert found[4:] == [(0.0, "shuffled video"), (0.0, "still video"), (None, "muted audio")]
    assert (5.0, "still video") in conditions([None, 5.0], True)
    assert conditions([None], True)[1:] == [(None, control) for control in CONTROLS]
    rows = evaluate([("MS", tiny_model())], clips(), None, [None])
    table = control_table("controls", rows)
    assert table is not None
    assert {row[3] for row in table.rows} == {"clean"}
    assert all(row[4] is not None for row in table.rows)


def test_every_model_at_its_rates_in_every_condition() -> None:
    model = tiny_model(**ALL)
    alone = tiny_model(audio_rates=(4,), video_rates=(2,))
    alone.load_state_dict(
        {name: model.state_dict()[name] for name in alone.state_dict() if "lora" not in name}, strict=False
    )
    rows = evaluate([("MS", model), ("independent", alone)], clips(), speech(3.0, 9), [None, 0.0])
    plain = [r for r in rows if r.model == "MS" and not r.control and r.snr is None]
    assert [r.rates for r in plain] == list(model.config.scales)
    assert {(r.rates, r.snr, r.control) for r in rows if r.model == "independent"} == {
        (Rates(4, 2), snr, control) for snr, control in conditions([None, 0.0], True)
    }
    assert all(r.rates.audio and r.rates.video for r in rows if r.control)
    tokens = {r.rates: r.tokens for r in plain}
    assert tokens[Rates(4, 2)] == pytest.approx((13 + 13 + 7 + 6 + 10 + 10) / 3)
    assert tokens[Rates(0, 5)] == pytest.approx((5 + 3 + 4) / 3)
    assert all(r.words.total == 6 for r in rows)


def test_a_set_without_video_is_heard_only() -> None:
    items = [Clip(clip.text, clip.audio) for clip in clips()]
    rows = evaluate([("MS", tiny_model(**ALL))], items, None, [None])
    assert {r.rates for r in rows} == {Rates(4), Rates(16)}
    with pytest.raises(ValueError, match="no noise"):
        evaluate([("MS", tiny_model(**ALL))], items, None, [None, 0.0])


def test_a_set_whose_clips_have_different_streams_is_refused() -> None:
    items = clips()
    items[1].video = None
    with pytest.raises(ValueError, match="2 of 3 clips have video"):
        evaluate([("MS", tiny_model(**ALL))], items, None, [None])
    with pytest.raises(ValueError, match="no clip"):
        evaluate([("MS", tiny_model(**ALL))], [], None, [None])


def test_models_with_other_encoders_are_refused() -> None:
    other = tiny_model()
    with torch.no_grad():
        other.audio_encoder.conv1.bias.add_(1.0)  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="B has other encoders than A"):
        evaluate([("A", tiny_model()), ("B", other)], clips(), None, [None])
    other = tiny_model()
    assert other.config.audio is not None
    other.config = replace(other.config, audio=replace(other.config.audio, trailing_silence=0.5))
    with pytest.raises(ValueError, match="B has other encoders than A"):
        evaluate([("A", tiny_model()), ("B", other)], clips(), None, [None])


def test_what_is_evaluated_is_what_is_transcribed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without phrases in a circle, which a model may write after the end of a short recording."""
    model = tiny_model(**ALL)
    (clip,) = clips()[:1]

    def circling(encoded: Encoded, scales: list[Rates], *_: Any, **__: Any) -> dict[Rates, list[Generation]]:
        ids = model.token_ids(clip.text + 9 * f" {clip.text.split()[-1]}")
        return {rates: [Generation(tuple(ids), (0.9,) * len(ids))] * len(encoded) for rates in scales}

    monkeypatch.setattr(model, "generate_all", circling)
    # Two clips, so that lips can be shuffled.
    rows = evaluate([("MS", model)], [clip, replace(clip, text="x")], None, [None])
    assert {(row.words.hits, row.words.insertions) for row in rows} == {(3, 2)}


def test_pooling_without_training_keeps_everything_else() -> None:
    fine = tiny_model(audio_rates=(4,), video_rates=(2,))
    coarse = pooled(fine, (4, 16), (2, 5))
    encoded = fine.encode(
        [c.audio for c in clips() if c.audio is not None], [c.video for c in clips() if c.video is not None]
    )
    ids = [fine.token_ids(text) for text in TEXTS]
    with torch.no_grad():
        torch.testing.assert_close(coarse.loss(encoded, ids, Rates(4, 2)), fine.loss(encoded, ids, Rates(4, 2)))
        assert not torch.equal(coarse.loss(encoded, ids, Rates(16, 5)), fine.loss(encoded, ids, Rates(4, 2)))
    assert coarse.config.scales == tiny_model().config.scales
    one: Any = {"audio_rates": (4,), "video_rates": (2,)}
    with pytest.raises(ValueError, match="MS"):
        pooled(tiny_model("SS", **one), (4, 16), (2, 5))
    with pytest.raises(ValueError, match="stacked"):
        pooled(tiny_model(compression="stack", **one), (4, 16), (2, 5))
    with pytest.raises(ValueError, match="several audio rates"):
        pooled(tiny_model(), (4, 16), (2, 5))
    with pytest.raises(ValueError, match="finer"):
        pooled(fine, (2, 16), (2, 5))


def row_of(model: str, rates: Rates, wer: float, snr: float | None = None, control: str = "") -> EvaluationRow:
    wrong = round(1000 * wer)
    count = ErrorCount(hits=1000 - wrong, substitutions=wrong)
    return EvaluationRow(model, rates, snr, control, count, count, 10.0)


def test_comparisons_are_in_points() -> None:
    scales = [Rates(4, 2), Rates(16, 2), Rates(4, 5), Rates(16, 5)]
    rows = [row_of("MS", r, 0.05 + 0.005 * i) for i, r in enumerate(scales)]
    rows += [row_of("independent", r, 0.05) for r in scales]
    rows += [row_of("pooled", scales[0], 0.05), row_of("pooled", scales[3], 0.4)]
    rows += [row_of("MS", Rates(4, 0), 0.4, 0.0), row_of("MS", scales[0], 0.3, 0.0)]
    rows += [row_of("MS", scales[0], 0.44, 0.0, "shuffled video"), row_of("MS", scales[0], 0.36, 0.0, "still video")]
    table = comparison_table("all", rows, "MS")
    assert table is not None
    assert [row[1] for row in table.rows] == pytest.approx([0.75, 25.0, -10.0, 10.0, 1.5, 35.0])
    assert comparison_table("none", [row_of("MS", Rates(4), 0.1)], "MS") is None


def test_comparisons_that_were_not_measured_are_shown() -> None:
    rows = [row_of("MS", r, 0.1, 0.0) for r in (Rates(4, 2), Rates(16, 5), Rates(4))]
    table = comparison_table("all", rows, "MS")
    assert table is not None
    assert [row[1] for row in table.rows] == [None, 0.0, None, None, None, None]


def test_sets_taken_together_have_all_errors_over_all_words() -> None:
    long = row_of("MS", Rates(4, 2), 0.1)
    short = replace(
        long, words=ErrorCount(hits=50, deletions=50), characters=ErrorCount(hits=9, insertions=1), tokens=4
    )
    alone = row_of("MS", Rates(16, 2), 0.3)
    (found,) = together([([alone, long], 30), ([short], 10)])
    assert (found.rates, found.words.total, found.words.errors) == (Rates(4, 2), 1100, 150)
    assert found.characters.errors == 101
    assert found.tokens == pytest.approx((30 * 10 + 10 * 4) / 40)


def test_the_plot_has_a_line_for_each_set_of_streams() -> None:
    scales = [Rates(4, 2), Rates(16, 5), Rates(4), Rates(16), Rates(0, 2)]
    levels = [None, 5.0, -5.0, 0.0]
    rows = [row_of("MS", r, 0.1, snr) for r in scales for snr in levels] + [row_of("independent", scales[0], 0.1)]
    panels = error_plot(rows, levels).axes
    assert [panel.get_title() for panel in panels] == ["clean", "-5 dB"]
    streams = ["MS, both streams", "MS, audio alone", "MS, video alone"]
    assert [line.get_label() for line in panels[0].lines] == [*streams, "independent, both streams"]
    assert [len(line.get_xdata()) for line in panels[1].lines] == [2, 2, 1]


def test_noise_has_a_line_for_each_set_of_streams_at_the_finest_rates() -> None:
    levels = [None, 5.0, -5.0]
    rows = [row_of("MS", r, 0.1 + (r.audio > 4), snr) for r in (Rates(4, 2), Rates(16, 5), Rates(4)) for snr in levels]
    (axis,) = noise_plot([*rows, row_of("MS", Rates(0, 2), 0.3), row_of("other", Rates(4), 0.9)], levels, "MS").axes
    assert [text.get_text() for text in axis.get_xticklabels()] == ["clean", "5 dB", "-5 dB"]
    assert [[round(y) for y in line.get_ydata()] for line in axis.lines] == [[10] * 3, [10] * 3, [30]]
    labels = ["both streams, (4, 2)", "audio alone, (4, 0)", "video alone, (0, 2)"]
    assert [text.get_text() for text in axis.texts] == labels


def test_budgets_learn_errors_and_times() -> None:
    rows = [row_of("MS", Rates(4, 2), wer) for wer in (0.1, 0.3)] + [row_of("MS", Rates(16, 5), 0.5)]
    fine, coarse = measured(rows, "MS", {Rates(4, 2): 12.3456})
    assert (fine.wer, fine.milliseconds) == (0.2, 12.346)
    assert (coarse.wer, coarse.milliseconds) == (0.5, None)


def test_costs_fall_with_the_rates() -> None:
    table = cost_table("cost", costs(tiny_model(**ALL), clips()[0], repeats=1))
    cells: dict[Any, Any] = {row[0]: row[1:] for row in table.rows}
    assert list(cells) == [str(rates) for rates in tiny_model(**ALL).config.scales]
    assert cells["(4, 2)"][0] == 26
    assert cells["(16, 5)"][0] == 9
    assert cells["(16, 5)"][1] == 9 + 1 + 4 + len("Transcribe speech and video to text.")
    fine, coarse = cells["(4, 2)"], cells["(16, 5)"]
    assert fine[2] == coarse[2] > 0, "the encoders run once"
    assert fine[3] > coarse[3] > 0
    assert fine[4] > 0
    audio_alone, video_alone = cells["(4, 0)"][2], cells["(0, 2)"][2]
    assert audio_alone + video_alone == pytest.approx(fine[2]), "one stream pays for its own encoder"
    assert min(audio_alone, video_alone) > 0


def test_attention_is_counted_and_time_is_that_of_a_second() -> None:
    q = torch.randn(1, 2, 50, 16)
    _, flops = counted(lambda: torch.nn.functional.scaled_dot_product_attention(q, q, q))
    assert flops == 2 * 2 * 2 * 50 * 50 * 16
    (cost, *_) = costs(tiny_model(), clips()[1], repeats=1)
    assert cost.milliseconds == pytest.approx(2000 * (cost.encoding_seconds + cost.writing_seconds), rel=0.1)


def write_set(folder: Path) -> Path:
    """The clips as files, and before them one whose sound is gone."""
    folder.mkdir()
    rows = []
    for i, clip in enumerate(clips()):
        assert clip.audio is not None
        soundfile.write(folder / f"{i}.flac", clip.audio.clamp(-1, 1).numpy(), 16_000)
        crops = np.random.default_rng(i).integers(0, 256, (len(clip.audio) // 640, 96, 96), dtype=np.uint8)
        write_video(folder / f"{i}.mkv", crops)
        row = {"audio_filepath": f"{i}.flac", "video_filepath": f"{i}.mkv", "text": clip.text, "duration": 1.0}
        rows.append(json.dumps(row) + "\n")
    gone = {"audio_filepath": "gone.flac", "video_filepath": "0.mkv", "text": "gone", "duration": 1.0}
    (folder / "manifest.jsonl").write_text(json.dumps(gone) + "\n" + "".join(rows))
    return folder


def test_the_command_writes_a_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_model(**ALL).save_pretrained(tmp_path / "model")
    files = sorted(path.name for path in (tmp_path / "model").iterdir())
    folder = write_set(tmp_path / "set")
    bounds = {"homophene_bound": 0.5, "words": 9, "kinds": {"set": {"homophene_bound": 0.075, "words": 6}}}
    (tmp_path / "homophenes.json").write_text(json.dumps(bounds))
    out = tmp_path / "report"
    arguments = [
        "--model",
        f"MS={tmp_path / 'model'}",
        "--data",
        f"synthetic={folder}",
        "--babble",
        str(folder / "0.flac"),
    ]
    more = ["--snr", "clean", "0", "--out", str(out), "--limit", "3", "--table", str(tmp_path / "measured")]
    assert main(["evaluate", "mtsk", *arguments, *more]) == 0
    table = json.loads((tmp_path / "measured" / "config.json").read_text())["table"]
    assert {(line["audio"], line["video"], line["snr"]) for line in table} == {
        (rates.audio, rates.video, snr) for rates in tiny_model(**ALL).config.scales for snr in (None, 0.0)
    }
    assert all(line["milliseconds"] > 0 for line in table)
    report = json.loads((out / "report.json").read_text())
    assert "7.5 % of the words of this set" in report["tables"][0]["note"]
    assert [note for note in report["notes"] if "left out" in note and "gone.flac" in note]
    kept = json.loads((out / "rows.json").read_text())
    assert {(row["set"], row["model"]) for row in kept} == {("synthetic", "MS")}
    assert len([row for row in kept if not row["control"]]) == len(table)
    assert [table["title"].split(":")[0] for table in report["tables"]] == ["synthetic"] * 4
    assert report["tables"][0]["rows"][0]["WER 0 dB"] >= 0
    assert "rendered mouths" in report["notes"][0]
    assert (out / "errors_synthetic.png").stat().st_size > 1000
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == files, "only --table writes beside a model"
    curves = read_quality(tmp_path / "measured")
    assert read_quality(out) == curves
    assert set(curves) == {"audio", "talking", "video"}
    assert all(len(curve.tokens) > 1 and "WER" in curve.metric for curve in curves.values())
    assert "synthetic: 2 items" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["evaluate", "mtsk", *arguments, "--snr", "loud", "--out", str(out)])
    with pytest.raises(SystemExit):
        main(["evaluate", "mtsk", *arguments, "--data", f"synthetic={tmp_path}", "--out", str(out)])


def test_the_command_compares_every_kind_of_model_and_takes_synthetic_sets_together(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_set(tmp_path / "set")
    short: Any = {"decode": DecodeConfig(max_new_tokens=3)}
    pair: Any = {"audio_rates": (4,), "video_rates": (2,), **short}
    models = {"MS": tiny_model(**ALL, **short), "SS": tiny_model("SS", **ALL, **short)}
    models |= {"MSS": tiny_model("MSS", **short), "independent": tiny_model(**pair)}
    arguments = ["--babble", str(folder / "0.flac"), "--snr", "clean", "0", "--pool", str(tmp_path / "independent")]
    for name, model in models.items():
        for part in ("audio_encoder", "video_encoder"):
            getattr(model, part).load_state_dict(getattr(models["MS"], part).state_dict())
        model.save_pretrained(tmp_path / name)
        arguments += ["--model", f"{name}={tmp_path / name}"]
    real = shutil.copytree(folder, tmp_path / "real")
    rows = [json.loads(line) | {"lips": "rendered"} for line in (real / "manifest.jsonl").read_text().splitlines()]
    (real / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("synthetic", "synthetic-b"):
        arguments += ["--data", f"{name}={folder}"]
    arguments += ["--data", f"real={real}"]
    assert main(["evaluate", "mtsk", *arguments, "--out", str(tmp_path / "report")]) == 0
    tables = json.loads((tmp_path / "report" / "report.json").read_text())["tables"]
    own = [table["title"] for table in tables if table["title"].startswith("real")]
    assert len(own) == 6
    assert all(title.startswith("real (real voice, rendered lips): ") for title in own)
    joint = [table for table in tables if table["title"].startswith("all synthetic sets")]
    assert [table["title"] for table in joint] == [
        "all synthetic sets: 6 items, 12 words",
        "all synthetic sets: controls",
        *(f"all synthetic sets: {name} beside its baselines" for name in ("MS", "SS", "MSS")),
    ]
    assert joint[0]["note"].endswith("All errors of synthetic, synthetic-b over all their words.")
    assert [row["WER clean"] for row in joint[0]["rows"]] == [row["WER clean"] for row in tables[0]["rows"]]
    counts = Counter(row["model"] for row in joint[0]["rows"])
    assert counts == {"MS": 8, "SS": 8, "MSS": 4, "independent": 1, "pooled": 4}, "a row for every pair of rates"
    assert all(row[f"{unit} {level}"] >= 0 for row in joint[0]["rows"] for unit in ("WER", "CER") for level in LEVELS)
    assert "all synthetic sets: MS beside its baselines" in capsys.readouterr().out


def test_released_models_are_counted_as_they_compute() -> None:
    """The published code leaves out the states that fill no window, and keeps 25 states at least."""
    model = tiny_model(compat="released", audio_rates=(16,), video_rates=(5,))
    items = clips()
    (row,) = [r for r in evaluate([("published", model)], items, None, [None], beams=1) if not r.control]
    # 1.0, 0.5 and 0.8 s: 50, 25 and 40 states of sound, 25, 12 and 20 frames.
    assert row.tokens == pytest.approx((3 + 5 + 1 + 2 + 2 + 4) / 3)
    (cost,) = costs(model, items[2], repeats=1)
    assert cost.tokens == 2 + 4

"""Whisper of every size, turbo and distilled ones included, by a greedy decoder of our own.

Source: Radford et al. 2022 (arXiv 2212.04356), sections 2.1 to 2.4. What differs from transformers' `generate` and from
openai-whisper: no timestamps are decoded (a window is at most 30 s), nothing is sampled again at a higher temperature,
rows of a batch stop by themselves and never see each other, and every token has its probability. Word times come from
the cross-attention (`cross_attention`), whatever `generation_config` says.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tokenthrift.budget import DecodeBudget
from tokenthrift.recognizers.base import Parts
from tokenthrift.recognizers.cross_attention import align
from tokenthrift.recognizers.whisper_base import WhisperBase
from tokenthrift.recognizers.whisper_mel import padded_log_mel
from tokenthrift.recognizers.whisper_vocabulary import WhisperVocabulary, is_silence
from tokenthrift.transcript import Transcript
from tokenthrift.whisper_frames import states_of

__all__ = ["WhisperRecognizer"]


class WhisperRecognizer(WhisperBase):
    """A `Recognizer` of a Whisper of transformers."""

    def __init__(self, parts: Parts, *, language: str | None = None, task: str = "transcribe") -> None:
        special = {str(token): int(index) for token, index in parts.tokenizer.get_added_vocab().items()}
        vocabulary = WhisperVocabulary(special, int(parts.model.config.vocab_size))
        super().__init__(parts, vocabulary, language=language, task=task)
        config = self.model.config
        generation = self.model.generation_config
        self._end = int(special.get("<|endoftext|>", config.eos_token_id))
        others = generation.suppress_tokens or config.__dict__.get("suppress_tokens") or []
        first = generation.begin_suppress_tokens or config.__dict__.get("begin_suppress_tokens") or []
        self._never = torch.tensor(self._vocabulary.never(self._end, others), dtype=torch.long, device=self.device)
        first = sorted({i for i in first if 0 <= i < self._vocabulary.size})
        self._not_first = torch.tensor(first, dtype=torch.long, device=self.device)

    def transcribe_rows(self, audio: Sequence[Tensor], limits: DecodeBudget) -> list[Transcript]:
        """Transcribes recordings of any lengths."""
        bins = int(self.model.config.num_mel_bins)
        mels = torch.stack([torch.from_numpy(padded_log_mel(samples.numpy(), bins)) for samples in audio])
        dtype = next(self.model.parameters()).dtype
        states = self.model.get_encoder()(mels.to(self.device, dtype)).last_hidden_state
        prompts = self._prompts(states)
        positions = int(self.model.config.max_target_positions)
        most = [self._most(len(samples), prompts.shape[1], positions, limits) for samples in audio]
        rows = self._generate(states, prompts, most)
        return [
            self._transcript(states[i : i + 1], prompts[i], ids, confidences, len(audio[i]))
            for i, (ids, confidences) in enumerate(rows)
        ]

    def _prompts(self, states: Tensor) -> Tensor:
        """`(B, P)`: start, language and task where there are any, no timestamps."""
        ids = self._vocabulary.prompt(int(self.model.config.decoder_start_token_id), self.language, self.task)
        prompts = torch.tensor([[0 if i is None else i for i in ids]] * len(states), device=states.device)
        if None in ids:
            known = torch.tensor(sorted(self._vocabulary.languages.values()), device=states.device)
            logits = self._decode(states, prompts[:, :1], None)[0][:, -1, known]
            prompts[:, 1] = known[logits.argmax(-1)]
        return prompts

    def _decode(self, states: Tensor, ids: Tensor, cache: Any) -> tuple[Tensor, Any]:
        from transformers.modeling_outputs import BaseModelOutput

        out = self.model(
            encoder_outputs=BaseModelOutput(last_hidden_state=states),
            decoder_input_ids=ids,
            past_key_values=cache,
            use_cache=True,
        )
        return out.logits.float(), out.past_key_values

    def _generate(self, states: Tensor, prompts: Tensor, most: Sequence[int]) -> list[tuple[list[int], list[float]]]:
        written: list[tuple[list[int], list[float]]] = [([], []) for _ in most]
        alive = list(range(len(most)))
        ids, cache = prompts, None
        silence = [0.0] * len(most)
        for step in range(max(most)):
            logits, cache = self._decode(states, ids, cache)
            scores = logits[:, -1].index_fill(1, self._never, float("-inf"))
            if step == 0:
                if self._vocabulary.silence is not None:
                    # The first position, which only knows that a text begins, also says whether there is one.
                    silence = logits[:, 0].softmax(-1)[:, self._vocabulary.silence].tolist()
                scores = scores.index_fill(1, self._not_first, float("-inf"))
            best, chosen = scores.log_softmax(-1).max(-1)
            keep = []
            pairs = zip(alive, chosen.tolist(), best.exp().tolist(), strict=True)
            for position, (row, token, p) in enumerate(pairs):
                if token == self._end:
                    continue
                written[row][0].append(token)
                written[row][1].append(p)
                if len(written[row][0]) < most[row]:
                    keep.append(position)
            if not keep:
                break
            if len(keep) < len(alive):
                # Rows that are done leave the batch; the others do not notice.
                kept = torch.tensor(keep, device=states.device)
                states, chosen = states[kept], chosen[kept]
                cache.batch_select_indices(kept)
                alive = [alive[position] for position in keep]
            ids = chosen[:, None]
        return [([], []) if is_silence(row[1], p) else row for row, p in zip(written, silence, strict=True)]

    def _transcript(
        self, states: Tensor, prompt: Tensor, ids: list[int], confidences: list[float], samples: int
    ) -> Transcript:
        times: list[tuple[float, float]] = []
        if ids:
            row = torch.cat([prompt, torch.tensor([*ids, self._end], device=prompt.device)])[None]
            times = align(self.model, states, row, len(prompt), states_of(samples))
        return self._timed(ids, confidences, times, samples)

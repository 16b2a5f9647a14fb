"""A rate that the shipped Llama-MTSK does not have: its projector is trained, everything else starts from the model.

    python examples/train_your_own_rates.py samples/speech my-mtsk 8 200

A loop of plain PyTorch, to show the parts; `tokenthrift fit` with recipes/mtsk does it with Lightning and noise.
"""

import json
import random
import sys
from dataclasses import replace
from pathlib import Path

import torch

from tokenthrift.media.audio import read_audio
from tokenthrift.mtsk import LlamaMtsk, Rates

folder, out, rate, steps = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
shipped = LlamaMtsk.from_pretrained("model_cards/mtsk-tiny-en")
config = replace(shipped.config, audio_rates=(rate,), video=None, video_rates=(), tasks=("asr",), table=())
model = LlamaMtsk(config, shipped.tokenizer)
same = {name: tensor for name, tensor in shipped.state_dict().items() if name in model.state_dict()}
same = {name: tensor for name, tensor in same.items() if tensor.shape == model.state_dict()[name].shape}
same = {name: tensor for name, tensor in same.items() if not name.startswith("audio_proj")}
print(f"{len(same)} of {len(model.state_dict())} tensors are the shipped model's")
model.load_state_dict(same, strict=False)

rows = [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]
audio = [read_audio(folder / row["audio_filepath"]) for row in rows]
texts = [model.token_ids(row["text"]) for row in rows]
with torch.no_grad():
    encoded = [model.encode([samples]) for samples in audio]  # the encoder is frozen: once is enough
trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.1)
order, model = random.Random(0), model.train()
for step in range(steps):
    index = order.randrange(len(rows))
    loss = model.loss(encoded[index], [texts[index]], Rates(rate, 0))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % max(1, steps // 10) == 0:
        print(f"step {step}: loss {loss.item():.2f}")
model.eval().save_pretrained(out)
print(LlamaMtsk.from_pretrained(out).transcribe(audio[:1], beams=1)[0])

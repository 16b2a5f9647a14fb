"""Fewer visual tokens in a live Qwen2.5-VL: plan, run, compare, and leave the model as it was.

python examples/attach_to_qwen_vl.py Qwen/Qwen2.5-VL-3B-Instruct samples/pictures/street.jpg "What is this?"
"""

import sys
import time

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from tokenthrift.attachment import attach
from tokenthrift.reducers import BipartiteMerging

name, path, question = sys.argv[1:]
device = "cuda" if torch.cuda.is_available() else "cpu"
model = AutoModelForImageTextToText.from_pretrained(name, dtype="auto").to(device).eval()
processor = AutoProcessor.from_pretrained(name)
content = [{"type": "image"}, {"type": "text", "text": question}]
prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
inputs = processor(text=[prompt], images=[Image.open(path)], return_tensors="pt").to(device)


def answer() -> str:
    start = time.perf_counter()
    out = model.generate(**inputs, max_new_tokens=20, do_sample=False)
    text = processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0]
    return f"{time.perf_counter() - start:.1f} s: {text.strip()!r}"


whole = answer()
print("all tokens ", whole)
for budget in ("50%", "25%", "10%"):
    with attach(model, BipartiteMerging(), budget) as handle:
        print(f"{budget:<11}", answer(), f"with {handle.usage[0].used} of {handle.usage[0].native} tokens")
print("all again  ", answer())

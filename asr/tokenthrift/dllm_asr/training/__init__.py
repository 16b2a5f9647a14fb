"""Training of dLLM-ASR under Lightning; a transcription needs nothing of it.

module         `DllmAsrModule`: the CTC draft and the denoiser
autoregressive `AutoregressiveModule`: the baseline
data           `DllmAsrDataModule`: cached encoder states, real development recordings
examples       what the denoiser is shown and what it has to write
corruption     the forward process of masked diffusion and its loss
"""

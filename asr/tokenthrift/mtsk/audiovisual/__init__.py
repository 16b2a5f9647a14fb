"""What a Llama-MTSK model reads: sound and lips, and the states that its encoders make of them.

avhubert   the visual encoder
encoders   recordings and mouth crops to padded states
lips       mouth crops of ordinary talking-face video
noise      mixing at a level in dB, and the level of a recording from the recording alone
released   how the authors' code feeds Whisper
"""

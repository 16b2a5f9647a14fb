"""What training needs and all systems share.

cli            ``tokenthrift fit|validate|test|predict``, one Lightning command line over all models and data
sampler        batches in random order or of like length: seeded by epoch, dealt out to processes, resumable
resuming       data modules that go on after the last batch used
processes      rank and number of processes; losses and figures that do not depend on them
optim          AdamW, which weights decay, warm-up and cosine
start_weights  the weights of an earlier training or of a model, to begin with
random_state   a callback that makes a resumed run draw the numbers that the interrupted one would have drawn
"""

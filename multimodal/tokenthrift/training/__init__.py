"""What training needs and all systems share.

`cli`: ``tokenthrift fit|validate|test|predict``, one Lightning command line over all models and data.
`random_state`: a callback that makes a resumed run draw the numbers that the interrupted one would have drawn.
`resuming`: data that go on after the last batch used. `schedule`: warm-up and cosine.
"""

"""`tokenthrift evaluate mtsk`: errors against tokens.

command      the options
evaluate     measures and reports
runs         every model at each of its scales in each condition
conditions   babble at a level, and controls that make one stream useless
pooling      a model at rates it was never trained for
cost         FLOPs and time of one item at every pair of rates
tables       what was measured, as tables and a plot
"""

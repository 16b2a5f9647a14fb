"""The page of `tokenthrift demo`.

showing   a file through a model under a budget: price, tokens, result; needs no gradio
page      the page around it, by gradio
"""

"""The page of `tokenthrift demo`.

showing   a file through a model under a budget: tokens planned and used, result; needs no gradio
page      the page around it, by gradio
"""

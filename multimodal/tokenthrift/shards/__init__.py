"""Collections of pictures and clips as shards, in and out: folders, WebDataset tars and Parquet tables.

items      what a collection holds, one after another, each with a name that is safe
tar        WebDataset tars to items
table      Parquet tables to items
units      what is worked on at once: a shard of the input, or so many loose files
writing    rows to WebDataset tars, Parquet tables and JSON lines
work       units to rows, by one model
job        the durable job over all of it, here or on Ray
"""

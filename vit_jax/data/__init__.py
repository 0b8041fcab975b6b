"""Pictures from a name to arrays, and the order in which they are read.

splits (what a run trains and measures on), load (name → splits, by way of the cache), cache, sources (digits, tfds,
folders), tiny_imagenet; resident (which pictures a step reads) and stream (those that do not fit on the devices);
stand_in (sets that are not here).
"""

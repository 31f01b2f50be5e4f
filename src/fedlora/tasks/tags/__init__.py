"""Token classification: tags of words, aligned with sub-word tokens.

Nothing here serves another task.
"""

"""Image classification: decoding, augmentation and the model's own preprocessing.

Nothing here reads text.
"""

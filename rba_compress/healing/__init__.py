"""Training of a compressed network towards its original.

distillation  the training
augmentation  images mirrored, cropped, mixed
"""

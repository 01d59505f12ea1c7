"""Healing: training of a compressed network towards its original.

distillation  the training
augmentation  random mirroring, cropping and mixing of images
"""

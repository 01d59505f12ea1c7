"""Healing: training of a compressed network towards its original.

student       which tensors of the compressed network are trained
samples       samples to train on, and those held out
augmentation  changes of images before both networks see them
checkpoint    the state of a training, as a file
loop          the objective and the training
"""

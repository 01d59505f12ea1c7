"""Values and services that every other room stands on; nothing here knows a network.

errors                      every error that is raised on purpose
schema                      frozen values that read and write JSON
config                      `Budget`, `Config`, `Healing`: what a user asks for
plan                        `Chain`, `Replacement`, `Refit`, `Plan`: decisions, without tensors
registry                    units by name, as plans and settings see them
cost                        multiply-accumulates and parameters
map_spec                    which map, and how well it fits
call_signature              templates of a block's call
batch, loader, loader_form  batches as arguments of a model, and the deal of their samples
outputs                     tensors of a model's output by name
inference                   forward passes in eval mode
io, file_formats            files that are written whole, or named by their format
distributed                 several processes as one
offload                     networks that accelerate has dispatched
memory                      limits of memory
weight_types                weights that are no plain tensors
tables                      tables for a terminal or a notebook
"""

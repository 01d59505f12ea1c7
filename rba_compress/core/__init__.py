"""Values and services on which every other folder builds; `core` imports from no other folder.

errors                      every error that is raised on purpose
schema                      frozen values that read and write JSON
config                      `Budget`, `Config`, `Healing`: settings that a user gives
plan                        `Chain`, `Replacement`, `Refit`, `Plan`: decisions, without tensors
registry                    units by name, as plans and settings see them
cost                        multiply-accumulates and parameters
map_spec                    kind of a map, and diagnostics of its fit
call_signature              templates of a block's call
batch, loader, loader_form  batches as arguments of a model, and the split of their samples
outputs                     tensors of a model's output by name
inference                   forward passes in eval mode
io, file_formats            atomic, checksummed files, and recognition of other formats
distributed                 collectives of several processes
offload                     networks that accelerate has dispatched
memory                      memory limits and out-of-memory errors
weight_types                refusal of weights that are not plain tensors
tables                      tables for a terminal or a notebook
"""

"""Units: the changes that a search may make to the blocks of a network, one file each.

base            the contract of a unit
registry        the list of units, one line each
span            consecutive blocks replaced by one map
read_out        a block for the positions that the output reads
attention_free  a block without its attention
mlp_free        a block without its MLP
read_out_mlp    a block whose MLP is for the read positions alone
token_merge     a block that merges the most similar positions
width           base of the units that narrow a block from the inside
channel_width   base of those that take whole channels
hidden_width    a block with fewer channels between its layers
attention_width  common parts of those that narrow attention
head_width      a block with fewer heads of attention
attention_linear  a block with a linear layer in place of its attention
qk_rank         a block whose queries and keys have fewer channels
vo_rank         a block whose values have fewer channels
whole           a block as it is, to read the stream between its sublayers
block_variants  a block traced into a graph, cut by a unit, and run
offers          offers of units on a network's blocks, each tried
splice          execution of a plan
"""

"""Files: what is saved, exported, read back and verified.

artifact                   a directory, and back
weights                    state dicts
architecture, constructor  architectures that rebuild a network, and arguments inferred from it
tree_comparison            comparison of the settings of two module trees
reference_io               inputs to draw, and the outputs on them
fold                       a stock network with fewer blocks
hub                        files of a model hub
pareto_front               the networks of a search
levels                     networks of a front that share weights, and the dial between them
onnx_export, certificate   exported files with their proof
onnx_file                  networks traced, and written as files
certification              files compared with their networks, and timed
int8_export                the same for files in int8
int8                       quantised ONNX files, in a closed loop with what they cost
gguf_export                files for llama.cpp, with theirs
shared_weights             weights outside of ONNX files, for several of them
verification               repetition of every check
"""

"""The recipe for one site of a block: factor, round, clip. Functions of typed settings and tensors, without stages."""

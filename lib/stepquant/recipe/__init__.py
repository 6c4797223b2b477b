"""What is done to one site of a block: factor, round, clip. Functions of typed settings and tensors; no files, no stages."""

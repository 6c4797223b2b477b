import torch

# Two threads on tensors this small are slower than one, and many times slower when the machine is busy.
torch.set_num_threads(1)

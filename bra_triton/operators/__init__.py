"""The operators that PyTorch sees: schema, fake implementation and autograd, for `torch.compile`."""

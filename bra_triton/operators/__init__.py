"""What PyTorch sees: `autograd.Function`s, and operators with schemas and fakes for `torch.compile`."""

"""Triton kernels of bi-level routing attention and their launches; nothing here knows of `nn.Module`."""

from .launch import Problem, attention_backward, attention_forward, inverse_graph, region_routing

__all__ = ["Problem", "attention_backward", "attention_forward", "inverse_graph", "region_routing"]
